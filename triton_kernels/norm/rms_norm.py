"""RMSNorm of rows. Short rows share a program; a row too long for registers is read twice, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import constants, on_device


@triton.jit
def load_row_block(base_ptr, row, stride, col, mask):
    """[BLOCK_M, BLOCK_N] of a matrix in float32."""
    return tl.load(base_ptr + row[:, None] * stride + col[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _sum_block(x_ptr, x_row, residual_ptr, residual_row, row, col, mask):
    """What is normed: x, or the sum with the residual, rounded to its dtype."""
    x = load_row_block(x_ptr, row, x_row, col, mask)
    if residual_ptr is not None:
        x += load_row_block(residual_ptr, row, residual_row, col, mask)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def row_rstd(squares, small_squares, dim, eps):
    """(rstd, the factor that x is to have first) from the sums of x^2 and (2^-100 x)^2: the first may overflow."""
    big = squares == float("inf")
    factor = tl.where(big, 2.0**-100, 1.0)
    mean = tl.div_rn(tl.where(big, small_squares, squares), dim.to(tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps * factor * factor)), factor


@triton.jit
def load_scale(weight_ptr, weight_offset, col, inside):
    """What normed columns are multiplied with, [1, BLOCK_N]."""
    if weight_ptr is None:
        scale = tl.full(col.shape, 1.0, tl.float32)
    else:
        scale = tl.load(weight_ptr + col, inside, 0.0).to(tl.float32) + weight_offset
    return scale[None, :]


@triton.jit
def _store_normed(y_ptr, normed, weight_ptr, weight_offset, row, col, mask, dim, LLAMA: tl.constexpr):
    if LLAMA:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    y = normed * load_scale(weight_ptr, weight_offset, col, col < dim)
    tl.store(y_ptr + row[:, None] * dim + col[None, :], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "eps", "weight_offset"])
def rms_norm_fwd_kernel(
    x_ptr,
    x_row,
    residual_ptr,
    residual_row,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    rows,
    dim,
    eps,
    weight_offset,
    LLAMA: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x, residual [T, D] with row strides; y, h contiguous. WHOLE: a row is one block."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    col = tl.arange(0, BLOCK_N)
    if WHOLE:
        mask = inside[:, None] & (col < dim)[None, :]
        x = _sum_block(x_ptr, x_row, residual_ptr, residual_row, row, col, mask)
        if residual_ptr is not None:
            tl.store(h_ptr + row[:, None] * dim + col[None, :], x.to(h_ptr.dtype.element_ty), mask)
        small = x * 2.0**-100
        rstd, factor = row_rstd(tl.sum(x * x, 1), tl.sum(small * small, 1), dim, eps)
        normed = (x * factor[:, None]) * rstd[:, None]
        _store_normed(y_ptr, normed, weight_ptr, weight_offset, row, col, mask, dim, LLAMA)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        small_squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, dim, BLOCK_N):
            mask = inside[:, None] & (start + col < dim)[None, :]
            x = _sum_block(x_ptr, x_row, residual_ptr, residual_row, row, start + col, mask)
            squares += x * x
            small = x * 2.0**-100
            small_squares += small * small
        rstd, factor = row_rstd(tl.sum(squares, 1), tl.sum(small_squares, 1), dim, eps)
        for start in range(0, dim, BLOCK_N):
            mask = inside[:, None] & (start + col < dim)[None, :]
            x = _sum_block(x_ptr, x_row, residual_ptr, residual_row, row, start + col, mask)
            if residual_ptr is not None:
                tl.store(h_ptr + row[:, None] * dim + (start + col)[None, :], x.to(h_ptr.dtype.element_ty), mask)
            normed = (x * factor[:, None]) * rstd[:, None]
            _store_normed(y_ptr, normed, weight_ptr, weight_offset, row, start + col, mask, dim, LLAMA)
    tl.store(rstd_ptr + row, rstd * factor, inside)


@triton.jit(do_not_specialize=["rows", "weight_offset"])
def rms_norm_bwd_mean_kernel(
    dout_ptr,
    dout_row,
    x_ptr,
    x_row,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    rows,
    dim,
    weight_offset,
    BLOCK_N: tl.constexpr,
):
    """mean(dnormed * normed) of one row of many blocks."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + row)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (col < dim)[None, :]
        normed = load_row_block(x_ptr, row, x_row, col, mask) * rstd[:, None]
        scale = load_scale(weight_ptr, weight_offset, col, col < dim)
        total += load_row_block(dout_ptr, row, dout_row, col, mask) * scale * normed
    tl.store(mean_ptr + row, tl.div_rn(tl.sum(total, 1), dim.to(tl.float32)))


@triton.jit(do_not_specialize=["rows", "weight_offset"])
def rms_norm_bwd_kernel(
    dout_ptr,
    dout_row,
    dh_ptr,
    dh_row,
    x_ptr,
    x_row,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    dim,
    weight_offset,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A span of rows by a block of columns. mean_ptr is given where a row has several; dx, partial are contiguous."""
    span = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = load_scale(weight_ptr, weight_offset, col, col < dim)
    partial = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SPAN, BLOCK_M):
        row = span * SPAN + start + tl.arange(0, BLOCK_M)
        inside = row < rows
        mask = inside[:, None] & (col < dim)[None, :]
        rstd = tl.load(rstd_ptr + row, inside, 0.0)[:, None]
        normed = load_row_block(x_ptr, row, x_row, col, mask) * rstd
        dout = load_row_block(dout_ptr, row, dout_row, col, mask)
        partial += dout * normed
        dnormed = dout * scale
        if mean_ptr is None:
            mean = tl.div_rn(tl.sum(dnormed * normed, 1), dim.to(tl.float32))
        else:
            mean = tl.load(mean_ptr + row, inside, 0.0)
        dx = rstd * (dnormed - normed * mean[:, None])
        if dh_ptr is not None:
            dx += load_row_block(dh_ptr, row, dh_row, col, mask)
        tl.store(dx_ptr + row[:, None] * dim + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + span * dim + col, tl.sum(partial, 0), col < dim)


@triton.jit(do_not_specialize=["spans"])
def rms_norm_bwd_weight_kernel(partial_ptr, dweight_ptr, spans, dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds up partial [spans, D] in an order that depends on nothing else."""
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, spans, BLOCK_M):
        span = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        total += load_row_block(partial_ptr, span, dim, col, (span < spans)[:, None] & (col < dim)[None, :])
    tl.store(dweight_ptr + col, tl.sum(total, 0).to(dweight_ptr.dtype.element_ty), col < dim)


@dataclass(frozen=True)
class Config:
    """Rows and columns of a program's block."""

    block_m: int
    block_n: int
    num_warps: int


# rows whose weight gradients are summed by one program
SPAN = 32


def config(dim: int, longest: int, elements: int) -> Config:
    """A whole row where it has at most ``longest`` elements; short ones are taken together, up to ``elements``."""
    block_n = min(max(16, triton.next_power_of_2(dim)), longest)
    block_m = min(SPAN, max(1, elements // block_n))
    return Config(block_m, block_n, min(max(block_m * block_n // 512, 1), 16))


def fwd_config(dim: int) -> Config:
    return config(dim, 16384, 2048)


def bwd_config(dim: int) -> Config:
    """Four float32 of a row, the weight's sum among them, stay in registers."""
    return config(dim, 8192, 1024)


WEIGHT_TILE = Config(block_m=16, block_n=64, num_warps=4)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weight_offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = x.shape
    y = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    h = y if residual is None else torch.empty_like(y)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = fwd_config(dim)
    if rows:
        with on_device(x):
            rms_norm_fwd_kernel[(triton.cdiv(rows, tile.block_m),)](
                x,
                x.stride(0),
                residual,
                0 if residual is None else residual.stride(0),
                weight,
                y,
                None if residual is None else h,
                rstd,
                rows,
                dim,
                eps,
                weight_offset,
                LLAMA=llama,
                WHOLE=dim <= tile.block_n,
                **constants(tile),
            )
    return y, h, rstd


def rms_norm_fwd(x, weight, eps, weight_offset, llama):
    y, _, rstd = _forward(x, None, weight, eps, weight_offset, llama)
    return y, rstd


def add_rms_norm_fwd(x, residual, weight, eps, weight_offset, llama):
    return _forward(x, residual, weight, eps, weight_offset, llama)


def weight_gradient(partial: Tensor, weight: Tensor) -> Tensor:
    """The sum of partial gradients [spans, D] in the weight's dtype."""
    spans, dim = partial.shape
    dweight = torch.empty(dim, dtype=weight.dtype, device=weight.device)
    with on_device(weight):
        rms_norm_bwd_weight_kernel[(triton.cdiv(dim, WEIGHT_TILE.block_n),)](
            partial, dweight, spans, dim, **constants(WEIGHT_TILE)
        )
    return dweight


def rms_norm_bwd(dout, dh, x, weight, rstd, weight_offset, with_dweight):
    rows, dim = x.shape
    dx = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    spans = triton.cdiv(rows, SPAN)
    partial = torch.empty((spans, dim), dtype=torch.float32, device=x.device) if with_dweight else None
    tile = bwd_config(dim)
    mean = None if dim <= tile.block_n else torch.empty_like(rstd)
    options = {"rows": rows, "dim": dim, "weight_offset": weight_offset}
    if rows:
        with on_device(x):
            if mean is not None:
                rms_norm_bwd_mean_kernel[(rows,)](
                    dout,
                    dout.stride(0),
                    x,
                    x.stride(0),
                    weight,
                    rstd,
                    mean,
                    BLOCK_N=tile.block_n,
                    num_warps=tile.num_warps,
                    **options,
                )
            rms_norm_bwd_kernel[(spans, triton.cdiv(dim, tile.block_n))](
                dout,
                dout.stride(0),
                dh,
                0 if dh is None else dh.stride(0),
                x,
                x.stride(0),
                weight,
                rstd,
                mean,
                dx,
                partial,
                SPAN=SPAN,
                **options,
                **constants(tile),
            )
    if partial is None:
        return dx, (x if weight is None else weight).new_empty(0)
    return dx, weight_gradient(partial, weight)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    wide = ("LDG.128", "STG.128")
    expect = {"rms_norm_fwd_kernel": wide, "rms_norm_bwd_kernel": wide}
    for dtype in ("bf16", "fp32"):
        for dim in (4096, 128):
            x, weight = tensor(dtype, 4096, dim), tensor(dtype, dim)
            yield AotCase(f"{dtype}_d{dim}", train("rms_norm", x, weight), expect=expect)
    x, weight = tensor("bf16", 4096, 4096), tensor("bf16", 4096)
    yield AotCase("residual", train("add_rms_norm", x, x, weight), expect=expect)
    x, weight = tensor("bf16", 4096, 32768), tensor("bf16", 32768)
    yield AotCase("long_rows", train("add_rms_norm", x, x, weight, rounding="llama"), expect=expect)
