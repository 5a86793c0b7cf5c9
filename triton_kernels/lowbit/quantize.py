"""Integer codes of groups, and back. A program makes whole groups, whose values it reads twice, then from a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device
from .codes import extremes, group_scale, launch_of, level, load_codes, load_tile, places, quotient
from .host import bytes_of, code_dtype, columns_of


@triton.jit
def _store_codes(
    q_rows, code, first, there, start, size, k, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Codes [T, BLOCK_K] of columns [start, start + BLOCK_K) of groups; q_rows [T] point at rows of bytes."""
    dtype: tl.constexpr = q_rows.dtype.element_ty
    if BITS == 8:
        col = start + tl.arange(0, BLOCK_K)
        mask = there[:, None] & (col < size)[None, :] & (first[:, None] + col[None, :] < k)
        tl.store(q_rows[:, None] + first[:, None] + col[None, :], code.to(dtype), mask)
    else:
        # what fills whole bytes up has values of 0
        unit: tl.constexpr = 2 if BITS == 4 else 4
        padded = (k + unit - 1) // unit * unit
        whole = (size + unit - 1) // unit * unit
        even, odd = tl.split(tl.reshape(code, (BLOCK_T, BLOCK_K // 2, 2)))
        col = start + 2 * tl.arange(0, BLOCK_K // 2)
        at = first[:, None] + col[None, :]
        mask = there[:, None] & (col < whole)[None, :] & (at < padded)
        nibbles = (even & 15) | ((odd & 15) << 4)
        if BITS == 4:
            tl.store(q_rows[:, None] + at // 2, nibbles.to(dtype), mask)
        else:
            # blocks of 32 elements: 16 bytes of nibbles, 8 of pairs
            tl.store(q_rows[:, None] + at // 32 * 24 + at % 32 // 2, nibbles.to(dtype), mask)
            pairs = (even >> 4) | ((odd >> 4) << 2)
            even, odd = tl.split(tl.reshape(pairs, (BLOCK_T, BLOCK_K // 4, 2)))
            col = start + 4 * tl.arange(0, BLOCK_K // 4)
            at = first[:, None] + col[None, :]
            mask = there[:, None] & (col < whole)[None, :] & (at < padded)
            block = at // 32
            planes = block * 24 + tl.minimum(padded - block * 32, 32) // 2
            tl.store(q_rows[:, None] + planes + at % 32 // 4, (even | (odd << 4)).to(dtype), mask)


@triton.jit(do_not_specialize=["total", "eps"])
def int_quantize_fwd_kernel(
    x_ptr,
    x_row,
    q_ptr,
    q_row,
    scale_ptr,
    zero_ptr,
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
    """BLOCK_T groups; scale and zero [rows, groups] contiguous."""
    there, row, group, first = places(total, groups, size, BLOCK_T)
    low, high = extremes(x_ptr, x_row, row, first, there, size, k, SYMMETRIC, BLOCK_T, BLOCK_K)
    # [T]
    scale, zero = group_scale(low, high, eps, BITS, SYMMETRIC)
    tl.store(scale_ptr + row * groups + group, scale, there)
    tl.store(zero_ptr + row * groups + group, zero.to(tl.uint8), there)
    for start in range(0, size, BLOCK_K):
        # [T, BLOCK_K]
        x, _ = load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K)
        found, _ = level(quotient(x, scale[:, None]), zero[:, None], BITS, SYMMETRIC)
        code = found + zero[:, None]
        _store_codes(q_ptr + row * q_row, code, first, there, start, size, k, BITS, BLOCK_T, BLOCK_K)


@triton.jit(do_not_specialize=["rows"])
def int_dequantize_fwd_kernel(
    q_ptr,
    q_row,
    scale_ptr,
    scale_row,
    zero_ptr,
    zero_row,
    out_ptr,
    rows,
    columns,
    groups,
    size,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [rows, columns] contiguous; a column past the last group is of that one."""
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < columns)[None, :]
    # [BLOCK_M, BLOCK_N]
    code = load_codes((q_ptr + row * q_row)[:, None], col, columns, mask, BITS)
    group = tl.minimum(col // size, groups - 1)[None, :]
    scale = tl.load(scale_ptr + (row * scale_row)[:, None] + group, mask, 0.0)
    if zero_ptr is None:
        zero = 0.0 if BITS == 8 else 2.0 ** (BITS - 1)
    else:
        zero = tl.load(zero_ptr + (row * zero_row)[:, None] + group, mask, 0).to(tl.float32)
    value = (code.to(tl.float32) - zero) * scale
    tl.store(out_ptr + row[:, None] * columns + col[None, :], value.to(out_ptr.dtype.element_ty), mask)


def int_quantize_fwd(x, bits, group_size, symmetric, eps):
    rows, k = x.shape
    grid, sizes, tile = launch_of(x, group_size)
    q = torch.empty((rows, bytes_of(k, bits)), dtype=code_dtype(bits, symmetric), device=x.device)
    scale = torch.empty((rows, sizes[1]), dtype=torch.float32, device=x.device)
    zero = torch.empty((rows, sizes[1]), dtype=torch.uint8, device=x.device)
    if sizes[0]:
        with on_device(x):
            int_quantize_fwd_kernel[grid](
                x,
                x.stride(0),
                q,
                q.stride(0),
                scale,
                zero,
                *sizes,
                eps,
                BITS=bits,
                SYMMETRIC=symmetric,
                **constants(tile),
            )
    return q, scale, zero


@dataclass(frozen=True)
class BackConfig:
    """Rows and columns of a program that dequantises."""

    block_m: int
    block_n: int
    num_warps: int


def back_config(columns: int) -> BackConfig:
    """About 8 elements for each of 128 threads."""
    block_n = min(max(16, triton.next_power_of_2(columns)), 1024)
    return BackConfig(1024 // block_n, block_n, 4)


def int_dequantize_fwd(q, scale, zero, bits, group_size, out_dtype):
    rows, columns = q.shape[0], columns_of(q.shape[1], bits)
    out = torch.empty((rows, columns), dtype=out_dtype, device=q.device)
    tile = back_config(columns)
    if out.numel():
        with on_device(q):
            int_dequantize_fwd_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)](
                q,
                q.stride(0),
                scale,
                scale.stride(0),
                zero,
                0 if zero is None else zero.stride(0),
                out,
                rows,
                columns,
                scale.shape[1],
                group_size or columns,
                BITS=bits,
                **constants(tile),
            )
    return out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    x = tensor("bf16", 4096, 4096)
    for bits, group_size in ((4, 128), (8, 0), (6, 64)):
        yield AotCase(f"bf16_{bits}_g{group_size}", call("int_quantize", x, bits=bits, group_size=group_size))
    asymmetric = {"bits": 4, "group_size": 32, "symmetric": False}
    yield AotCase("fp32_asymmetric", call("int_quantize", tensor("fp32", 4096, 4096), **asymmetric))
    for bits, size in ((4, 2048), (8, 4096), (6, 3072)):
        tensors = tensor("u8", 4096, size), tensor("fp32", 4096, 32), tensor("u8", 4096, 32)
        yield AotCase(f"dequantize_{bits}", call("int_dequantize", *tensors, bits=bits, group_size=128))
