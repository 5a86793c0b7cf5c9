"""Rotary embedding: one program rotates a block of tokens by a block of heads, of q or of k."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import on_device, vector_width
from .host import token_positions


@triton.jit
def token_rows(pos_ptr, pos_sb, pos_ss, cu_ptr, num_bounds, token, batch, place, mask, table_rows):
    """Table row of every token, int64, never outside of the table."""
    if pos_ptr is not None:
        row = tl.load(pos_ptr + batch * pos_sb + place * pos_ss, mask, 0).to(tl.int64)
    elif cu_ptr is not None:
        # binary search for the number of boundaries at or before each token
        low = tl.zeros_like(token)
        high = low + num_bounds
        steps = num_bounds
        while steps > 0:
            middle = (low + high) // 2
            open_ = low < high
            bound = tl.load(cu_ptr + middle, mask & open_, 0).to(tl.int32)
            below = bound <= token
            low = tl.where(open_ & below, middle + 1, low)
            high = tl.where(open_ & ~below, middle, high)
            steps = steps // 2
        start = tl.load(cu_ptr + low - 1, mask & (low > 0), 0).to(tl.int64)
        row = token.to(tl.int64) - start
    else:
        row = place.to(tl.int64)
    return tl.minimum(tl.maximum(row, 0), table_rows - 1)


@triton.jit
def load_tables(
    cos_ptr,
    sin_ptr,
    cos_st,
    sin_st,
    row,
    row_h,
    row_w,
    mask,
    L,
    CONJUGATE: tl.constexpr,
    MROPE: tl.constexpr,
    MROPE_INTERLEAVED: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
):
    """cos and sin of a block of tokens, [BLOCK_T, BLOCK_HALF]."""
    pair = tl.arange(0, L.BLOCK_HALF)[None, :]
    mask = mask[:, None] & (pair < L.HALF)
    row = row[:, None]
    if MROPE:
        if MROPE_INTERLEAVED:
            is_h = (pair % 3 == 1) & (pair < 3 * SECTION_H)
            is_w = (pair % 3 == 2) & (pair < 3 * SECTION_W)
        else:
            is_h = (pair >= SECTION_T) & (pair < SECTION_T + SECTION_H)
            is_w = pair >= SECTION_T + SECTION_H
        row = tl.where(is_h, row_h[:, None], tl.where(is_w, row_w[:, None], row))
    cos = tl.load(cos_ptr + row * cos_st * L.TABLE_VEC + pair, mask, 0.0)  # [BLOCK_T, R / 2]
    sin = tl.load(sin_ptr + row * sin_st * L.TABLE_VEC + pair, mask, 0.0)
    if CONJUGATE:
        sin = -sin
    return cos, sin


@triton.jit
def rotate_half(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotate_block(
    x_ptr,
    x_sb,
    x_ss,
    x_sh,
    out_ptr,
    out_sb,
    out_ss,
    out_sh,
    head_block,
    batch,
    place,
    token_mask,
    cos,
    sin,
    L,
    HEADS: tl.constexpr,
    COPY: tl.constexpr,
):
    head = head_block * L.BLOCK_H + tl.arange(0, L.BLOCK_H)
    mask = token_mask[:, None] & (head < HEADS)[None, :]
    mask = mask[:, :, None]
    head = head.to(tl.int64)[None, :]
    # strides come in units of VEC elements, so that the compiler knows how far every row is aligned
    x_row = x_ptr + ((batch * x_sb + place * x_ss)[:, None] + head * x_sh)[:, :, None] * L.VEC  # [BLOCK_T, BLOCK_H, 1]
    out_row = out_ptr + ((batch * out_sb + place * out_ss)[:, None] + head * out_sh)[:, :, None] * L.VEC
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    if L.INTERLEAVED:
        # one contiguous access, the pairs are parted in registers
        dim = tl.arange(0, 2 * L.BLOCK_HALF)[None, None, :]
        inside = mask & (dim < 2 * L.HALF)
        x = tl.load(x_row + L.OFFSET + dim, inside, 0.0)  # [BLOCK_T, BLOCK_H, R]
        a, b = tl.split(tl.reshape(x, (L.BLOCK_T, L.BLOCK_H, L.BLOCK_HALF, 2)))
        a, b = rotate_half(a.to(tl.float32), b.to(tl.float32), cos, sin)
        out = tl.reshape(tl.join(a, b), (L.BLOCK_T, L.BLOCK_H, 2 * L.BLOCK_HALF))
        tl.store(out_row + L.OFFSET + dim, out.to(out_ptr.dtype.element_ty), inside)
    else:
        pair = tl.arange(0, L.BLOCK_HALF)[None, None, :]
        inside = mask & (pair < L.HALF)
        a = tl.load(x_row + L.OFFSET + pair, inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, R / 2]
        b = tl.load(x_row + L.OFFSET + L.HALF + pair, inside, 0.0).to(tl.float32)
        a, b = rotate_half(a, b, cos, sin)
        tl.store(out_row + L.OFFSET + pair, a.to(out_ptr.dtype.element_ty), inside)
        tl.store(out_row + L.OFFSET + L.HALF + pair, b.to(out_ptr.dtype.element_ty), inside)
    if COPY:
        dim = tl.arange(0, L.BLOCK_COPY)[None, None, :]
        for start in tl.static_range(0, L.OFFSET, L.BLOCK_COPY):
            inside = mask & (dim < L.OFFSET - start)
            tl.store(out_row + start + dim, tl.load(x_row + start + dim, inside), inside)
        for start in tl.static_range(L.OFFSET + 2 * L.HALF, L.D, L.BLOCK_COPY):
            inside = mask & (dim < L.D - start)
            tl.store(out_row + start + dim, tl.load(x_row + start + dim, inside), inside)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "seq_len",
        "table_rows",
        "num_bounds",
        "cos_st",
        "sin_st",
        "pos_sa",
        "pos_sb",
        "pos_ss",
        "q_sb",
        "q_ss",
        "q_sh",
        "qo_sb",
        "qo_ss",
        "qo_sh",
        "k_sb",
        "k_ss",
        "k_sh",
        "ko_sb",
        "ko_ss",
        "ko_sh",
    ]
)
def rope_kernel(
    q_ptr,
    q_sb,
    q_ss,
    q_sh,
    qo_ptr,
    qo_sb,
    qo_ss,
    qo_sh,
    k_ptr,
    k_sb,
    k_ss,
    k_sh,
    ko_ptr,
    ko_sb,
    ko_ss,
    ko_sh,
    cos_ptr,
    sin_ptr,
    cos_st,
    sin_st,
    pos_ptr,
    pos_sa,
    pos_sb,
    pos_ss,
    cu_ptr,
    num_bounds,
    tokens,
    seq_len,
    table_rows,
    L,
    CONJUGATE: tl.constexpr,
    COPY: tl.constexpr,
    MROPE: tl.constexpr,
    MROPE_INTERLEAVED: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
):
    token = tl.program_id(0) * L.BLOCK_T + tl.arange(0, L.BLOCK_T)
    mask = token < tokens
    batch = (token // seq_len).to(tl.int64)
    place = (token % seq_len).to(tl.int64)
    row = token_rows(pos_ptr, pos_sb, pos_ss, cu_ptr, num_bounds, token, batch, place, mask, table_rows)
    row_h = row
    row_w = row
    if MROPE:
        row_h = token_rows(pos_ptr + pos_sa, pos_sb, pos_ss, cu_ptr, num_bounds, token, batch, place, mask, table_rows)
        row_w = token_rows(
            pos_ptr + 2 * pos_sa, pos_sb, pos_ss, cu_ptr, num_bounds, token, batch, place, mask, table_rows
        )
    cos, sin = load_tables(
        cos_ptr,
        sin_ptr,
        cos_st,
        sin_st,
        row,
        row_h,
        row_w,
        mask,
        L,
        CONJUGATE,
        MROPE,
        MROPE_INTERLEAVED,
        SECTION_T,
        SECTION_H,
        SECTION_W,
    )
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (L.HQ + L.BLOCK_H - 1) // L.BLOCK_H
    if block < q_blocks:
        rotate_block(
            q_ptr,
            q_sb,
            q_ss,
            q_sh,
            qo_ptr,
            qo_sb,
            qo_ss,
            qo_sh,
            block,
            batch,
            place,
            mask,
            cos,
            sin,
            L,
            L.HQ,
            COPY,
        )
    elif k_ptr is not None:
        rotate_block(
            k_ptr,
            k_sb,
            k_ss,
            k_sh,
            ko_ptr,
            ko_sb,
            ko_ss,
            ko_sh,
            block - q_blocks,
            batch,
            place,
            mask,
            cos,
            sin,
            L,
            L.HK,
            COPY,
        )


@dataclass(frozen=True)
class Config:
    """Tile of one program: tokens by heads, half a rotary slice, and the step over what is only copied."""

    block_t: int
    block_h: int
    block_half: int
    block_copy: int
    num_warps: int


def config(heads: tuple[int, ...], rotary_dim: int, pass_dim: int, elements: int = 4096) -> Config:
    """A power of two of heads that wastes none, then tokens up to so many elements."""
    block_h = 8
    while block_h > 1 and any(h % block_h for h in heads):
        block_h //= 2
    width = triton.next_power_of_2(rotary_dim)
    block_copy = min(128, triton.next_power_of_2(max(pass_dim, 1)))
    block_t = max(1, min(32, elements // (block_h * max(width, block_copy))))
    return Config(block_t, block_h, width // 2, block_copy, 4)


class Layout(NamedTuple):
    """Heads and tile that a kernel is compiled for."""

    HQ: tl.constexpr
    HK: tl.constexpr
    D: tl.constexpr
    HALF: tl.constexpr
    OFFSET: tl.constexpr
    INTERLEAVED: tl.constexpr
    VEC: tl.constexpr
    TABLE_VEC: tl.constexpr
    BLOCK_T: tl.constexpr
    BLOCK_H: tl.constexpr
    BLOCK_HALF: tl.constexpr
    BLOCK_COPY: tl.constexpr


@functools.lru_cache
def layout(heads: tuple[int, int], *values: int | bool, tile: Config) -> Layout:
    """Head counts of q and k, then the values as they stand in `Layout`, and the tile."""
    blocks = tile.block_t, tile.block_h, tile.block_half, tile.block_copy
    return Layout(*map(tl.constexpr, (*heads, *values, *blocks)))


def strides_of(*tensors):
    """Vector width of the rows, and each tensor's batch, sequence and head stride in units of it."""
    strides = []
    for x in tensors:
        if x is None:
            strides.append((0, 0, 0))
        else:
            # packed input is one batch
            strides.append(x.stride()[:3] if x.ndim == 4 else (0, *x.stride()[:2]))
    vec = vector_width(tensors[0].element_size(), *(s for each in strides for s in each))
    return vec, [tuple(s // vec for s in each) for each in strides]


def position_strides(positions, x, mrope_section):
    """Axis (with mrope only), batch and sequence stride."""
    if positions is None:
        return (0, 0, 0) if mrope_section else (0, 0)
    strides = positions.stride()
    if x.ndim == 3:
        return (*strides[:-1], 0, strides[-1])
    return strides


def _launch(
    name,
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    positions,
    cu_seqlens,
    interleaved,
    rotary_offset,
    conjugate,
    mrope_section,
    mrope_interleaved,
):
    if q.device.type == "cpu":
        token_positions(name, q.shape[:-2], cos.shape[0], positions, cu_seqlens, q.device)
    seq_len = q.shape[-3]
    tokens = seq_len if q.ndim == 3 else q.shape[0] * seq_len
    heads = (q.shape[-2],) if k is None else (q.shape[-2], k.shape[-2])
    if tokens == 0 or sum(heads) == 0:
        return
    vec, (q_st, qo_st, k_st, ko_st) = strides_of(q, q_out, k, k_out)
    table_vec = vector_width(4, cos.stride(0), sin.stride(0))
    pos_st = position_strides(positions, q, mrope_section)
    half = cos.shape[1]
    section = mrope_section or (0, 0, 0)
    tile = config(heads, 2 * half, q.shape[-1] - 2 * half)
    grid = (triton.cdiv(tokens, tile.block_t), sum(triton.cdiv(h, tile.block_h) for h in heads))
    of_q_and_k = (heads[0], 0 if k is None else heads[1])
    with on_device(q):
        rope_kernel[grid](
            q,
            *q_st,
            q_out,
            *qo_st,
            k,
            *k_st,
            k_out,
            *ko_st,
            cos,
            sin,
            cos.stride(0) // table_vec,
            sin.stride(0) // table_vec,
            positions,
            *(pos_st if mrope_section else (0, *pos_st)),
            cu_seqlens,
            0 if cu_seqlens is None else cu_seqlens.shape[0],
            tokens,
            seq_len,
            cos.shape[0],
            layout(of_q_and_k, q.shape[-1], half, rotary_offset, interleaved, vec, table_vec, tile=tile),
            CONJUGATE=conjugate,
            COPY=q_out is not q,
            MROPE=bool(mrope_section),
            MROPE_INTERLEAVED=mrope_interleaved,
            SECTION_T=section[0],
            SECTION_H=section[1],
            SECTION_W=section[2],
            num_warps=tile.num_warps,
        )


def rope_fwd(x, *rest):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("rope", x, None, out, None, *rest)
    return out


def rope_qk_fwd(q, k, *rest):
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _launch("rope_qk", q, k, q_out, k_out, *rest)
    return q_out, k_out


def rope_inplace(x, *rest):
    _launch("rope_", x, None, x, None, *rest)


def rope_qk_inplace(q, k, *rest):
    _launch("rope_qk_", q, k, q, k, *rest)


# name, heads, head dim, rotary dim, offset, interleaved: layouts of real models that the gate compiles
LAYOUTS = (
    ("llama", (32, 8), 128, 128, 0, False),
    ("gptj", (32, 8), 128, 128, 0, True),
    ("qwen3_next", (16, 2), 256, 64, 0, False),
    ("deepseek_query", (128, 1), 192, 64, 128, True),
    ("phi2", (32, 32), 80, 32, 0, False),
    ("dim96", (12, 3), 96, 96, 0, False),
)


def aot_cases():
    from ...testing.aot import AotCase, call, tensor, train

    for name, heads, dim, rotary, offset, interleaved in LAYOUTS:
        table = tensor("fp32", 8192, rotary // 2)
        options = {"interleaved": interleaved, "rotary_offset": offset}
        for dtype in ("bf16", "fp32") if name == "llama" else ("bf16",):
            q, k = (tensor(dtype, 2, 4096, h, dim) for h in heads)
            runs = {
                "qk": train("rope_qk", q, k, table, table, **options),
                "packed": call(
                    "rope", tensor(dtype, 8192, heads[0], dim), table, table, None, tensor("i32", 9), **options
                ),
                "inplace": call("rope_qk_", q, k, table, table, **options),
            }
            if name in ("llama", "gptj"):
                section = {"mrope_section": (rotary // 2 - 40, 20, 20), "mrope_interleaved": interleaved}
                runs["mrope"] = call("rope_qk", q, k, table, table, tensor("i64", 3, 2, 4096), **options, **section)
            for variant, run in runs.items():
                yield AotCase(f"{name}_{variant}_{dtype}", run, expect=("LDG.128", "STG.128"))
