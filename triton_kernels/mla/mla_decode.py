"""Split-KV attention of absorbed queries over the latent cache, and the combination of the splits.

One program takes a tile of (query, head) rows of one sequence and one split of its keys. A key row is loaded once and
serves as key (all of it) and as value (its latent part). Sparse decode is the same kernel with a list of slots in
place of the page table.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common import fp8, tuned
from ..common.flash import LOG2E, Config, softmax_start, softmax_step
from ..common.launch import constants, on_device
from .host import layout as layouts
from .mla_gather_kv import cache_parts, dequantize, load_scales, rope_vector

# sequences that splits are balanced over; a larger batch fills a GPU without splits
MAX_BALANCED = tl.constexpr(1024)


class Constants(NamedTuple):
    """What both kernels are compiled for."""

    HEADS: tl.constexpr
    PAGE_SIZE: tl.constexpr
    SPARSE: tl.constexpr  # lists of slots in place of the page table
    BALANCE: tl.constexpr  # splits are shared out by the lengths
    CAUSAL: tl.constexpr
    DIRECT: tl.constexpr  # one split, whose result is the output
    FP8: tl.constexpr
    NATIVE: tl.constexpr
    ROPE_VEC: tl.constexpr
    RANK: tl.constexpr
    RANK_PAD: tl.constexpr
    ROPE: tl.constexpr
    ROPE_PAD: tl.constexpr


@functools.lru_cache
def compiled_for(*values: int | bool) -> Constants:
    return Constants(*map(tl.constexpr, values))


@triton.jit
def _key_span(length, queries, window, SPARSE: tl.constexpr):
    """The first key that any query row of a sequence may see; the last is ``length - 1``."""
    first = length * 0
    if not SPARSE:
        first = tl.where(window >= 0, tl.maximum(length - queries - window, 0), first)
    return first


@triton.jit
def _split_size(
    span,
    seq_lens_ptr,
    batch,
    queries,
    window,
    capacity,
    num_splits,
    target,
    BALANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys per split of one sequence, a multiple of BLOCK_N.

    BALANCE: as many splits as make ``target`` programs of about equal work out of the whole batch, ``num_splits`` at
    most. Otherwise ``num_splits``, whatever else is in the batch.
    """
    size = tl.cdiv(span, num_splits)
    if BALANCE:
        # one vector instead of a loop: after a loop, Triton 3.7 no longer sees that the rows of keys are aligned
        index = tl.arange(0, MAX_BALANCED)
        length = tl.load(seq_lens_ptr + index, mask=index < batch, other=0).to(tl.int64)
        length = tl.minimum(tl.maximum(length, 0), capacity)
        length = tl.where(window >= 0, tl.minimum(length, queries + window), length)
        size = tl.maximum(size, tl.cdiv(tl.sum(length), target))
        # a shorter split costs more in the combination than it saves
        size = tl.maximum(size, 4 * BLOCK_N)
    return tl.maximum(tl.cdiv(size, BLOCK_N), 1) * BLOCK_N


@triton.jit
def _sequence_length(seq_lens_ptr, b, capacity, SPARSE: tl.constexpr):
    length = capacity
    if not SPARSE:
        length = tl.minimum(tl.maximum(tl.load(seq_lens_ptr + b).to(tl.int64), 0), capacity)
    return length


COUNTS = ("batch", "queries", "columns", "num_splits", "max_splits", "target", "window")


@triton.jit(do_not_specialize=[*COUNTS, "pages", "table_batch", "table_query"])
def mla_decode_fwd_kernel(
    q_ptr,
    latent_ptr,
    scales_ptr,
    rotated_ptr,
    table_ptr,
    seq_lens_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    softmax_scale,
    batch,
    queries,
    columns,
    pages,
    window,
    num_splits,
    max_splits,
    target,
    q_batch,
    q_query,
    q_head,
    latent_page,
    latent_row,
    scale_page,
    scale_row,
    rotated_page,
    rotated_row,
    table_batch,
    table_query,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    split = pid % max_splits
    pid = pid // max_splits
    rows = C.HEADS if C.SPARSE else queries * C.HEADS
    tiles = tl.cdiv(rows, BLOCK_M)
    m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (pid // tiles).to(tl.int64)
    live = m < rows
    head = m % C.HEADS
    # sparse: b counts (sequence, query) pairs and every pair has its own list of slots
    if C.SPARSE:
        query = tl.zeros_like(m) + (b % queries).to(tl.int32)
        sequence = b // queries
        table_ptr += sequence * table_batch + (b % queries) * table_query
        capacity = columns.to(tl.int64)
    else:
        query = m // C.HEADS
        sequence = b
        table_ptr += sequence * table_batch
        capacity = columns.to(tl.int64) * C.PAGE_SIZE
    length = _sequence_length(seq_lens_ptr, b, capacity, C.SPARSE)
    first = _key_span(length, queries, window, C.SPARSE)
    size = _split_size(
        length - first, seq_lens_ptr, batch, queries, window, capacity, num_splits, target, C.BALANCE, BLOCK_N
    )
    start = first + split * size
    stop = tl.minimum(start + size, length)
    # out and the partial results are [b, m, split, R]
    at = ((b * rows + m) * max_splits + split) * C.RANK
    column = tl.arange(0, C.RANK_PAD)
    column_r = tl.arange(0, C.ROPE_PAD)
    if C.DIRECT or start < length:
        keep = live[:, None] & (column < C.RANK)[None, :]
        q_row = q_ptr + sequence * q_batch + query.to(tl.int64) * q_query + head.to(tl.int64) * q_head
        q_latent = tl.load(q_row[:, None] + column[None, :], mask=keep, other=0.0)  # [BLOCK_M, R]
        if C.ROPE > 0:
            keep_r = live[:, None] & (column_r < C.ROPE)[None, :]
            q_rope = tl.load(q_row[:, None] + C.RANK + column_r[None, :], mask=keep_r, other=0.0)  # [BLOCK_M, r]
        # the newest key is the last query row's own
        own = length - queries + query  # [BLOCK_M]
        if C.SPARSE or not C.CAUSAL:
            last = tl.zeros([BLOCK_M], tl.int64) + length
        else:
            last = own + 1
        lowest = tl.zeros([BLOCK_M], tl.int64)
        if not C.SPARSE:
            lowest = tl.where(window >= 0, own - window, lowest)
        scale2 = softmax_scale * LOG2E
        top, total = softmax_start(0.0, BLOCK_M, False)
        acc = (tl.zeros([BLOCK_M, C.RANK_PAD], tl.float32),)
        for key_start in range(start, stop, BLOCK_N):
            key = key_start + tl.arange(0, BLOCK_N)
            exists = key < stop
            if C.SPARSE:
                slot = tl.load(table_ptr + key, mask=exists, other=-1).to(tl.int64)
                page = slot // C.PAGE_SIZE
                offset = slot % C.PAGE_SIZE
                exists &= slot >= 0
            else:
                page = tl.load(table_ptr + key // C.PAGE_SIZE, mask=exists, other=-1).to(tl.int64)
                offset = key % C.PAGE_SIZE
            # an entry outside of the pool is a key that does not exist: never dereferenced
            exists &= (page >= 0) & (page < pages)
            page = tl.where(exists, page, 0)
            offset = tl.where(exists, offset, 0)
            k_row = latent_ptr + page * latent_page + offset * latent_row
            inside = exists[:, None] & (column < C.RANK)[None, :]
            k = tl.load(k_row[:, None] + column[None, :], mask=inside, other=0)  # [BLOCK_N, R]
            if C.FP8:
                s_row = scales_ptr + page * scale_page + offset * scale_row
                scale = load_scales(s_row, exists, C.RANK, C.RANK_PAD)
                k = dequantize(k, scale, C.NATIVE, C.RANK_PAD).to(q_latent.dtype)
            scores = tl.dot(q_latent, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if C.ROPE > 0:
                r_row = rotated_ptr + (page * rotated_page + offset * rotated_row) * C.ROPE_VEC
                inside_r = exists[:, None] & (column_r < C.ROPE)[None, :]
                k_rope = tl.load(r_row[:, None] + column_r[None, :], mask=inside_r, other=0.0)  # [BLOCK_N, r]
                scores += tl.dot(q_rope, tl.trans(k_rope.to(q_rope.dtype)), input_precision="ieee")
            visible = exists[None, :] & (key[None, :] < last[:, None]) & (key[None, :] >= lowest[:, None])
            scores = tl.where(visible, scores * scale2, float("-inf"))
            acc, top, total = softmax_step(acc, top, total, scores, (k,))
        base = tl.where(top == float("-inf"), 0.0, top)
        if C.DIRECT:
            divisor = total
            if sinks_ptr is not None:
                divisor += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E - base)
            divisor = tl.where(total == 0.0, 1.0, divisor)
            at_lse = (sequence * C.HEADS + head) * queries + query
            value = tl.where(total == 0.0, float("-inf"), (base + tl.log2(total)) / LOG2E)
            tl.store(lse_ptr + at_lse, value, mask=live)
        else:
            # partial statistics stay in base 2: [b, m, split]
            divisor = tl.where(total == 0.0, 1.0, total)
            value = tl.where(total == 0.0, float("-inf"), base + tl.log2(total))
            tl.store(lse_ptr + (b * rows + m) * max_splits + split, value, mask=live)
        acc = acc[0] / divisor[:, None]
        tl.store(out_ptr + at[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=COUNTS)
def mla_decode_fwd_merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    seq_lens_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    batch,
    queries,
    columns,
    window,
    num_splits,
    max_splits,
    target,
    C,
    BLOCK_N: tl.constexpr,
):
    """One row of the output: its splits in their order."""
    row = tl.program_id(0).to(tl.int64)
    rows = C.HEADS if C.SPARSE else queries * C.HEADS
    b = row // rows
    m = row % rows
    head = m % C.HEADS
    if C.SPARSE:
        query = b % queries
        sequence = b // queries
        capacity = columns.to(tl.int64)
    else:
        query = m // C.HEADS
        sequence = b
        capacity = columns.to(tl.int64) * C.PAGE_SIZE
    length = _sequence_length(seq_lens_ptr, b, capacity, C.SPARSE)
    first = _key_span(length, queries, window, C.SPARSE)
    size = _split_size(
        length - first, seq_lens_ptr, batch, queries, window, capacity, num_splits, target, C.BALANCE, BLOCK_N
    )
    splits = tl.cdiv(length - first, size)
    column = tl.arange(0, C.RANK_PAD)
    inside = column < C.RANK
    top = float("-inf")
    for split in range(splits):
        top = tl.maximum(top, tl.load(partial_lse_ptr + row * max_splits + split))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([C.RANK_PAD], tl.float32)
    for split in range(splits):
        weight = tl.exp2(tl.load(partial_lse_ptr + row * max_splits + split) - base)
        values = tl.load(partial_ptr + (row * max_splits + split) * C.RANK + column, mask=inside, other=0.0)  # [R]
        total += weight
        acc += weight * values
    divisor = total
    if sinks_ptr is not None:
        divisor += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E - base)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, divisor)
    tl.store(out_ptr + row * C.RANK + column, acc.to(out_ptr.dtype.element_ty), mask=inside)
    value = tl.where(empty, float("-inf"), (base + tl.log2(total)) / LOG2E)
    tl.store(lse_ptr + (sequence * C.HEADS + head) * queries + query, value)


def config(rows: int, rank: int, itemsize: int, is_fp8: bool, sparse: bool, target: str) -> Config:
    """No more query rows than there are.

    The accumulator is BLOCK_M x R float32: 64 x 512 takes 128 registers of each of 256 threads. Shared memory holds two
    steps of keys, which leaves sm_89 and sm_120 (99 KiB) no room for more than 32 rows; on sm_100, and with the slots
    of sparse decode, more rows spill, and so do longer steps on AMD.
    Three stages, because keys are found through the page table: one for its entry, one for the row.
    """
    capability, amd = arch.capability(target), target.startswith("gfx")
    if rank > 512 and itemsize == 2:
        # twice the accumulator and twice the keys
        large = arch.SHARED_MEMORY.get(target, 0) > 128 * 1024
        stages = 2 if amd else 3 if large or not is_fp8 else 1
        return Config(16, 32 if large and not is_fp8 else 16, 8, stages)
    if itemsize > 2:
        return Config(16, 16, 4 if amd else 8, 1)
    block_n = 16 if amd else 32
    if is_fp8:
        # codes are widened in registers: only sm_90, whose products read shared memory, has room for a large tile
        return Config(64 if capability == 90 and rows > 32 and not sparse else 16, block_n, 8, 3)
    block_m = min(64 if capability in (80, 90) and not sparse else 32, max(16, triton.next_power_of_2(rows)))
    return Config(block_m, block_n, 8 if block_m * triton.next_power_of_2(rank) >= 16384 else 4, 3)


# what `python -m tilefuse tune` tries
CONFIGS = {
    "mla_decode": tuple(
        {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
        for block_m, warps in ((16, 4), (16, 8), (32, 4), (32, 8), (64, 8))
        for block_n, stages in ((16, 4), (32, 2), (32, 3), (64, 2))
    )
}


def plan(batch: int, tiles: int, capacity: int, num_splits: int, block_n: int, processors: int) -> tuple[int, int, int]:
    """``(num_splits, max_splits, target)`` for the kernels.

    ``max_splits`` sizes the grid and the partial results: it comes from shapes alone, so the host never waits for
    lengths. With ``num_splits`` = 0 the kernels share ``target`` programs out by the lengths.
    """
    possible = max(1, -(-capacity // block_n))
    if num_splits > 0:
        splits = min(num_splits, possible)
        return splits, splits, 0
    target = max(1, 2 * processors // tiles)
    longest = max(1, -(-capacity // (4 * block_n)))
    splits = min(longest, max(1, -(-2 * target // max(1, batch)))) if batch <= MAX_BALANCED.value else 1
    return splits, splits, 0 if splits == 1 else target


# listed keys per split of sparse decode
SPARSE_SPLIT = 512


def processors_of(tensor: Tensor) -> int:
    if tensor.device.type != "cuda":
        return 8
    return arch.multiprocessors(tensor.device)


def attend(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    seq_lens: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
    window: int,
    layout: str,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Launches both kernels; ``seq_lens`` None means that ``table`` [B, Sq, topk] lists slots."""
    sparse = seq_lens is None
    row = layouts.row_layout(layout, kv_lora_rank, cache.shape[-1])
    batch, queries, heads, _ = q.shape
    out = torch.empty(batch, queries, heads, row.rank, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    if cache.numel() == 0 or table.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    latent, scales, rotated = cache_parts(cache, row)
    rope_vec = rope_vector(rotated)
    page_size = cache.shape[1]
    columns = table.shape[-1]
    capacity = columns if sparse else columns * page_size
    rows = heads if sparse else queries * heads
    sequences = batch * queries if sparse else batch
    tile = config(rows, row.rank, q.element_size(), row.is_fp8, sparse, arch.of(q.device))
    key = f"rows<={min(64, triton.next_power_of_2(rows))},rank={row.rank},layout={layout},sparse={sparse}"
    tile = tuned.choose("mla_decode", key, q.device, tile)
    tiles = triton.cdiv(rows, tile.block_m)
    if sparse:
        # from the length of the lists alone, so that a result does not depend on the batch
        num_splits = triton.cdiv(capacity, SPARSE_SPLIT)
    splits, max_splits, target = plan(batch, tiles, capacity, num_splits, tile.block_n, processors_of(q))
    # the epilogue of the largest tile has no registers left for the sinks: it always goes through the combination
    direct = max_splits == 1 and tile.block_m < 64
    if direct:
        partial, partial_lse = out, lse
    else:
        partial = torch.empty(sequences, rows, max_splits, row.rank, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(sequences, rows, max_splits, dtype=torch.float32, device=q.device)
    compiled = compiled_for(
        heads,
        page_size,
        sparse,
        target > 0,
        causal,
        direct,
        row.is_fp8,
        row.is_fp8 and fp8.native_cast(cache.device),
        rope_vec,
        row.rank,
        triton.next_power_of_2(row.rank),
        row.rope_dim,
        max(16, triton.next_power_of_2(max(1, row.rope_dim))),
    )
    with on_device(q):
        mla_decode_fwd_kernel[(sequences * tiles * max_splits,)](
            q,
            latent,
            scales,
            rotated,
            table,
            seq_lens,
            sinks,
            partial,
            partial_lse,
            softmax_scale,
            batch,
            queries,
            columns,
            cache.shape[0],
            window,
            splits,
            max_splits,
            target,
            *q.stride()[:3],
            *latent.stride()[:2],
            *scales.stride()[:2],
            *(s // rope_vec for s in rotated.stride()[:2]),
            table.stride(0),
            table.stride(1) if sparse else 0,
            compiled,
            **constants(tile),
        )
        if not direct:
            mla_decode_fwd_merge_kernel[(sequences * rows,)](
                partial,
                partial_lse,
                seq_lens,
                sinks,
                out,
                lse,
                batch,
                queries,
                columns,
                window,
                splits,
                max_splits,
                target,
                compiled,
                BLOCK_N=tile.block_n,
                num_warps=4 if row.rank >= 256 else 1,
            )
    return out, lse


def mla_decode_fwd(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
    window: int,
    layout: str,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    return attend(
        q, cache, block_table, seq_lens, sinks, softmax_scale, kv_lora_rank, causal, window, layout, num_splits
    )


def mla_sparse_decode_fwd(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    return attend(q, cache, indices, None, sinks, softmax_scale, kv_lora_rank, False, -1, layout, 0)


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for name, dtype, layout, heads, sparse, batch, rank in (
        ("h16", "bf16", "bf16", 16, False, 8, 512),
        ("h128", "bf16", "bf16", 128, False, 8, 512),
        # so many sequences that none is split
        ("h16_direct", "bf16", "bf16", 16, False, 512, 512),
        ("h16_fp8", "bf16", "fp8", 16, False, 8, 512),
        ("h128_fp8", "bf16", "fp8", 128, False, 8, 512),
        ("h16_float", "fp32", "fp32", 16, False, 8, 512),
        ("sparse_h16_fp8", "bf16", "fp8", 16, True, 8, 512),
        ("sparse_h128", "bf16", "bf16", 128, True, 8, 512),
        ("h32_r256", "bf16", "bf16", 32, False, 8, 256),
        ("h128_r768", "bf16", "bf16", 128, False, 8, 768),
        ("h128_r1024", "bf16", "bf16", 128, False, 8, 1024),
        ("h128_fp8_r1024", "bf16", "fp8", 128, False, 8, 1024),
    ):
        is_fp8 = layout == "fp8"
        row = rank + rank // 32 + 2 * 64 if is_fp8 else rank + 64
        q, cache = tensor(dtype, batch, 1, heads, rank + 64), tensor("u8" if is_fp8 else layout, 4096, 64, row)
        if sparse:
            where, op = (tensor("i32", batch, 1, 2048),), "mla_sparse_decode"
        else:
            where, op = (tensor("i32", batch, 128), tensor("i32", batch)), "mla_decode"
        options = {"softmax_scale": 192**-0.5, "kv_lora_rank": rank, "layout": "fp8" if is_fp8 else "bf16"}
        # of 256 columns a thread merges two
        merged = ("LDG.128",) if rank > 256 else ()
        products = ("LDG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        yield AotCase(
            name,
            call(op, q, cache, *where, **options),
            expect={"nvidia": products, "mla_decode_fwd_merge_kernel": merged},
            allow_spill="an accumulator of 16 x 1024 beside keys of 1024 columns" if rank > 512 else None,
        )
