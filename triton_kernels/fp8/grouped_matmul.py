"""Grouped block-scaled e4m3 matmul: the tiles of ``fp8_matmul``, each against its own expert's weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.grouped import find_tile, max_tiles
from ..common.launch import constants, on_device
from ..common.rows import Experts, Matrix
from .matmul import (
    MATRIX_UNIT,
    Config,
    accumulate,
    capability_of,
    narrow,
    operand,
    store_tile,
    upcasts,
)


@triton.jit(do_not_specialize=["a_scale_block", "m"])
def fp8_grouped_matmul_fwd_kernel(
    a: Matrix,
    a_scale: Matrix,
    a_scale_block,
    b: Experts,
    b_scale: Experts,
    offsets_ptr,
    out_ptr,
    m,
    n,
    k,
    GROUPS: tl.constexpr,
    B_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of out: columns run fastest, so programs that share rows of a run together."""
    n_tiles = tl.cdiv(n, BLOCK_N)
    group, first, end = find_tile(tl.program_id(0) // n_tiles, offsets_ptr, m, GROUPS, BLOCK_M)
    if first >= end:
        return
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_mask = row < end
    col = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if group >= GROUPS:
        # rows that belong to no expert
        mask = row_mask[:, None] & (col < n)[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * n + col[None, :], zeros, mask)
    else:
        g = group.to(tl.int64)
        acc = accumulate(
            a.ptr,
            a.row,
            a_scale.ptr,
            a_scale.row,
            a_scale_block,
            b.ptr + g * b.expert,
            b.row,
            b_scale.ptr + g * b_scale.expert,
            b_scale.row,
            b_scale.column,
            row,
            row_mask,
            col,
            n,
            k,
            0,
            tl.cdiv(k, 128),
            B_ROWS,
            UPCAST,
            SWAP,
            EVEN_K,
            BLOCK_M,
            BLOCK_N,
        )
        store_tile(acc, out_ptr, None, row, row_mask, col, n, SWAP)


def config(m: int, groups: int, capability: int, b_rows: bool = False) -> Config:
    """The tile for an average group on an architecture (90 for sm_90; 0 for AMD and the interpreter)."""
    average = m // max(groups, 1)
    if average <= 48:
        return narrow(average, capability, b_rows)
    if capability == 80 and b_rows:
        return Config(64, 32, 8, 3)
    if capability < 89:
        return Config(64, 64, 8 if capability else 4, 3 if capability else 2)
    if capability in (89, 120):
        return Config(64, 128, 8, 3)
    return Config(64, 128, 4, 4) if average <= 96 or (capability >= 100 and b_rows) else Config(128, 128, 8, 3)


def fp8_grouped_matmul_fwd(a, a_scale, b, b_scale, offsets, out_dtype):
    (m, k), (groups, n) = a.shape, b.shape[:2]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    b_rows = b_scale.shape[1] == n
    tile = config(m, groups, capability_of(a.device), b_rows)
    grid = (max_tiles(m, groups, tile.block_m) * triton.cdiv(n, tile.block_n),)
    with on_device(a):
        fp8_grouped_matmul_fwd_kernel[grid](
            Matrix.of(operand(a)),
            Matrix.of(a_scale),
            a_scale.stride(1),
            Experts.of(operand(b)),
            Experts.of(b_scale),
            offsets,
            out,
            m,
            n,
            k,
            GROUPS=groups,
            B_ROWS=b_rows,
            UPCAST=upcasts(a.device),
            SWAP=tile.swap,
            EVEN_K=k % 128 == 0,
            **constants(tile),
        )
    return out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    n, k = 4096, 7168
    for rows, groups in ((256, 256), (32768, 256), (32768, 64)):
        a, a_scale = tensor("fp8", rows, k), tensor("fp32", rows, k // 128)
        b, b_scale = tensor("fp8", groups, n, k), tensor("fp32", groups, n // 128, k // 128)
        yield AotCase(
            f"e{groups}_t{rows}",
            call("fp8_grouped_matmul", a, a_scale, b, b_scale, tensor("i32", groups + 1)),
            expect=MATRIX_UNIT,
        )
