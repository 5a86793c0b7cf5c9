"""Quantised and dequantised at once, and the gradients; a program has whole groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device
from .codes import extremes, group_scale, launch_of, level, load_tile, places, quotient
from .host import EPS, mask_bytes
from .quantize import back_config


@triton.jit
def _scales(
    x_ptr,
    x_row,
    scale_ptr,
    scale_row,
    zero_ptr,
    zero_row,
    row,
    group,
    first,
    there,
    size,
    k,
    eps,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scales and zeros (int32), ``[T]``: those given, or the groups' own."""
    if scale_ptr is None:
        low, high = extremes(x_ptr, x_row, row, first, there, size, k, SYMMETRIC, BLOCK_T, BLOCK_K)
        scale, zero = group_scale(low, high, eps, BITS, SYMMETRIC)
    else:
        scale = tl.load(scale_ptr + row * scale_row + group, there, 1.0)
        if zero_ptr is None:
            zero = tl.zeros([BLOCK_T], tl.int32)
        else:
            zero = tl.load(zero_ptr + row * zero_row + group, there, 0).to(tl.int32)
    return scale, zero


@triton.jit(do_not_specialize=["total", "eps"])
def fake_quantize_fwd_kernel(
    x_ptr,
    x_row,
    scale_ptr,
    scale_row,
    zero_ptr,
    zero_row,
    out_ptr,
    inside_ptr,
    inside_row,
    total,
    groups,
    size,
    k,
    eps,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [rows, k] contiguous; KEEP: a bit for each element that was not clamped."""
    there, row, group, first = places(total, groups, size, BLOCK_T)
    # [T]
    scale, zero = _scales(
        x_ptr,
        x_row,
        scale_ptr,
        scale_row,
        zero_ptr,
        zero_row,
        row,
        group,
        first,
        there,
        size,
        k,
        eps,
        BITS,
        SYMMETRIC,
        BLOCK_T,
        BLOCK_K,
    )
    for start in range(0, size, BLOCK_K):
        # [T, BLOCK_K]
        x, mask = load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K)
        found, inside = level(quotient(x, scale[:, None]), zero[:, None], BITS, SYMMETRIC)
        value = found.to(tl.float32) * scale[:, None]
        col = start + tl.arange(0, BLOCK_K)
        tl.store(out_ptr + (row * k + first)[:, None] + col[None, :], value.to(out_ptr.dtype.element_ty), mask)
        if KEEP:
            bits = tl.reshape((inside & mask).to(tl.int32), (BLOCK_T, BLOCK_K // 8, 8))
            byte = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
            col = start + 8 * tl.arange(0, BLOCK_K // 8)
            at = first[:, None] + col[None, :]
            some = there[:, None] & (col < size)[None, :] & (at < k)
            tl.store(inside_ptr + (row * inside_row)[:, None] + at // 8, byte.to(tl.uint8), some)


@triton.jit(do_not_specialize=["rows"])
def fake_quantize_bwd_kernel(
    dout_ptr,
    dout_row,
    inside_ptr,
    inside_row,
    dx_ptr,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx [rows, columns] contiguous: the upstream gradient where the bit is set."""
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < columns)[None, :]
    # [BLOCK_M, BLOCK_N]
    dout = tl.load(dout_ptr + (row * dout_row)[:, None] + col[None, :], mask, 0.0)
    byte = tl.load(inside_ptr + (row * inside_row)[:, None] + (col // 8)[None, :], mask, 0).to(tl.int32)
    kept = (byte >> (col % 8)[None, :]) & 1
    tl.store(dx_ptr + row[:, None] * columns + col[None, :], tl.where(kept != 0, dout, 0.0), mask)


@triton.jit(do_not_specialize=["total"])
def fake_quantize_bwd_scale_kernel(
    dout_ptr,
    dout_row,
    x_ptr,
    x_row,
    scale_ptr,
    scale_row,
    zero_ptr,
    zero_row,
    dx_ptr,
    dscale_ptr,
    total,
    groups,
    size,
    k,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx [rows, k] and dscale [rows, groups], contiguous."""
    there, row, group, first = places(total, groups, size, BLOCK_T)
    # [T]
    scale, zero = _scales(
        x_ptr,
        x_row,
        scale_ptr,
        scale_row,
        zero_ptr,
        zero_row,
        row,
        group,
        first,
        there,
        size,
        k,
        0.0,
        BITS,
        SYMMETRIC,
        BLOCK_T,
        BLOCK_K,
    )
    dscale = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, size, BLOCK_K):
        # [T, BLOCK_K]
        x, mask = load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K)
        dout, _ = load_tile(dout_ptr, dout_row, row, first, there, start, size, k, BLOCK_K)
        y = quotient(x, scale[:, None])
        found, inside = level(y, zero[:, None], BITS, SYMMETRIC)
        rounded = found.to(tl.float32)
        dscale += tl.sum(tl.where(mask, dout * tl.where(inside, rounded - y, rounded), 0.0), 1)
        place = dx_ptr + (row * k + first)[:, None] + (start + tl.arange(0, BLOCK_K))[None, :]
        tl.store(place, tl.where(inside, dout, 0.0).to(dx_ptr.dtype.element_ty), mask)
    tl.store(dscale_ptr + row * groups + group, dscale, there)


@triton.jit(do_not_specialize=["total", "eps"])
def fake_quantize_bwd_amax_kernel(
    dout_ptr,
    dout_row,
    x_ptr,
    x_row,
    dx_ptr,
    total,
    groups,
    size,
    k,
    eps,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx [rows, k] contiguous, through the extremes too; ties share."""
    there, row, _group, first = places(total, groups, size, BLOCK_T)
    # [T]
    low, high = extremes(x_ptr, x_row, row, first, there, size, k, SYMMETRIC, BLOCK_T, BLOCK_K)
    scale, zero = group_scale(low, high, eps, BITS, SYMMETRIC)
    dscale = tl.zeros([BLOCK_T], tl.float32)
    lows = tl.zeros([BLOCK_T], tl.float32)
    highs = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, size, BLOCK_K):
        # [T, BLOCK_K]
        x, mask = load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K)
        dout, _ = load_tile(dout_ptr, dout_row, row, first, there, start, size, k, BLOCK_K)
        y = quotient(x, scale[:, None])
        found, inside = level(y, zero[:, None], BITS, SYMMETRIC)
        if SYMMETRIC:
            # the largest quotient may lie an ulp past the end, and is no clamp's
            inside = tl.abs(x) != float("inf")
        rounded = found.to(tl.float32)
        dscale += tl.sum(tl.where(mask, dout * tl.where(inside, rounded - y, rounded), 0.0), 1)
        lows += tl.sum(tl.where(mask & (x == low[:, None]), 1.0, 0.0), 1)
        highs += tl.sum(tl.where(mask & (x == high[:, None]), 1.0, 0.0), 1)
    if SYMMETRIC:
        spread = high
        lows += highs
        highs = lows
        dspread = tl.div_rn(dscale, (2 ** (BITS - 1) - 1) * 1.0)
    else:
        spread = high - low
        dspread = tl.div_rn(dscale, (2**BITS - 1) * 1.0)
    dspread = tl.where((spread >= eps) & (spread <= 3.4028234663852886e38), dspread, 0.0)
    to_high = tl.div_rn(dspread, tl.maximum(highs, 1.0))
    to_low = tl.div_rn(dspread, tl.maximum(lows, 1.0))
    for start in range(0, size, BLOCK_K):
        # [T, BLOCK_K]
        x, mask = load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K)
        dx, _ = load_tile(dout_ptr, dout_row, row, first, there, start, size, k, BLOCK_K)
        if not SYMMETRIC:
            _, inside = level(quotient(x, scale[:, None]), zero[:, None], BITS, SYMMETRIC)
            dx = tl.where(inside, dx, 0.0)
        dx += tl.where(x == high[:, None], to_high[:, None], 0.0)
        dx -= tl.where(x == low[:, None], to_low[:, None], 0.0)
        place = dx_ptr + (row * k + first)[:, None] + (start + tl.arange(0, BLOCK_K))[None, :]
        tl.store(place, dx.to(dx_ptr.dtype.element_ty), mask)


def _rows(tensor):
    """A tensor and the distance of its rows, as a launch passes them; None where there is none."""
    return tensor, 0 if tensor is None else tensor.stride(0)


def fake_quantize_fwd(x, scale, zero, bits, group_size, symmetric, scale_gradient, keep):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = (x.shape[0], mask_bytes(x.shape[1])) if keep else (0, 0)
    inside = torch.empty(shape, dtype=torch.uint8, device=x.device)
    grid, sizes, tile = launch_of(x, group_size)
    if out.numel():
        with on_device(x):
            fake_quantize_fwd_kernel[grid](
                *_rows(x),
                *_rows(scale),
                *_rows(zero),
                out,
                *_rows(inside),
                *sizes,
                EPS,
                BITS=bits,
                SYMMETRIC=symmetric,
                KEEP=keep,
                **constants(tile),
            )
    return out, inside


def fake_quantize_bwd(dout, inside):
    rows, columns = dout.shape
    dx = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    tile = back_config(columns)
    if dx.numel():
        with on_device(dout):
            fake_quantize_bwd_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)](
                *_rows(dout), *_rows(inside), dx, rows, columns, **constants(tile)
            )
    return dx


def fake_quantize_bwd_scale(dout, x, scale, zero, bits, group_size, symmetric):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscale = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
    grid, sizes, tile = launch_of(x, group_size)
    if dscale.numel():
        with on_device(x):
            fake_quantize_bwd_scale_kernel[grid](
                *_rows(dout),
                *_rows(x),
                *_rows(scale),
                *_rows(zero),
                dx,
                dscale,
                *sizes,
                BITS=bits,
                SYMMETRIC=symmetric,
                **constants(tile),
            )
    return dx, dscale


def fake_quantize_bwd_amax(dout, x, bits, group_size, symmetric):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, sizes, tile = launch_of(x, group_size)
    if dx.numel():
        with on_device(x):
            fake_quantize_bwd_amax_kernel[grid](
                *_rows(dout),
                *_rows(x),
                dx,
                *sizes,
                EPS,
                BITS=bits,
                SYMMETRIC=symmetric,
                **constants(tile),
            )
    return dx


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    x = tensor("bf16", 4096, 4096)
    yield AotCase("weights", train("fake_quantize", x))
    yield AotCase("tokens", train("fake_quantize", x, bits=8, group_size=0, symmetric=False))
    yield AotCase("scale", train("fake_quantize", tensor("fp32", 4096, 4096), tensor("fp32", 4096, 32)))
    yield AotCase("amax", train("fake_quantize", x, scale_gradient=True))
