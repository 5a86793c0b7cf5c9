"""Rotary embedding and paged cache write: a program takes a block of tokens by a block of heads of q, k or v."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.fp8 import encode, native_cast
from ..common.launch import on_device, vector_width
from .host import check_slots, token_positions
from .rope import (
    LAYOUTS,
    config,
    layout,
    load_tables,
    position_strides,
    rotate_block,
    rotate_half,
    strides_of,
    token_rows,
)


class Store(NamedTuple):
    """How k and v are stored."""

    DV: tl.constexpr
    CACHE_VEC: tl.constexpr
    FP8: tl.constexpr
    NATIVE: tl.constexpr
    WIDE_SLOTS: tl.constexpr
    BLOCK_V: tl.constexpr


@functools.lru_cache
def store(*values: int | bool) -> Store:
    return Store(*map(tl.constexpr, values))


@triton.jit
def _store(pointer, value, scale, mask, FP8: tl.constexpr, NATIVE: tl.constexpr):
    if FP8:
        tl.store(pointer, encode(tl.div_rn(value.to(tl.float32), scale), NATIVE), mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def _append_block(
    x_ptr,
    x_sb,
    x_ss,
    x_sh,
    cache_ptr,
    cache_sp,
    cache_so,
    cache_sh,
    scale,
    head_block,
    batch,
    place,
    page,
    offset,
    valid,
    cos,
    sin,
    L,
    S,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    """Rows of k (HALF > 0) or v (HALF == 0) to their slots."""
    head = head_block * L.BLOCK_H + tl.arange(0, L.BLOCK_H)
    mask = (valid[:, None] & (head < HEADS)[None, :])[:, :, None]
    head = head.to(tl.int64)[None, :]
    x_row = x_ptr + ((batch * x_sb + place * x_ss)[:, None] + head * x_sh)[:, :, None] * L.VEC  # [BLOCK_T, BLOCK_H, 1]
    out_row = cache_ptr + ((page * cache_sp + offset * cache_so)[:, None] + head * cache_sh)[:, :, None] * S.CACHE_VEC
    if HALF > 0:
        cos = cos[:, None, :]
        sin = sin[:, None, :]
        if INTERLEAVED:
            dim = tl.arange(0, 2 * L.BLOCK_HALF)[None, None, :]
            inside = mask & (dim < 2 * HALF)
            x = tl.load(x_row + OFFSET + dim, inside, 0.0)  # [BLOCK_T, BLOCK_H, R]
            a, b = tl.split(tl.reshape(x, (L.BLOCK_T, L.BLOCK_H, L.BLOCK_HALF, 2)))
            a, b = rotate_half(a.to(tl.float32), b.to(tl.float32), cos, sin)
            _store(
                out_row + OFFSET + dim,
                tl.reshape(tl.join(a, b), (L.BLOCK_T, L.BLOCK_H, 2 * L.BLOCK_HALF)),
                scale,
                inside,
                S.FP8,
                S.NATIVE,
            )
        else:
            pair = tl.arange(0, L.BLOCK_HALF)[None, None, :]
            inside = mask & (pair < HALF)
            a = tl.load(x_row + OFFSET + pair, inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, R / 2]
            b = tl.load(x_row + OFFSET + HALF + pair, inside, 0.0).to(tl.float32)
            a, b = rotate_half(a, b, cos, sin)
            _store(out_row + OFFSET + pair, a, scale, inside, S.FP8, S.NATIVE)
            _store(out_row + OFFSET + HALF + pair, b, scale, inside, S.FP8, S.NATIVE)
    dim = tl.arange(0, BLOCK_COPY)[None, None, :]
    for start in tl.static_range(0, OFFSET, BLOCK_COPY):
        inside = mask & (dim < OFFSET - start)
        _store(out_row + start + dim, tl.load(x_row + start + dim, inside), scale, inside, S.FP8, S.NATIVE)
    for start in tl.static_range(OFFSET + 2 * HALF, D, BLOCK_COPY):
        inside = mask & (dim < D - start)
        _store(out_row + start + dim, tl.load(x_row + start + dim, inside), scale, inside, S.FP8, S.NATIVE)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "seq_len",
        "table_rows",
        "slots",
        "page_size",
        "k_scale",
        "v_scale",
        "cos_st",
        "sin_st",
        "pos_sb",
        "pos_ss",
        "slot_sb",
        "slot_ss",
        "q_sb",
        "q_ss",
        "q_sh",
        "k_sb",
        "k_ss",
        "k_sh",
        "v_sb",
        "v_ss",
        "v_sh",
        "kc_sp",
        "kc_so",
        "kc_sh",
        "vc_sp",
        "vc_so",
        "vc_sh",
    ]
)
def rope_append_kv_fwd_kernel(
    q_ptr,
    q_sb,
    q_ss,
    q_sh,
    qo_ptr,
    k_ptr,
    k_sb,
    k_ss,
    k_sh,
    v_ptr,
    v_sb,
    v_ss,
    v_sh,
    kc_ptr,
    kc_sp,
    kc_so,
    kc_sh,
    vc_ptr,
    vc_sp,
    vc_so,
    vc_sh,
    k_scale,
    v_scale,
    cos_ptr,
    sin_ptr,
    cos_st,
    sin_st,
    pos_ptr,
    pos_sb,
    pos_ss,
    slot_ptr,
    slot_sb,
    slot_ss,
    slots,
    page_size,
    tokens,
    seq_len,
    table_rows,
    L,
    S,
):
    token = tl.program_id(0) * L.BLOCK_T + tl.arange(0, L.BLOCK_T)
    mask = token < tokens
    batch = (token // seq_len).to(tl.int64)
    place = (token % seq_len).to(tl.int64)
    row = token_rows(pos_ptr, pos_sb, pos_ss, None, 0, token, batch, place, mask, table_rows)
    cos, sin = load_tables(
        cos_ptr,
        sin_ptr,
        cos_st,
        sin_st,
        row,
        row,
        row,
        mask,
        L,
        False,
        False,
        False,
        0,
        0,
        0,
    )
    slot = tl.load(slot_ptr + batch * slot_sb + place * slot_ss, mask, -1).to(tl.int64)
    # a slot past the cache is skipped like a negative one
    valid = mask & (slot >= 0) & (slot < slots)
    if S.WIDE_SLOTS:
        page = slot // page_size
        offset = slot % page_size
    else:
        # a 64-bit division is a subroutine, whose calling convention costs registers and a stack frame
        narrow = tl.where(valid, slot, 0).to(tl.int32)
        page = (narrow // page_size).to(tl.int64)
        offset = (narrow % page_size).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (L.HQ + L.BLOCK_H - 1) // L.BLOCK_H
    k_blocks: tl.constexpr = (L.HK + L.BLOCK_H - 1) // L.BLOCK_H
    if block < q_blocks:
        rotate_block(
            q_ptr,
            q_sb,
            q_ss,
            q_sh,
            qo_ptr,
            seq_len.to(tl.int64) * (L.HQ * L.D // L.VEC),
            L.HQ * L.D // L.VEC,
            L.D // L.VEC,
            block,
            batch,
            place,
            mask,
            cos,
            sin,
            L,
            L.HQ,
            True,
        )
    elif block < q_blocks + k_blocks:
        _append_block(
            k_ptr,
            k_sb,
            k_ss,
            k_sh,
            kc_ptr,
            kc_sp,
            kc_so,
            kc_sh,
            k_scale,
            block - q_blocks,
            batch,
            place,
            page,
            offset,
            valid,
            cos,
            sin,
            L,
            S,
            L.HK,
            L.D,
            L.HALF,
            L.OFFSET,
            L.INTERLEAVED,
            L.BLOCK_COPY,
        )
    else:
        _append_block(
            v_ptr,
            v_sb,
            v_ss,
            v_sh,
            vc_ptr,
            vc_sp,
            vc_so,
            vc_sh,
            v_scale,
            block - q_blocks - k_blocks,
            batch,
            place,
            page,
            offset,
            valid,
            cos,
            sin,
            L,
            S,
            L.HK,
            S.DV,
            0,
            0,
            False,
            S.BLOCK_V,
        )


def rope_append_kv_fwd(
    q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, interleaved, rotary_offset, k_scale, v_scale
):
    if q.device.type == "cpu":
        check_slots(slot_mapping, k_cache)
        token_positions("rope_append_kv", q.shape[:-2], cos.shape[0], positions, None, q.device)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seq_len = q.shape[-3]
    tokens = seq_len if q.ndim == 3 else q.shape[0] * seq_len
    heads, half, dim, dim_v = (q.shape[-2], k.shape[-2]), cos.shape[1], q.shape[-1], v.shape[-1]
    if tokens == 0 or sum(heads) == 0:
        return q_out
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    vec, (q_st, _, k_st, v_st) = strides_of(q, q_out, k, v)
    # the widest store of a row that was loaded in 16 bytes
    cache_vec = vector_width(max(k_cache.element_size(), 2), *k_cache.stride()[:3], *v_cache.stride()[:3])
    table_vec = vector_width(4, cos.stride(0), sin.stride(0))
    tile = config(heads, 2 * half, dim - 2 * half)
    slots = k_cache.shape[0] * k_cache.shape[1]
    grid = (triton.cdiv(tokens, tile.block_t), sum(triton.cdiv(h, tile.block_h) for h in (*heads, heads[1])))
    block_v = min(128, triton.next_power_of_2(max(dim_v, 1)))
    with on_device(q):
        rope_append_kv_fwd_kernel[grid](
            q,
            *q_st,
            q_out,
            k,
            *k_st,
            v,
            *v_st,
            k_cache,
            *(s // cache_vec for s in k_cache.stride()[:3]),
            v_cache,
            *(s // cache_vec for s in v_cache.stride()[:3]),
            k_scale,
            v_scale,
            cos,
            sin,
            cos.stride(0) // table_vec,
            sin.stride(0) // table_vec,
            positions,
            *position_strides(positions, q, ()),
            slot_mapping,
            *position_strides(slot_mapping, q, ()),
            slots,
            k_cache.shape[1],
            tokens,
            seq_len,
            cos.shape[0],
            layout(heads, dim, half, rotary_offset, interleaved, vec, table_vec, tile=tile),
            store(dim_v, cache_vec, fp8, fp8 and native_cast(q.device), slots >= 2**31, block_v),
            num_warps=tile.num_warps,
        )
    return q_out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for name, heads, dim, rotary, offset, interleaved in LAYOUTS:
        table, where = tensor("fp32", 8192, rotary // 2), tensor("i64", 2, 4096)
        q, k = (tensor("bf16", 2, 4096, h, dim) for h in heads)
        for cache in ("bf16", "fp8"):
            pages = tensor(cache, 256, 64, heads[1], dim)
            inputs = q, k, k, table, table, where, pages, pages, where
            run = call("rope_append_kv", *inputs, interleaved=interleaved, rotary_offset=offset)
            yield AotCase(f"{name}_{cache}", run, expect=("LDG.128", "STG.128"))
