"""moe_combine: a program owns a piece of one token's output, so nothing is added atomically."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import on_device


@triton.jit
def _row_of(inverse_ptr, slot, rows):
    at = tl.load(inverse_ptr + slot).to(tl.int64)
    kept = (at >= 0) & (at < rows)
    return tl.where(kept, at, 0), kept


@triton.jit(do_not_specialize=["rows"])
def moe_combine_fwd_kernel(
    y_ptr,
    inverse_ptr,
    weights_ptr,
    out_ptr,
    rows,
    stride_y,
    hidden,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        row, kept = _row_of(inverse_ptr, token * TOP_K + j, rows)
        x = tl.load(y_ptr + row * stride_y + col, mask=kept & (col < hidden), other=0.0).to(tl.float32)  # [BLOCK]
        if weights_ptr is not None:
            # a dropped slot adds nothing, even with a weight that is not finite
            x *= tl.where(kept, tl.load(weights_ptr + token * TOP_K + j).to(tl.float32), 0.0)
        acc += x
    tl.store(out_ptr + token * hidden + col, acc.to(out_ptr.dtype.element_ty), mask=col < hidden)


@triton.jit(do_not_specialize=["rows"])
def moe_combine_bwd_kernel(
    dout_ptr,
    y_ptr,
    inverse_ptr,
    weights_ptr,
    dy_ptr,
    dweights_ptr,
    rows,
    stride_y,
    hidden,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        row, kept = _row_of(inverse_ptr, slot, rows)
        w = tl.load(weights_ptr + slot).to(tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)
        for start in range(0, hidden, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = kept & (col < hidden)
            g = tl.load(dout_ptr + token * hidden + col, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
            dot += g * tl.load(y_ptr + row * stride_y + col, mask=inside, other=0.0).to(tl.float32)
            tl.store(dy_ptr + row * hidden + col, (w * g).to(dy_ptr.dtype.element_ty), mask=inside)
        tl.store(dweights_ptr + slot, tl.sum(dot, axis=0).to(dweights_ptr.dtype.element_ty))


def block(hidden: int) -> int:
    """Columns per program: up to 8 elements for each of 128 threads."""
    return min(1024, max(16, triton.next_power_of_2(hidden)))


def moe_combine_fwd(y, inverse, weights, top_k):
    tokens, hidden = inverse.shape[0] // top_k, y.shape[1]
    out = y.new_empty((tokens, hidden))
    if out.numel():
        size = block(hidden)
        with on_device(y):
            moe_combine_fwd_kernel[(tokens, triton.cdiv(hidden, size))](
                y,
                inverse,
                weights,
                out,
                y.shape[0],
                y.stride(0),
                hidden,
                TOP_K=top_k,
                BLOCK=size,
                num_warps=4,
            )
    return out


def moe_combine_bwd(dout, y, inverse, weights, top_k):
    # rows that no slot names have no other writer
    dy = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
    dweights = weights.new_empty(weights.shape)
    if weights.numel():
        with on_device(y):
            moe_combine_bwd_kernel[(weights.shape[0],)](
                dout,
                y,
                inverse,
                weights,
                dy,
                dweights,
                y.shape[0],
                y.stride(0),
                y.shape[1],
                TOP_K=top_k,
                BLOCK=block(y.shape[1]),
                num_warps=4,
            )
    return dy, dweights


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype in ("bf16", "fp32"):
        y, inverse, weights = tensor(dtype, 32768, 2048), tensor("i32", 32768), tensor("fp32", 4096, 8)
        yield AotCase(dtype, train("moe_combine", y, inverse, weights), expect=("LDG.128",))
