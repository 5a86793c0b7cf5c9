"""Products with weights of 8, 6 and 4 bits, unpacked in registers.

A program walks along the groups of K, whose sums it scales: float32 ones of ``code - zero``, which 16-bit floats hold
exactly, or exact ones of 8-bit rows, in int32 for 65,536 of K and in int64 beyond. Integer sums are of the codes; the
zeros come off by the sums of the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.grouped import tile_order
from ..common.launch import constants, on_device
from .codes import load_codes
from .host import columns_of
from .int8_matmul import SPAN, Config, store_tile


@triton.jit
def _codes(
    q_row,
    col_mask,
    k,
    last,
    columns,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes [BLOCK_N, BLOCK_K] of columns from k on, int32, 0 past ``last``. ``q_row`` [BLOCK_N, 1]: rows of bytes that
    hold ``columns``. WHOLE: k is even."""
    if BITS == 4 and WHOLE:
        byte = k // 2 + tl.arange(0, BLOCK_K // 2)
        pairs = tl.load(q_row + byte[None, :], col_mask & (byte * 2 < last)[None, :], 0).to(tl.int32)
        return tl.reshape(tl.join(pairs & 15, pairs >> 4), (BLOCK_N, BLOCK_K))
    else:
        at = k + tl.arange(0, BLOCK_K)
        return load_codes(q_row, at, columns, col_mask & (at < last)[None, :], BITS)


@triton.jit(do_not_specialize=["m"])
def lowbit_matmul_fwd_kernel(
    x_ptr,
    x_sm,
    q_ptr,
    q_sn,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    columns,
    group,
    groups,
    MIDDLE: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    FLOATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of out [M, N]; scales and zeros [N, groups] are contiguous. MIDDLE: the zero where there is none.
    FLOATS: products in float32, of a float32 x or float zeros."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_mask = row < m
    col_mask = col < n
    x_row = x_ptr + row[:, None] * x_sm
    q_row = q_ptr + col[:, None] * q_sn
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(groups):
        first = g * group
        last = tl.minimum(first + group, k)
        zero = tl.full((BLOCK_N,), MIDDLE, tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + col * groups + g, col_mask, 0).to(tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(first, last, BLOCK_K):
            inside = at + tl.arange(0, BLOCK_K)
            # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
            x = tl.load(x_row + inside[None, :], row_mask[:, None] & (inside < last)[None, :], 0.0)
            codes = _codes(q_row, col_mask[:, None], at, last, columns, BITS, WHOLE, BLOCK_N, BLOCK_K)
            level = codes.to(tl.float32) - zero[:, None]
            if FLOATS:
                acc += tl.dot(x.to(tl.float32), tl.trans(level), input_precision="ieee")
            else:
                acc += tl.dot(x, tl.trans(level.to(x.dtype)))
        out += acc * tl.load(scale_ptr + col * groups + g, col_mask, 0.0).to(tl.float32)[None, :]
    store_tile(out, out_ptr, bias_ptr, row, col, row_mask, col_mask, n)


@triton.jit
def _sums(
    x_row,
    q_row,
    row_mask,
    col_mask,
    zero,
    first,
    last,
    columns,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Exact sums of K in [first, last), int32 [BLOCK_M, BLOCK_N]; ``zero`` [BLOCK_N] int32. Codes less SHIFT are
    int8."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    rows = tl.zeros((BLOCK_M,), tl.int32)
    for at in range(first, last, BLOCK_K):
        inside = at + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
        x = tl.load(x_row + inside[None, :], row_mask & (inside < last)[None, :], 0)
        codes = _codes(q_row, col_mask, at, last, columns, BITS, WHOLE, BLOCK_N, BLOCK_K) - SHIFT
        acc = tl.dot(x, tl.trans(codes.to(tl.int8)), acc, out_dtype=tl.int32)
        rows += tl.sum(x.to(tl.int32), axis=1)
    return acc - rows[:, None] * (zero - SHIFT)[None, :]


@triton.jit(do_not_specialize=["m"])
def lowbit_matmul_int8_kernel(
    x_ptr,
    x_sm,
    x_scale_ptr,
    q_ptr,
    q_sn,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    columns,
    group,
    groups,
    MIDDLE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The same of int8 rows with scales [M, groups], exact until it is scaled. WIDE: groups longer than a span."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_mask = row < m
    col_mask = col < n
    x_row = x_ptr + row[:, None] * x_sm
    q_row = q_ptr + col[:, None] * q_sn
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(groups):
        first = g * group
        last = tl.minimum(first + group, k)
        zero = tl.full((BLOCK_N,), MIDDLE, tl.int32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + col * groups + g, col_mask, 0).to(tl.int32)
        if WIDE:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
            for start in range(first, last, SPAN):
                total += _sums(
                    x_row,
                    q_row,
                    row_mask[:, None],
                    col_mask[:, None],
                    zero,
                    start,
                    tl.minimum(start + SPAN, last),
                    columns,
                    SHIFT,
                    BITS,
                    WHOLE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                ).to(tl.int64)
            value = total.to(tl.float32)
        else:
            value = _sums(
                x_row,
                q_row,
                row_mask[:, None],
                col_mask[:, None],
                zero,
                first,
                last,
                columns,
                SHIFT,
                BITS,
                WHOLE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            ).to(tl.float32)
        x_scale = tl.load(x_scale_ptr + row * groups + g, row_mask, 0.0)
        scale = tl.load(scale_ptr + col * groups + g, col_mask, 0.0).to(tl.float32)
        out += value * (x_scale[:, None] * scale[None, :])
    store_tile(out, out_ptr, bias_ptr, row, col, row_mask, col_mask, n)


def config(m: int, group: int) -> Config:
    """Few rows stream the weight: narrow tiles make enough programs. A block of K lies in one group."""
    block_k = 32 if group <= 32 else 64
    if m <= 16:
        return Config(16, 64, block_k, 4, 3)
    if m <= 64:
        return Config(64, 64, block_k, 4, 3)
    return Config(128, 64, block_k, 8, 3)


def _weight(q, scale, zero, bits, group_size, k):
    """What both kernels take of a weight: (arguments before the bias, sizes behind N, constants)."""
    signed = q.dtype == torch.int8
    group = group_size or k
    return (
        (q, q.stride(0), scale.contiguous(), None if zero is None else zero.contiguous()),
        (k, columns_of(q.shape[1], bits), group, scale.shape[1]),
        {"MIDDLE": 0 if signed else 2 ** (bits - 1), "BITS": bits, "WHOLE": group % 2 == 0 or scale.shape[1] == 1},
    )


def lowbit_matmul_fwd(x, q, scale, zero, bias, bits, group_size, out_dtype):
    (m, k), n = x.shape, q.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    weight, sizes, flags = _weight(q, scale, zero, bits, group_size, k)
    tile = config(m, group_size or k)
    with on_device(x):
        lowbit_matmul_fwd_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            x,
            x.stride(0),
            *weight,
            bias,
            out,
            m,
            n,
            *sizes,
            **flags,
            FLOATS=x.dtype == torch.float32 or (zero is not None and zero.dtype != torch.uint8),
            GROUP_M=8,
            **constants(tile),
        )
    return out


def lowbit_matmul_int8(x, x_scale, q, scale, zero, bias, bits, group_size, out_dtype):
    (m, k), n = x.shape, q.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    weight, sizes, flags = _weight(q, scale, zero, bits, group_size, k)
    tile = config(m, group_size or k)
    with on_device(x):
        lowbit_matmul_int8_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            x,
            x.stride(0),
            x_scale.contiguous(),
            *weight,
            bias,
            out,
            m,
            n,
            *sizes,
            **flags,
            SHIFT=128 if q.dtype == torch.uint8 and bits == 8 else 0,
            WIDE=(group_size or k) > SPAN.value,
            GROUP_M=8,
            enable_fp_fusion=False,
            **constants(tile),
        )
    return out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    n = k = 4096
    scale, zero = tensor("bf16", n, k // 128), tensor("u8", n, k // 128)
    x, q = tensor("bf16", 64, k), tensor("u8", n, k // 2)
    yield AotCase("int4_m64", call("lowbit_matmul", x, q, scale), targets=("sm_90",))
    yield AotCase("int8_rows_m64", call("lowbit_matmul", x, q, scale, zero, activation="int8"), targets=("sm_90",))
