"""Two attention results over disjoint keys made into one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import constants, on_device

# their last dim is the queries, whose number changes
LSE_STRIDES = ("gl_batch", "gl_head", "la_batch", "la_head", "lb_batch", "lb_head")


@triton.jit
def _merged_weights(lse_a, lse_b):
    """Weight of each side and the merged lse; a side of -inf (or +inf, FlashMLA's mark) is empty."""
    empty = float("-inf")
    lse_a = tl.where(lse_a == float("inf"), empty, lse_a)
    lse_b = tl.where(lse_b == float("inf"), empty, lse_b)
    top = tl.maximum(lse_a, lse_b, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == empty, 0.0, top)
    e_a, e_b = tl.exp(lse_a - base), tl.exp(lse_b - base)
    total = e_a + e_b
    divisor = tl.where(total == 0.0, 1.0, total)
    return e_a / divisor, e_b / divisor, tl.where(total == 0.0, empty, base + tl.log(divisor))


@triton.jit
def _row_of(rows, queries, heads):
    """Row numbers run over [.., S, H]; lse is [.., H, S]: both indices as (batch, query, head)."""
    head = rows % heads
    query = (rows // heads) % queries
    batch = rows // (heads * queries)
    return batch, query, head


@triton.jit(do_not_specialize=["total", "queries", *LSE_STRIDES[2:]])
def merge_attention_fwd_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    total,
    queries,
    heads,
    a_batch,
    a_query,
    a_head,
    b_batch,
    b_query,
    b_head,
    la_batch,
    la_head,
    la_query,
    lb_batch,
    lb_head,
    lb_query,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < total
    batch, query, head = _row_of(rows, queries, heads)
    column = tl.arange(0, D_PAD)
    keep = mask[:, None] & (column < D)[None, :]
    l_a = tl.load(lse_a_ptr + batch * la_batch + head * la_head + query * la_query, mask=mask, other=0.0)  # [BLOCK_M]
    l_b = tl.load(lse_b_ptr + batch * lb_batch + head * lb_head + query * lb_query, mask=mask, other=0.0)
    w_a, w_b, merged = _merged_weights(l_a, l_b)
    # a side of weight 0 may hold anything and is not read
    from_a = out_a_ptr + batch * a_batch + query * a_query + head * a_head
    from_b = out_b_ptr + batch * b_batch + query * b_query + head * b_head
    a = tl.load(from_a[:, None] + column[None, :], mask=keep & (w_a != 0.0)[:, None], other=0.0)  # [BLOCK_M, D]
    b = tl.load(from_b[:, None] + column[None, :], mask=keep & (w_b != 0.0)[:, None], other=0.0)
    value = w_a[:, None] * a.to(tl.float32) + w_b[:, None] * b.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * D + column[None, :], value.to(out_ptr.dtype.element_ty), mask=keep)
    tl.store(lse_ptr + (batch * heads + head) * queries + query, merged, mask=mask)


@triton.jit(do_not_specialize=["total", "queries", *LSE_STRIDES])
def merge_attention_bwd_kernel(
    dout_ptr,
    dlse_ptr,
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    dout_a_ptr,
    dlse_a_ptr,
    dout_b_ptr,
    dlse_b_ptr,
    total,
    queries,
    heads,
    g_batch,
    g_query,
    g_head,
    a_batch,
    a_query,
    a_head,
    b_batch,
    b_query,
    b_head,
    gl_batch,
    gl_head,
    gl_query,
    la_batch,
    la_head,
    la_query,
    lb_batch,
    lb_head,
    lb_query,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < total
    batch, query, head = _row_of(rows, queries, heads)
    column = tl.arange(0, D_PAD)
    keep = mask[:, None] & (column < D)[None, :]
    l_a = tl.load(lse_a_ptr + batch * la_batch + head * la_head + query * la_query, mask=mask, other=0.0)  # [BLOCK_M]
    l_b = tl.load(lse_b_ptr + batch * lb_batch + head * lb_head + query * lb_query, mask=mask, other=0.0)
    dlse = tl.load(dlse_ptr + batch * gl_batch + head * gl_head + query * gl_query, mask=mask, other=0.0)
    w_a, w_b, _ = _merged_weights(l_a, l_b)
    from_a = out_a_ptr + batch * a_batch + query * a_query + head * a_head
    from_b = out_b_ptr + batch * b_batch + query * b_query + head * b_head
    from_g = dout_ptr + batch * g_batch + query * g_query + head * g_head
    # [BLOCK_M, D]
    a = tl.load(from_a[:, None] + column[None, :], mask=keep & (w_a != 0.0)[:, None], other=0.0).to(tl.float32)
    b = tl.load(from_b[:, None] + column[None, :], mask=keep & (w_b != 0.0)[:, None], other=0.0).to(tl.float32)
    dout = tl.load(from_g[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)  # [BLOCK_M, D]
    at = rows[:, None] * D + column[None, :]
    tl.store(dout_a_ptr + at, (w_a[:, None] * dout).to(dout_a_ptr.dtype.element_ty), mask=keep)
    tl.store(dout_b_ptr + at, (w_b[:, None] * dout).to(dout_b_ptr.dtype.element_ty), mask=keep)
    # d out / d lse_a = w_a (a - out) = w_a w_b (a - b)
    inner = tl.sum((a - b) * dout, axis=1) * w_a * w_b
    at = (batch * heads + head) * queries + query
    tl.store(dlse_a_ptr + at, w_a * dlse + inner, mask=mask)
    tl.store(dlse_b_ptr + at, w_b * dlse - inner, mask=mask)


@dataclass(frozen=True)
class Config:
    """Rows of one program, and their width."""

    d: int
    d_pad: int
    block_m: int
    num_warps: int


@functools.lru_cache
def config(dim: int) -> Config:
    """About 2,048 elements for each program."""
    d_pad = triton.next_power_of_2(dim)
    return Config(dim, d_pad, max(1, min(32, 2048 // d_pad)), 4)


def strides(out: Tensor) -> tuple[int, ...]:
    """Batch, query and head strides of [B, S, H, D] or packed [T, H, D]."""
    return (0, *out.stride()[:2]) if out.dim() == 3 else out.stride()[:3]


def lse_strides(lse: Tensor) -> tuple[int, ...]:
    return (0, *lse.stride()) if lse.dim() == 2 else lse.stride()


def empty_outputs(out_a: Tensor, lse_a: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device),
        torch.empty(lse_a.shape, dtype=torch.float32, device=lse_a.device),
    )


def merge_attention_fwd(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(out_a, lse_a)
    *_, queries, heads, dim = out.shape
    if lse.numel() == 0:
        return out, lse
    tile = config(dim)
    with on_device(out_a):
        merge_attention_fwd_kernel[(triton.cdiv(lse.numel(), tile.block_m),)](
            out_a,
            lse_a,
            out_b,
            lse_b,
            out,
            lse,
            lse.numel(),
            queries,
            heads,
            *strides(out_a),
            *strides(out_b),
            *lse_strides(lse_a),
            *lse_strides(lse_b),
            **constants(tile),
        )
    return out, lse


def merge_attention_bwd(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout_a, dlse_a = empty_outputs(out_a, lse_a)
    dout_b, dlse_b = empty_outputs(out_b, lse_b)
    *_, queries, heads, dim = out_a.shape
    if lse_a.numel() == 0:
        return dout_a, dlse_a, dout_b, dlse_b
    tile = config(dim)
    with on_device(out_a):
        merge_attention_bwd_kernel[(triton.cdiv(lse_a.numel(), tile.block_m),)](
            dout,
            dlse,
            out_a,
            lse_a,
            out_b,
            lse_b,
            dout_a,
            dlse_a,
            dout_b,
            dlse_b,
            lse_a.numel(),
            queries,
            heads,
            *strides(dout),
            *strides(out_a),
            *strides(out_b),
            *lse_strides(dlse),
            *lse_strides(lse_a),
            *lse_strides(lse_b),
            **constants(tile),
        )
    return dout_a, dlse_a, dout_b, dlse_b


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype in ("bf16", "fp32"):
        out, lse = tensor(dtype, 2, 4096, 128, 128), tensor("fp32", 2, 128, 4096)
        yield AotCase(dtype, train("merge_attention", out, lse, out, lse), expect=("LDG.128", "STG.128"))
