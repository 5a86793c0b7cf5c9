"""RMSNorm of rows with a silu gate in front of it or behind it; rows are read twice, in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device
from .rms_norm import SPAN, config, load_row_block, load_scale, row_rstd, weight_gradient


@triton.jit
def _load_gated(x_ptr, x_row, gate_ptr, gate_row, row, col, mask, NORM_FIRST: tl.constexpr):
    """(what is normed, silu(gate)), [BLOCK_M, BLOCK_N] each."""
    x = load_row_block(x_ptr, row, x_row, col, mask)
    gate = load_row_block(gate_ptr, row, gate_row, col, mask)
    activated = gate * tl.sigmoid(gate)
    if not NORM_FIRST:
        x *= activated
    return x, activated


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_gated_fwd_kernel(
    x_ptr,
    x_row,
    gate_ptr,
    gate_row,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    dim,
    eps,
    NORM_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x, gate [T, D] with row strides; y contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    small_squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (col < dim)[None, :]
        x, _ = _load_gated(x_ptr, x_row, gate_ptr, gate_row, row, col, mask, NORM_FIRST)
        squares += x * x
        small = x * 2.0**-100
        small_squares += small * small
    rstd, factor = row_rstd(tl.sum(squares, 1), tl.sum(small_squares, 1), dim, eps)
    for start in range(0, dim, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (col < dim)[None, :]
        x, activated = _load_gated(x_ptr, x_row, gate_ptr, gate_row, row, col, mask, NORM_FIRST)
        y = (x * factor[:, None]) * rstd[:, None] * load_scale(weight_ptr, 0.0, col, col < dim)
        if NORM_FIRST:
            y *= activated
        tl.store(y_ptr + row[:, None] * dim + col[None, :], y.to(y_ptr.dtype.element_ty), mask)
    tl.store(rstd_ptr + row, rstd * factor, inside)


@triton.jit
def _upstream(dout_ptr, dout_row, activated, row, col, mask, NORM_FIRST: tl.constexpr):
    """The gradient of the scaled norm, and the one that came in."""
    dout = load_row_block(dout_ptr, row, dout_row, col, mask)
    if NORM_FIRST:
        dscaled = dout * activated
    else:
        dscaled = dout
    return dscaled, dout


@triton.jit(do_not_specialize=["rows"])
def rms_norm_gated_bwd_mean_kernel(
    dout_ptr,
    dout_row,
    x_ptr,
    x_row,
    gate_ptr,
    gate_row,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    rows,
    dim,
    NORM_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """mean(dnormed * normed) of one row of many blocks."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + row)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (col < dim)[None, :]
        x, activated = _load_gated(x_ptr, x_row, gate_ptr, gate_row, row, col, mask, NORM_FIRST)
        dscaled, _ = _upstream(dout_ptr, dout_row, activated, row, col, mask, NORM_FIRST)
        total += dscaled * load_scale(weight_ptr, 0.0, col, col < dim) * (x * rstd[:, None])
    tl.store(mean_ptr + row, tl.div_rn(tl.sum(total, 1), dim.to(tl.float32)))


@triton.jit(do_not_specialize=["rows"])
def rms_norm_gated_bwd_kernel(
    dout_ptr,
    dout_row,
    x_ptr,
    x_row,
    gate_ptr,
    gate_row,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    dx_ptr,
    dgate_ptr,
    partial_ptr,
    rows,
    dim,
    NORM_FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A span of rows by a block of columns. mean_ptr is given where a row has several; results are contiguous."""
    span = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = load_scale(weight_ptr, 0.0, col, col < dim)
    partial = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SPAN, BLOCK_M):
        row = span * SPAN + start + tl.arange(0, BLOCK_M)
        inside = row < rows
        mask = inside[:, None] & (col < dim)[None, :]
        rstd = tl.load(rstd_ptr + row, inside, 0.0)[:, None]
        x = load_row_block(x_ptr, row, x_row, col, mask)
        gate = load_row_block(gate_ptr, row, gate_row, col, mask)
        share = tl.sigmoid(gate)
        activated = gate * share
        dscaled, dout = _upstream(dout_ptr, dout_row, activated, row, col, mask, NORM_FIRST)
        normed = x * rstd if NORM_FIRST else x * activated * rstd
        partial += dscaled * normed
        dnormed = dscaled * scale
        if mean_ptr is None:
            mean = tl.div_rn(tl.sum(dnormed * normed, 1), dim.to(tl.float32))
        else:
            mean = tl.load(mean_ptr + row, inside, 0.0)
        dgated = rstd * (dnormed - normed * mean[:, None])
        if NORM_FIRST:
            dx, dactivated = dgated, dout * normed * scale
        else:
            dx, dactivated = dgated * activated, dgated * x
        dgate = dactivated * (share + activated * (1.0 - share))
        place = row[:, None] * dim + col[None, :]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask)
        tl.store(dgate_ptr + place, dgate.to(dgate_ptr.dtype.element_ty), mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + span * dim + col, tl.sum(partial, 0), col < dim)


# elements of a row that a program holds whole
LONGEST = 4096


def rms_norm_gated_fwd(x, gate, weight, eps, norm_first):
    rows, dim = x.shape
    y = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = config(dim, LONGEST, 1024)
    if rows:
        with on_device(x):
            rms_norm_gated_fwd_kernel[(triton.cdiv(rows, tile.block_m),)](
                x,
                x.stride(0),
                gate,
                gate.stride(0),
                weight,
                y,
                rstd,
                rows,
                dim,
                eps,
                NORM_FIRST=norm_first,
                **constants(tile),
            )
    return y, rstd


def rms_norm_gated_bwd(dout, x, gate, weight, rstd, norm_first, with_dweight):
    rows, dim = x.shape
    dx, dgate = (torch.empty((rows, dim), dtype=x.dtype, device=x.device) for _ in range(2))
    spans = triton.cdiv(rows, SPAN)
    partial = torch.empty((spans, dim), dtype=torch.float32, device=x.device) if with_dweight else None
    tile = config(dim, LONGEST, 1024)
    mean = None if dim <= tile.block_n else torch.empty_like(rstd)
    given = (dout, dout.stride(0), x, x.stride(0), gate, gate.stride(0), weight, rstd, mean)
    if rows:
        with on_device(x):
            if mean is not None:
                rms_norm_gated_bwd_mean_kernel[(rows,)](
                    *given, rows, dim, NORM_FIRST=norm_first, BLOCK_N=tile.block_n, num_warps=tile.num_warps
                )
            rms_norm_gated_bwd_kernel[(spans, triton.cdiv(dim, tile.block_n))](
                *given, dx, dgate, partial, rows, dim, NORM_FIRST=norm_first, SPAN=SPAN, **constants(tile)
            )
    if partial is None:
        return dx, dgate, (x if weight is None else weight).new_empty(0)
    return dx, dgate, weight_gradient(partial, weight)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    wide = ("LDG.128", "STG.128")
    expect = {"rms_norm_gated_fwd_kernel": wide, "rms_norm_gated_bwd_kernel": wide}
    x, weight = tensor("bf16", 4096 * 32, 128), tensor("fp32", 128)
    yield AotCase("heads", train("rms_norm_gated", x, x, weight), expect=expect)
    for dtype in ("bf16", "fp32"):
        x, weight = tensor(dtype, 4096, 8192), tensor(dtype, 8192)
        yield AotCase(f"{dtype}_gate_first", train("rms_norm_gated", x, x, weight, norm_first=False), expect=expect)
