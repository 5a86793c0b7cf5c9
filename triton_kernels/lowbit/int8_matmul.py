"""The 8-bit integer product.

Tensor cores add int8 products in int32, which is exact for 65,536 of K; longer groups are cut into such spans, whose
sums are added in int64. Unsigned codes become signed by their top bit, and their zeros less 128. The epilogue is the
rule of the op, without fused multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.grouped import tile_order
from ..common.launch import constants, on_device

# 65,536 * 255 * 128 is less than 2^31
SPAN = tl.constexpr(65536)


@triton.jit
def _span(
    a_row,
    b_row,
    zero,
    a_mask,
    b_mask,
    first,
    last,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [BLOCK_M, BLOCK_N] over K in [first, last); ``zero`` [BLOCK_M] int32 of unsigned codes, less 128."""
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    columns = tl.zeros((BLOCK_N,), tl.int32)
    for k in range(first, last, BLOCK_K):
        if EVEN:
            a_inside = a_mask
            b_inside = b_mask
        else:
            inside = (k + inner < last)[None, :]
            a_inside = a_mask & inside
            b_inside = b_mask & inside
        b = tl.load(b_row + k, b_inside, 0)  # [BLOCK_N, BLOCK_K]
        if SIGNED:
            a = tl.load(a_row + k, a_inside, 0)  # [BLOCK_M, BLOCK_K]
        else:
            a = (tl.load(a_row + k, a_inside, 128) ^ 128).to(tl.int8, bitcast=True)
            columns += tl.sum(b.to(tl.int32), axis=1)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    if not SIGNED:
        acc -= zero[:, None] * columns[None, :]
    return acc


@triton.jit
def store_tile(out, out_ptr, bias_ptr, row, col, row_mask, col_mask, n):
    """A tile of out [M, N], contiguous, with the bias."""
    if bias_ptr is not None:
        out += tl.load(bias_ptr + col, col_mask, 0.0)[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(out_ptr + row[:, None] * n + col[None, :], out.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["m"])
def int8_matmul_fwd_kernel(
    a_ptr,
    a_sm,
    a_scale_ptr,
    a_zero_ptr,
    b_ptr,
    b_sn,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    group,
    groups,
    A_GROUPED: tl.constexpr,
    B_GROUPED: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of out [M, N]; scales are contiguous. WIDE: groups longer than a span."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    row_mask = row < m
    col_mask = col < n
    a_mask = row_mask[:, None]
    b_mask = col_mask[:, None]
    a_row = a_ptr + row[:, None] * a_sm + inner[None, :]
    b_row = b_ptr + col[:, None] * b_sn + inner[None, :]
    SIGNED: tl.constexpr = a_zero_ptr is None
    zero = tl.zeros((BLOCK_M,), tl.int32)
    if not SIGNED:
        zero = tl.load(a_zero_ptr + row, row_mask, 0).to(tl.int32) - 128
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(groups):
        start = g * group
        if WIDE:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
            for first in range(0, group, SPAN):
                last = tl.minimum(first + SPAN, group)
                total += _span(
                    a_row + start,
                    b_row + start,
                    zero,
                    a_mask,
                    b_mask,
                    first,
                    last,
                    SIGNED,
                    EVEN,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                ).to(tl.int64)
            value = total.to(tl.float32)
        else:
            value = _span(
                a_row + start, b_row + start, zero, a_mask, b_mask, 0, group, SIGNED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
            ).to(tl.float32)
        if A_GROUPED:
            a_scale = tl.load(a_scale_ptr + row * groups + g, row_mask, 0.0)
        else:
            a_scale = tl.load(a_scale_ptr + row, row_mask, 0.0)
        if B_GROUPED:
            b_scale = tl.load(b_scale_ptr + col * groups + g, col_mask, 0.0)
        else:
            b_scale = tl.load(b_scale_ptr + col, col_mask, 0.0)
        out += value * (a_scale[:, None] * b_scale[None, :])
    store_tile(out, out_ptr, bias_ptr, row, col, row_mask, col_mask, n)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(m: int, group: int) -> Config:
    """Few rows stream the weight: narrow tiles make enough programs. A block of K lies in one group."""
    block_k = 32 if group <= 32 else 64 if group <= 64 else 128
    if m <= 16:
        return Config(16, 64, block_k, 4, 4)
    if m <= 64:
        return Config(64, 64, block_k, 4, 3)
    return Config(128, 128, min(block_k, 64), 8, 3)


def int8_matmul_fwd(a, a_scale, b, b_scale, bias, a_zero, out_dtype):
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    a_groups, b_groups = (scale.shape[1] if scale.ndim == 2 else 1 for scale in (a_scale, b_scale))
    groups = b_groups if a_groups == 1 else a_groups
    group = k // groups if groups else 0
    tile = config(m, group)
    with on_device(a):
        int8_matmul_fwd_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            a,
            a.stride(0),
            a_scale.contiguous(),
            None if a_zero is None else a_zero.contiguous(),
            b,
            b.stride(0),
            b_scale.contiguous(),
            bias,
            out,
            m,
            n,
            group,
            groups,
            A_GROUPED=a_groups != 1,
            B_GROUPED=b_groups != 1,
            WIDE=group > SPAN.value,
            EVEN=group % tile.block_k == 0,
            GROUP_M=8,
            enable_fp_fusion=False,
            **constants(tile),
        )
    return out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    n = k = 4096
    for m in (1, 64, 4096):
        for name, groups in (("rows", 1), ("groups", k // 128)):
            a_scale, b_scale = tensor("fp32", m, groups), tensor("fp32", n, groups)
            yield AotCase(f"m{m}_{name}", call("int8_matmul", tensor("i8", m, k), a_scale, tensor("i8", n, k), b_scale))
    zero = tensor("u8", 64)
    args = tensor("u8", 64, k), tensor("fp32", 64), tensor("i8", n, k), tensor("fp32", n), tensor("fp32", n), zero
    yield AotCase("m64_asymmetric", call("int8_matmul", *args))
