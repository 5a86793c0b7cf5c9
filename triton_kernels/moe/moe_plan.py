"""moe_plan: stable ranks by comparing slots, so no atomics and no order that depends on timing.

Few slots: one launch compares every pair. Many: chunks count their experts, a scan over chunks follows, and each
chunk places its own slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device

# slots up to which the single launch wins over the three launches of the chunked path
ALL_PAIRS_SLOTS = 4096


@triton.jit
def _experts_of(ids_ptr, slot, slots, EXPERTS: tl.constexpr):
    """Expert of each slot, EXPERTS for a dropped one, EXPERTS + 1 past the end."""
    id = tl.load(ids_ptr + slot, mask=slot < slots, other=0)
    expert = tl.where((id >= 0) & (id < EXPERTS), id, EXPERTS).to(tl.int32)
    return tl.where(slot < slots, expert, EXPERTS + 1)


@triton.jit
def _place(order_ptr, inverse_ptr, slot, slots, expert, position, EXPERTS: tl.constexpr):
    tl.store(order_ptr + position, slot, mask=slot < slots)
    tl.store(inverse_ptr + slot, tl.where(expert == EXPERTS, -1, position), mask=slot < slots)


@triton.jit(do_not_specialize=["slots", "slot_programs"])
def moe_plan_fwd_all_pairs_kernel(
    ids_ptr,
    order_ptr,
    inverse_ptr,
    offsets_ptr,
    slots,
    slot_programs,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    program = tl.program_id(0)
    if program < slot_programs:
        slot = program * BLOCK + tl.arange(0, BLOCK)
        expert = _experts_of(ids_ptr, slot, slots, EXPERTS)  # [BLOCK]
        position = tl.zeros([BLOCK], tl.int32)
        for start in range(0, slots, BLOCK_INNER):
            other = start + tl.arange(0, BLOCK_INNER)
            theirs = _experts_of(ids_ptr, other, slots, EXPERTS)  # [INNER]
            before = (theirs[None, :] == expert[:, None]) & (other[None, :] < slot[:, None])
            before = before | (theirs[None, :] < expert[:, None])
            position += tl.sum(before.to(tl.int32), axis=1)
        _place(order_ptr, inverse_ptr, slot, slots, expert, position, EXPERTS)
    else:
        bound = (program - slot_programs) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] experts
        smaller = tl.zeros([BLOCK], tl.int32)
        for start in range(0, slots, BLOCK_INNER):
            theirs = _experts_of(ids_ptr, start + tl.arange(0, BLOCK_INNER), slots, EXPERTS)
            smaller += tl.sum((theirs[None, :] < bound[:, None]).to(tl.int32), axis=1)
        tl.store(offsets_ptr + bound, smaller, mask=bound <= EXPERTS)


@triton.jit(do_not_specialize=["slots", "chunks"])
def moe_plan_fwd_count_kernel(
    ids_ptr,
    counts_ptr,
    slots,
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """counts [E + 1, chunks]: slots of each expert in each chunk."""
    chunk = tl.program_id(0)
    expert = _experts_of(ids_ptr, chunk * BLOCK + tl.arange(0, BLOCK), slots, EXPERTS)  # [BLOCK]
    for start in range(0, EXPERTS + 1, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[None, :] == e[:, None]).to(tl.int32), axis=1)  # [BLOCK_E]
        tl.store(counts_ptr + e.to(tl.int64) * chunks + chunk, count, mask=e <= EXPERTS)


@triton.jit(do_not_specialize=["chunks"])
def moe_plan_fwd_scan_kernel(counts_ptr, totals_ptr, chunks, BLOCK: tl.constexpr):
    """Exclusive scan over the chunks of one expert, in place."""
    expert = tl.program_id(0)
    row = counts_ptr + expert.to(tl.int64) * chunks
    total = tl.zeros([], tl.int32)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(row + at, mask=at < chunks, other=0)
        tl.store(row + at, total + tl.cumsum(count, axis=0) - count, mask=at < chunks)
        total += tl.sum(count, axis=0)
    tl.store(totals_ptr + expert, total)


@triton.jit(do_not_specialize=["slots", "chunks"])
def moe_plan_fwd_place_kernel(
    ids_ptr,
    counts_ptr,
    totals_ptr,
    order_ptr,
    inverse_ptr,
    offsets_ptr,
    slots,
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    program = tl.program_id(0)
    if program < chunks:
        slot = program * BLOCK + tl.arange(0, BLOCK)
        expert = _experts_of(ids_ptr, slot, slots, EXPERTS)  # [BLOCK]
        known = expert <= EXPERTS
        position = tl.load(counts_ptr + expert.to(tl.int64) * chunks + program, mask=known, other=0)
        for start in range(0, BLOCK, BLOCK_INNER):
            other = program * BLOCK + start + tl.arange(0, BLOCK_INNER)
            theirs = _experts_of(ids_ptr, other, slots, EXPERTS)
            before = (theirs[None, :] == expert[:, None]) & (other[None, :] < slot[:, None])
            position += tl.sum(before.to(tl.int32), axis=1)
        for start in range(0, EXPERTS + 1, BLOCK_INNER):
            e = start + tl.arange(0, BLOCK_INNER)
            total = tl.load(totals_ptr + e, mask=e <= EXPERTS, other=0)  # [INNER]
            position += tl.sum(tl.where(e[None, :] < expert[:, None], total[None, :], 0), axis=1)
        _place(order_ptr, inverse_ptr, slot, slots, expert, position, EXPERTS)
    else:
        bound = (program - chunks) * BLOCK + tl.arange(0, BLOCK)
        smaller = tl.zeros([BLOCK], tl.int32)
        for start in range(0, EXPERTS + 1, BLOCK_INNER):
            e = start + tl.arange(0, BLOCK_INNER)
            total = tl.load(totals_ptr + e, mask=e <= EXPERTS, other=0)
            smaller += tl.sum(tl.where(e[None, :] < bound[:, None], total[None, :], 0), axis=1)
        tl.store(offsets_ptr + bound, smaller, mask=bound <= EXPERTS)


@dataclass(frozen=True)
class Config:
    """Slots per program and per inner step."""

    block: int
    block_inner: int
    num_warps: int


def config(slots: int) -> Config:
    """Small programs where one launch does it all; of the large ones 8 warps would spill under Triton 3.9."""
    return Config(128, 32, 4) if slots <= ALL_PAIRS_SLOTS else Config(512, 32, 16)


def moe_plan_fwd(ids, num_experts):
    slots = ids.numel()
    order, inverse = (ids.new_empty((slots,), dtype=torch.int32) for _ in range(2))
    offsets = ids.new_empty((num_experts + 1,), dtype=torch.int32)
    tile = config(slots)
    programs = triton.cdiv(slots, tile.block)
    grid = (programs + triton.cdiv(num_experts + 1, tile.block),)
    with on_device(ids):
        if slots <= ALL_PAIRS_SLOTS:
            moe_plan_fwd_all_pairs_kernel[grid](
                ids, order, inverse, offsets, slots, programs, EXPERTS=num_experts, **constants(tile)
            )
            return order, inverse, offsets
        counts = ids.new_empty((num_experts + 1, programs), dtype=torch.int32)
        totals = ids.new_empty((num_experts + 1,), dtype=torch.int32)
        moe_plan_fwd_count_kernel[(programs,)](
            ids, counts, slots, programs, EXPERTS=num_experts, BLOCK=tile.block, BLOCK_E=32, num_warps=tile.num_warps
        )
        moe_plan_fwd_scan_kernel[(num_experts + 1,)](counts, totals, programs, BLOCK=1024, num_warps=4)
        moe_plan_fwd_place_kernel[grid](
            ids, counts, totals, order, inverse, offsets, slots, programs, EXPERTS=num_experts, **constants(tile)
        )
    return order, inverse, offsets


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for tokens in (16, 8192):
        yield AotCase(f"t{tokens}", call("moe_plan", tensor("i32", tokens, 8), 256))
