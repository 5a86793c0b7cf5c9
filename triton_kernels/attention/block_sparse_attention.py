"""Block-sparse attention: forward and dq walk the lists of a block of queries, dk and dv the transposed lists.

A listed block is visited in pieces; blocks and pieces are one loop, so that loads of the next piece run ahead of the
products of this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common.flash import (
    LOG2E,
    Config,
    Results,
    Width,
    constants_of,
    dkdv_step,
    dots,
    dq_step,
    head_of,
    load_head,
    logits,
    padded,
    row_gradients,
    scaled,
    softmax_end,
    softmax_start,
    softmax_step,
    store_head,
    values_of,
    zeros,
)
from ..common.launch import launch_options, on_device
from ..common.rows import Rows
from .host import transpose_lists, unexpanded

COUNTS = ("sq", "sk", "heads", "kv_heads", "group", "rows", "columns", "entries", "list_batch", "list_head")


class Constants(NamedTuple):
    """Constants of one compiled kernel."""

    QK: Width
    V: Width
    BLOCK: Any
    BLOCK_M: Any
    BLOCK_N: Any
    MASKED: Any
    CAUSAL: Any
    DLSE: Any


class Lists(NamedTuple):
    """Which blocks each block sees: index[offsets[i] : offsets[i + 1]]."""

    offsets: Any  # [B or 1, H or 1, blocks + 1]
    index: Any


@triton.jit
def _list(lists, at, entries):
    """First and last entry of a list, kept inside of the index."""
    at += lists.offsets
    start = tl.minimum(tl.maximum(tl.load(at).to(tl.int64), 0), entries)
    stop = tl.minimum(tl.maximum(tl.load(at + 1).to(tl.int64), start), entries)
    return start, stop


@triton.jit
def _piece(lists, start, step, blocks, limit, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Tokens of one piece of a listed block, and which of them exist."""
    pieces: tl.constexpr = (BLOCK + SIZE - 1) // SIZE
    entry = step // pieces
    block = tl.load(lists.index + start + entry).to(tl.int32)
    within = (step - entry * pieces) * SIZE + tl.arange(0, SIZE)
    token = block * BLOCK + within
    return token, (within < BLOCK) & (block >= 0) & (block < blocks) & (token < limit)


@triton.jit
def _own_piece(heads, blocks, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """(batch, head, block, tokens, which belong to the block) of this program; heads run fastest."""
    pid = tl.program_id(0)
    pieces: tl.constexpr = (BLOCK + SIZE - 1) // SIZE
    block = pid // heads // pieces % blocks
    within = pid // heads % pieces * SIZE + tl.arange(0, SIZE)
    b = (pid // heads // pieces // blocks).to(tl.int64)
    return b, pid % heads, block, block * BLOCK + within, within < BLOCK


@triton.jit
def _shown(mask_ptr, b, sk, n, valid, MASKED: tl.constexpr):
    """Which of the valid keys are not padding."""
    if MASKED:
        return valid & (tl.load(mask_ptr + b * sk + n, mask=valid, other=0) != 0)
    else:
        return valid


@triton.jit
def _scores(products, m, n, visible, delta, scale, CAUSAL: tl.constexpr):
    """Base-2 logits of raw dot products; m, n and visible are broadcast already."""
    s, _ = logits(products, scale, 0.0, False)
    s = tl.where(visible, s, float("-inf"))
    if CAUSAL:
        s = tl.where(n <= m + delta, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_attention_fwd_kernel(
    q_rows,
    k_rows,
    v_rows,
    out_rows,
    lse_ptr,
    lists,
    mask_ptr,
    sq,
    sk,
    heads,
    group,
    rows,
    columns,
    entries,
    list_batch,
    list_head,
    scale,
    C,
):
    b, h, i, m, live = _own_piece(heads, rows, C.BLOCK, C.BLOCK_M)
    live &= m < sq
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    k_head = head_of(k_rows, b, 0, kv)
    v_head = head_of(v_rows, b, 0, kv)
    start, stop = _list(lists, b * list_batch + head * list_head + i, entries)
    q = load_head(head_of(q_rows, b, 0, head), m, live, C.QK, True)  # [BLOCK_M, D]
    top, total = softmax_start(0.0, C.BLOCK_M, False)
    acc = zeros(C.BLOCK_M, C.V)
    steps = (stop - start).to(tl.int32) * tl.cdiv(C.BLOCK, C.BLOCK_N)
    for step in tl.range(0, steps):
        n, valid = _piece(lists, start, step, columns, sk, C.BLOCK, C.BLOCK_N)
        valid = _shown(mask_ptr, b, sk, n, valid, C.MASKED)
        k = load_head(k_head, n, valid, C.QK, True)  # [BLOCK_N, D]
        s = _scores(dots(q, k), m[:, None], n[None, :], valid[None, :], sk - sq, scale, C.CAUSAL)
        v = load_head(v_head, n, valid, C.V, True)  # [BLOCK_N, DV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    out, lse = softmax_end(acc, top, total)
    store_head(head_of(out_rows, b, 0, head), m, live, out, C.V)
    tl.store(values_of(lse_ptr, b, 0, head, heads, sq) + m, lse, mask=live)


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_attention_bwd_q_kernel(
    q_rows,
    k_rows,
    v_rows,
    results,
    dq_rows,
    lists,
    mask_ptr,
    sq,
    sk,
    heads,
    group,
    rows,
    columns,
    entries,
    list_batch,
    list_head,
    scale,
    C,
):
    """dq of one piece of queries; also writes delta, which the pass over keys reads."""
    b, h, i, m, live = _own_piece(heads, rows, C.BLOCK, C.BLOCK_M)
    live &= m < sq
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    k_head = head_of(k_rows, b, 0, kv)
    v_head = head_of(v_rows, b, 0, kv)
    start, stop = _list(lists, b * list_batch + head * list_head + i, entries)
    q = load_head(head_of(q_rows, b, 0, head), m, live, C.QK, True)  # [BLOCK_M, D]
    do, delta, lse2 = row_gradients(results, b, 0, head, heads, sq, m, live, C.V, C.DLSE)
    tl.store(values_of(results.delta, b, 0, head, heads, sq) + m, delta, mask=live)
    dq = zeros(C.BLOCK_M, C.QK)
    steps = (stop - start).to(tl.int32) * tl.cdiv(C.BLOCK, C.BLOCK_N)
    for step in tl.range(0, steps):
        n, valid = _piece(lists, start, step, columns, sk, C.BLOCK, C.BLOCK_N)
        valid = _shown(mask_ptr, b, sk, n, valid, C.MASKED)
        k = load_head(k_head, n, valid, C.QK, True)  # [BLOCK_N, D]
        s = _scores(dots(q, k), m[:, None], n[None, :], valid[None, :], sk - sq, scale, C.CAUSAL)
        v = load_head(v_head, n, valid, C.V, True)  # [BLOCK_N, DV]
        dq = dq_step(dq, k, v, do, s, s, lse2, delta, False)
    store_head(head_of(dq_rows, b, 0, head), m, live, scaled(dq, scale), C.QK)


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_attention_bwd_kv_kernel(
    q_rows,
    k_rows,
    v_rows,
    results,
    dk_rows,
    dv_rows,
    lists,
    mask_ptr,
    sq,
    sk,
    kv_heads,
    group,
    rows,
    columns,
    entries,
    list_batch,
    list_head,
    scale,
    C,
):
    """dk and dv of one piece of keys. ``rows`` and ``columns`` are query and key blocks, the lists transposed ones."""
    b, kv, j, n, valid = _own_piece(kv_heads, columns, C.BLOCK, C.BLOCK_N)
    valid &= n < sk
    shown = _shown(mask_ptr, b, sk, n, valid, C.MASKED)
    kv_head = kv.to(tl.int64)
    k = load_head(head_of(k_rows, b, 0, kv_head), n, shown, C.QK, True)  # [BLOCK_N, D]
    v = load_head(head_of(v_rows, b, 0, kv_head), n, shown, C.V, True)  # [BLOCK_N, DV]
    dk = zeros(C.BLOCK_N, C.QK)
    dv = zeros(C.BLOCK_N, C.V)
    for g in range(group):
        head = (kv * group + g).to(tl.int64)
        start, stop = _list(lists, b * list_batch + head * list_head + j, entries)
        q_head = head_of(q_rows, b, 0, head)
        do_head = head_of(results.dout, b, 0, head)
        lse_ptr = values_of(results.lse, b, 0, head, kv_heads * group, sq)
        delta_ptr = values_of(results.delta, b, 0, head, kv_heads * group, sq)
        steps = (stop - start).to(tl.int32) * tl.cdiv(C.BLOCK, C.BLOCK_M)
        for step in tl.range(0, steps):
            m, live = _piece(lists, start, step, rows, sq, C.BLOCK, C.BLOCK_M)
            q = load_head(q_head, m, live, C.QK, True)  # [BLOCK_M, D]
            lse2 = tl.load(lse_ptr + m, mask=live, other=float("-inf")) * LOG2E
            delta = tl.load(delta_ptr + m, mask=live, other=0.0)
            visible = shown[:, None] & live[None, :]
            s = _scores(dots(k, q), m[None, :], n[:, None], visible, sk - sq, scale, C.CAUSAL)  # [BLOCK_N, BLOCK_M]
            do = load_head(do_head, m, live, C.V, True)  # [BLOCK_M, DV]
            dk, dv = dkdv_step(dk, dv, q, v, do, s, s, lse2, delta, False)
    store_head(head_of(dk_rows, b, 0, kv_head), n, valid, scaled(dk, scale), C.QK)
    store_head(head_of(dv_rows, b, 0, kv_head), n, valid, dv, C.V)


def _within(block_size: int, m: int, n: int, num_warps: int, num_stages: int) -> Config:
    """Pieces no larger than a block needs."""
    whole = max(16, triton.next_power_of_2(block_size))
    return Config(min(m, whole), min(n, whole), num_warps, num_stages)


def fwd_config(head_dim: int, element_size: int, block_size: int, target: str) -> Config:
    if element_size > 2:
        return _within(block_size, 32 if head_dim <= 64 else 16, 16, 4, 1)
    small = arch.capability(target) in (89, 120)
    if head_dim > 128:
        return _within(block_size, 64, 32, 8 if small else 4, 2)
    stages = 3 if head_dim <= 64 else 2
    if block_size < 128:
        stages = 1 if head_dim > 64 and target.startswith("gfx") else stages
        return _within(block_size, 64, 64, 4 if head_dim <= 64 else 8, stages)
    return _within(block_size, 128, 64, 8, stages)


def dq_config(head_dim: int, element_size: int, block_size: int, target: str) -> Config:
    if element_size > 2:
        return _within(block_size, 32, 16, 4, 1) if head_dim <= 64 else _within(block_size, 16, 16, 8, 1)
    if head_dim > 128:
        return _within(block_size, 32, 32, 4, 1)
    return _within(block_size, 64, 64, 4, 2) if head_dim <= 64 else _within(block_size, 64, 32, 8, 2)


def dkdv_config(head_dim: int, element_size: int, block_size: int, target: str) -> Config:
    if element_size > 2:
        return _within(block_size, 32 if head_dim <= 64 else 16, 16, 4, 1)
    if head_dim > 128:
        return _within(block_size, 16 if target.startswith("gfx") else 32, 32, 8, 1)
    if head_dim > 64:
        return _within(block_size, 32, 64, 8, 1)
    return _within(block_size, 32, 64, 8 if arch.capability(target) in (89, 120) else 4, 2)


@dataclass(frozen=True)
class Problem:
    """One call's tensors and options, shared by its kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    row_offsets: Tensor
    col_index: Tensor
    key_mask: Tensor | None
    block_size: int
    causal: bool
    scale: float

    @property
    def rows(self) -> tuple[Rows, Rows, Rows]:
        return Rows.of(self.q), Rows.of(self.k), Rows.of(self.v)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return tuple(triton.cdiv(x.shape[1], self.block_size) for x in (self.q, self.k))

    @property
    def lists(self) -> Lists:
        return Lists(self.row_offsets, self.col_index)

    def counts(self, lists: Lists, heads: int) -> tuple[Tensor | int | float | None, ...]:
        """The mask, the sizes, heads that programs run over (of q or of k), those of the lists, the scale."""
        sizes = (self.q.shape[1], self.k.shape[1], heads, self.q.shape[2] // self.k.shape[2], *self.blocks)
        # 0 where batches or heads share their lists
        strides = (0 if lists.offsets.shape[dim] == 1 else lists.offsets.stride(dim) for dim in (0, 1))
        return self.key_mask, *sizes, lists.index.shape[0], *strides, self.scale

    def config(self, choose: Callable[[int, int, int, str], Config], dlse: bool = False) -> tuple[Config, Constants]:
        d, dv = self.q.shape[-1], self.v.shape[-1]
        tile = choose(max(padded(d), padded(dv)), self.q.element_size(), self.block_size, arch.of(self.q.device))
        flags = (self.key_mask is not None, self.causal, dlse)
        return tile, constants_of(Constants, d, dv, self.block_size, tile.block_m, tile.block_n, *flags)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    col_index: Tensor,
    key_mask: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
) -> Problem:
    row_offsets = unexpanded(row_offsets)
    row_offsets, col_index = row_offsets.contiguous(), col_index.contiguous()
    key_mask = key_mask if key_mask is None else key_mask.contiguous()
    return Problem(q, k, v, row_offsets, col_index, key_mask, block_size, causal, scale)


def block_sparse_attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    problem = _problem(q, k, v, *options)
    batch, sq, heads, _ = q.shape
    out = torch.empty((batch, sq, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, sq), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile, compiled = problem.config(fwd_config)
    programs = batch * problem.blocks[0] * triton.cdiv(problem.block_size, tile.block_m) * heads
    lists = problem.lists
    with on_device(q):
        block_sparse_attention_fwd_kernel[(programs,)](
            *problem.rows, Rows.of(out), lse, lists, *problem.counts(lists, heads), compiled, **launch_options(tile)
        )
    return out, lse


def block_sparse_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, *options)
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    results = Results.of(out, dout, lse, dlse, delta)
    rows, outs, lists = (*problem.rows, results), (Rows.of(dk), Rows.of(dv)), problem.lists
    if dq.numel():
        tile, compiled = problem.config(dq_config, dlse is not None)
        programs = batch * problem.blocks[0] * triton.cdiv(problem.block_size, tile.block_m) * heads
        with on_device(q):
            block_sparse_attention_bwd_q_kernel[(programs,)](
                *rows, Rows.of(dq), lists, *problem.counts(lists, heads), compiled, **launch_options(tile)
            )
    if dk.numel():
        tile, compiled = problem.config(dkdv_config)
        lists = Lists(*transpose_lists(lists.offsets, lists.index, problem.blocks[1]))
        programs = batch * problem.blocks[1] * triton.cdiv(problem.block_size, tile.block_n) * kv_heads
        with on_device(q):
            block_sparse_attention_bwd_kv_kernel[(programs,)](
                *rows, *outs, lists, *problem.counts(lists, kv_heads), compiled, **launch_options(tile)
            )
    return dq, dk, dv


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype, d, block, extra in (
        ("bf16", 128, 128, False),
        ("bf16", 64, 64, False),
        ("bf16", 64, 128, True),
        ("bf16", 128, 64, True),
        ("fp16", 128, 128, False),
        ("bf16", 256, 64, False),
        ("fp32", 64, 64, True),
        ("fp32", 128, 64, False),
    ):
        x, rows = [tensor(dtype, 2, 4096, 16, d) for _ in range(3)], 4096 // block
        mask = tensor("bool", 2, 4096) if extra else None
        lists = (tensor("i32", 1, 1, rows + 1), tensor("i32", 8 * rows), mask)
        options = {"block_size": block, "causal": extra, "outputs": None if extra else 1}
        yield AotCase(
            f"{dtype}_d{d}_block{block}{'_masked' * extra}",
            train("block_sparse_attention", *x, *lists, **options),
            expect=("MMA",) if dtype != "fp32" else (),
        )
