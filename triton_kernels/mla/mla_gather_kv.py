"""Paged latent rows to one packed tensor, dequantised on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import fp8
from ..common.launch import RowConfig, constants, on_device, vector_width
from .host import layout as layouts

# columns of one scale
GROUP = tl.constexpr(layouts.GROUP)


@triton.jit
def load_scales(rows, exists, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """[ROWS, R / GROUP] float32, one per group of codes."""
    group = tl.arange(0, RANK_PAD // GROUP)
    keep = exists[:, None] & (group < RANK // GROUP)[None, :]
    return tl.load(rows[:, None] + group[None, :], mask=keep, other=0.0)


@triton.jit
def dequantize(codes, scale, NATIVE: tl.constexpr, RANK_PAD: tl.constexpr):
    """[ROWS, R] float32 values of e4m3 codes (uint8)."""
    if NATIVE:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # the bits of e4m3 moved into float16's places are the value times 2^-8, subnormals included
        bits = codes.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        values = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    groups: tl.constexpr = RANK_PAD // GROUP
    values = tl.reshape(values, [codes.shape[0], groups, GROUP]) * scale[:, :, None]
    return tl.reshape(values, [codes.shape[0], RANK_PAD])


@triton.jit(do_not_specialize=["tokens", "num_bounds", "columns", "pages", "table_stride"])
def mla_gather_kv_fwd_kernel(
    latent_ptr,
    scales_ptr,
    rotated_ptr,
    block_table_ptr,
    cu_seqlens_ptr,
    out_ptr,
    tokens,
    num_bounds,
    columns,
    pages,
    table_stride,
    latent_page,
    latent_row,
    scale_page,
    scale_row,
    rotated_page,
    rotated_row,
    PAGE_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ROPE_VEC: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < tokens
    # binary search: how many bounds are at or before each token
    low = tl.zeros_like(token)
    high = low + num_bounds
    steps = num_bounds
    while steps > 0:
        middle = (low + high) // 2
        active = low < high
        bound = tl.load(cu_seqlens_ptr + middle, mask=mask & active, other=0).to(tl.int64)
        below = bound <= token
        low = tl.where(active & below, middle + 1, low)
        high = tl.where(active & (bound > token), middle, high)
        steps = steps // 2
    # past the last bound, or before the first: a zero row
    found = mask & (low > 0) & (low < num_bounds)
    sequence = tl.where(found, low - 1, 0)
    key = token - tl.load(cu_seqlens_ptr + sequence, mask=found, other=0).to(tl.int64)
    found &= key // PAGE_SIZE < columns
    page = tl.load(block_table_ptr + sequence * table_stride + key // PAGE_SIZE, mask=found, other=-1).to(tl.int64)
    found &= (page >= 0) & (page < pages)
    page = tl.where(found, page, 0)
    offset = tl.where(found, key % PAGE_SIZE, 0)
    column = tl.arange(0, RANK_PAD)
    row_in = latent_ptr + page * latent_page + offset * latent_row
    row_out = out_ptr + token * (RANK + ROPE)
    dtype = out_ptr.dtype.element_ty
    inside = (column < RANK)[None, :]
    x = tl.load(row_in[:, None] + column[None, :], mask=found[:, None] & inside, other=0)  # [BLOCK_T, R]
    if FP8:
        row_scale = scales_ptr + page * scale_page + offset * scale_row
        x = dequantize(x, load_scales(row_scale, found, RANK, RANK_PAD), NATIVE, RANK_PAD)
    tl.store(row_out[:, None] + column[None, :], x.to(dtype), mask=mask[:, None] & inside)
    if ROPE > 0:
        column_r = tl.arange(0, ROPE_PAD)
        inside_r = (column_r < ROPE)[None, :]
        row_rope = rotated_ptr + (page * rotated_page + offset * rotated_row) * ROPE_VEC
        y = tl.load(row_rope[:, None] + column_r[None, :], mask=found[:, None] & inside_r, other=0.0)  # [BLOCK_T, r]
        tl.store(row_out[:, None] + RANK + column_r[None, :], y.to(dtype), mask=mask[:, None] & inside_r)


def config(rank: int) -> RowConfig:
    """About 4,096 elements for each program."""
    return RowConfig(max(1, min(16, 4096 // triton.next_power_of_2(rank))), 4)


def cache_parts(cache: Tensor, row: layouts.RowLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the latent values or codes, their scales (fp8 only), and the rotated part."""
    if row.is_fp8:
        return layouts.fp8_parts(cache, row)
    return cache, cache, cache[..., row.rope_offset :]


def rope_vector(rotated: Tensor) -> int:
    """Elements that the rotated part's rows are aligned to, in fp8 rows too: strides are passed in this unit."""
    return vector_width(rotated.element_size(), rotated.storage_offset(), *rotated.stride()[:2])


def mla_gather_kv_fwd(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total_tokens: int,
    kv_lora_rank: int,
    layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    row = layouts.row_layout(layout, kv_lora_rank, cache.shape[-1])
    out = torch.empty(total_tokens, row.rank + row.rope_dim, dtype=out_dtype, device=cache.device)
    if total_tokens == 0:
        return out
    if cache.numel() == 0 or block_table.numel() == 0:
        return out.zero_()
    latent, scales, rotated = cache_parts(cache, row)
    rope_vec = rope_vector(rotated)
    tile = config(row.rank)
    with on_device(cache):
        mla_gather_kv_fwd_kernel[(triton.cdiv(total_tokens, tile.block_t),)](
            latent,
            scales,
            rotated,
            block_table,
            cu_seqlens,
            out,
            total_tokens,
            cu_seqlens.shape[0],
            block_table.shape[1],
            cache.shape[0],
            block_table.stride(0),
            *latent.stride()[:2],
            *scales.stride()[:2],
            *(s // rope_vec for s in rotated.stride()[:2]),
            PAGE_SIZE=cache.shape[1],
            FP8=row.is_fp8,
            NATIVE=row.is_fp8 and fp8.native_cast(cache.device),
            ROPE_VEC=rope_vec,
            RANK=row.rank,
            RANK_PAD=triton.next_power_of_2(row.rank),
            ROPE=row.rope_dim,
            ROPE_PAD=triton.next_power_of_2(max(1, row.rope_dim)),
            **constants(tile),
        )
    return out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for layout, cache in (("bf16", tensor("bf16", 256, 64, 576)), ("fp8", tensor("u8", 256, 64, 656))):
        gathered = call(
            "mla_gather_kv", cache, tensor("i32", 8, 64), tensor("i32", 9), total_tokens=8192, layout=layout
        )
        yield AotCase(layout, gathered, expect=("LDG.128", "STG.128"))
