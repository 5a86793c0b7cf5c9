"""RMSNorm of q and k heads, then rotary embedding: a program takes a block of tokens by a block of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...reference.rope.rope import token_positions
from ..common.launch import on_device, vector_width
from .rope import LAYOUTS, config, load_tables, position_strides, rotate_half, strides_of, token_rows


@triton.jit
def _norm_rope_block(
    x_ptr,
    x_sb,
    x_ss,
    x_sh,
    out_ptr,
    out_sb,
    out_ss,
    out_sh,
    weight_ptr,
    weight_offset,
    eps,
    head_block,
    batch,
    place,
    token_mask,
    cos,
    sin,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    head = head_block * BH + tl.arange(0, BH)
    mask = (token_mask[:, None] & (head < HEADS)[None, :])[:, :, None]
    head = head.to(tl.int64)[None, :]
    x_row = x_ptr + ((batch * x_sb + place * x_ss)[:, None] + head * x_sh)[:, :, None] * VEC  # [BT, BH, 1]
    out_row = out_ptr + ((batch * out_sb + place * out_ss)[:, None] + head * out_sh)[:, :, None] * VEC
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    dim = tl.arange(0, BLOCK_COPY)[None, None, :]
    wide = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
    if INTERLEAVED:
        x = tl.load(x_row + OFFSET + wide, mask & (wide < 2 * HALF), 0.0).to(tl.float32)  # [BT, BH, R]
        a, b = tl.split(tl.reshape(x, (BT, BH, BLOCK_HALF, 2)))
    else:
        a = tl.load(x_row + OFFSET + pair, mask & (pair < HALF), 0.0).to(tl.float32)  # [BT, BH, R / 2]
        b = tl.load(x_row + OFFSET + HALF + pair, mask & (pair < HALF), 0.0).to(tl.float32)
    square = tl.sum(a * a, 2) + tl.sum(b * b, 2)  # [BT, BH]
    for start in tl.static_range(0, OFFSET, BLOCK_COPY):
        c = tl.load(x_row + start + dim, mask & (dim < OFFSET - start), 0.0).to(tl.float32)
        square += tl.sum(c * c, 2)
    for start in tl.static_range(OFFSET + 2 * HALF, D, BLOCK_COPY):
        c = tl.load(x_row + start + dim, mask & (dim < D - start), 0.0).to(tl.float32)
        square += tl.sum(c * c, 2)
    rstd = (1.0 / tl.sqrt(square / D + eps))[:, :, None]
    if INTERLEAVED:
        weight = tl.load(weight_ptr + OFFSET + wide, wide < 2 * HALF, 0.0).to(tl.float32) + weight_offset
        wa, wb = tl.split(tl.reshape(weight, (1, 1, BLOCK_HALF, 2)))
        a, b = rotate_half(a * rstd * wa, b * rstd * wb, cos, sin)
        out = tl.reshape(tl.join(a, b), (BT, BH, 2 * BLOCK_HALF))
        tl.store(out_row + OFFSET + wide, out.to(out_ptr.dtype.element_ty), mask & (wide < 2 * HALF))
    else:
        wa = tl.load(weight_ptr + OFFSET + pair, pair < HALF, 0.0).to(tl.float32) + weight_offset
        wb = tl.load(weight_ptr + OFFSET + HALF + pair, pair < HALF, 0.0).to(tl.float32) + weight_offset
        a, b = rotate_half(a * rstd * wa, b * rstd * wb, cos, sin)
        tl.store(out_row + OFFSET + pair, a.to(out_ptr.dtype.element_ty), mask & (pair < HALF))
        tl.store(out_row + OFFSET + HALF + pair, b.to(out_ptr.dtype.element_ty), mask & (pair < HALF))
    for start in tl.static_range(0, OFFSET, BLOCK_COPY):
        inside = dim < OFFSET - start
        c = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
        tl.store(out_row + start + dim, (c * rstd * weight).to(out_ptr.dtype.element_ty), mask & inside)
    for start in tl.static_range(OFFSET + 2 * HALF, D, BLOCK_COPY):
        inside = dim < D - start
        c = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
        tl.store(out_row + start + dim, (c * rstd * weight).to(out_ptr.dtype.element_ty), mask & inside)


@triton.jit
def _norm_rope_bwd_block(
    grad_ptr,
    grad_sb,
    grad_ss,
    grad_sh,
    x_ptr,
    x_sb,
    x_ss,
    x_sh,
    out_ptr,
    out_sb,
    out_ss,
    out_sh,
    weight_ptr,
    weight_offset,
    partial_ptr,
    eps,
    head_block,
    batch,
    place,
    token_mask,
    cos,
    sin,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    head = head_block * BH + tl.arange(0, BH)
    mask = (token_mask[:, None] & (head < HEADS)[None, :])[:, :, None]
    head = head.to(tl.int64)[None, :]
    grad_row = grad_ptr + ((batch * grad_sb + place * grad_ss)[:, None] + head * grad_sh)[:, :, None] * VEC
    x_row = x_ptr + ((batch * x_sb + place * x_ss)[:, None] + head * x_sh)[:, :, None] * VEC  # [BT, BH, 1]
    out_row = out_ptr + ((batch * out_sb + place * out_ss)[:, None] + head * out_sh)[:, :, None] * VEC
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    dim = tl.arange(0, BLOCK_COPY)[None, None, :]
    wide = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
    # the rotary slice: gradients turned back, then both sums over the row
    if INTERLEAVED:
        inside = mask & (wide < 2 * HALF)
        g = tl.load(grad_row + OFFSET + wide, inside, 0.0).to(tl.float32)  # [BT, BH, R]
        ga, gb = tl.split(tl.reshape(g, (BT, BH, BLOCK_HALF, 2)))
        x = tl.load(x_row + OFFSET + wide, inside, 0.0).to(tl.float32)
        xa, xb = tl.split(tl.reshape(x, (BT, BH, BLOCK_HALF, 2)))
        weight = tl.load(weight_ptr + OFFSET + wide, wide < 2 * HALF, 0.0).to(tl.float32) + weight_offset
        wa, wb = tl.split(tl.reshape(weight, (1, 1, BLOCK_HALF, 2)))
    else:
        inside = mask & (pair < HALF)
        ga = tl.load(grad_row + OFFSET + pair, inside, 0.0).to(tl.float32)  # [BT, BH, R / 2]
        gb = tl.load(grad_row + OFFSET + HALF + pair, inside, 0.0).to(tl.float32)
        xa = tl.load(x_row + OFFSET + pair, inside, 0.0).to(tl.float32)
        xb = tl.load(x_row + OFFSET + HALF + pair, inside, 0.0).to(tl.float32)
        wa = tl.load(weight_ptr + OFFSET + pair, pair < HALF, 0.0).to(tl.float32) + weight_offset
        wb = tl.load(weight_ptr + OFFSET + HALF + pair, pair < HALF, 0.0).to(tl.float32) + weight_offset
    ga, gb = rotate_half(ga, gb, cos, sin)
    square = tl.sum(xa * xa, 2) + tl.sum(xb * xb, 2)  # [BT, BH]
    cross = tl.sum(ga * wa * xa, 2) + tl.sum(gb * wb * xb, 2)
    for part in tl.static_range(2):
        for start in tl.static_range(0 if part == 0 else OFFSET + 2 * HALF, OFFSET if part == 0 else D, BLOCK_COPY):
            inside = dim < (OFFSET if part == 0 else D) - start
            x = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32)
            g = tl.load(grad_row + start + dim, mask & inside, 0.0).to(tl.float32)
            w = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
            square += tl.sum(x * x, 2)
            cross += tl.sum(g * w * x, 2)
    rstd = 1.0 / tl.sqrt(square / D + eps)
    mean = (cross * rstd / D)[:, :, None]
    rstd = rstd[:, :, None]
    xa = xa * rstd
    xb = xb * rstd
    # rows past the end hold zeros and add nothing
    weight_a = tl.sum(tl.sum(ga * xa, 1), 0)  # [R / 2]
    weight_b = tl.sum(tl.sum(gb * xb, 1), 0)
    a = rstd * (ga * wa - xa * mean)
    b = rstd * (gb * wb - xb * mean)
    if INTERLEAVED:
        inside = mask & (wide < 2 * HALF)
        out = tl.reshape(tl.join(a, b), (BT, BH, 2 * BLOCK_HALF))
        tl.store(out_row + OFFSET + wide, out.to(out_ptr.dtype.element_ty), inside)
        flat = tl.arange(0, 2 * BLOCK_HALF)
        weight_ab = tl.reshape(tl.join(weight_a, weight_b), (2 * BLOCK_HALF,))
        tl.store(partial_ptr + OFFSET + flat, weight_ab, flat < 2 * HALF)
    else:
        inside = mask & (pair < HALF)
        tl.store(out_row + OFFSET + pair, a.to(out_ptr.dtype.element_ty), inside)
        tl.store(out_row + OFFSET + HALF + pair, b.to(out_ptr.dtype.element_ty), inside)
        flat = tl.arange(0, BLOCK_HALF)
        tl.store(partial_ptr + OFFSET + flat, weight_a, flat < HALF)
        tl.store(partial_ptr + OFFSET + HALF + flat, weight_b, flat < HALF)
    flat = tl.arange(0, BLOCK_COPY)
    for part in tl.static_range(2):
        for start in tl.static_range(0 if part == 0 else OFFSET + 2 * HALF, OFFSET if part == 0 else D, BLOCK_COPY):
            inside = dim < (OFFSET if part == 0 else D) - start
            x = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32) * rstd
            g = tl.load(grad_row + start + dim, mask & inside, 0.0).to(tl.float32)
            w = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
            tl.store(out_row + start + dim, (rstd * (g * w - x * mean)).to(out_ptr.dtype.element_ty), mask & inside)
            inside = flat < (OFFSET if part == 0 else D) - start
            tl.store(partial_ptr + start + flat, tl.sum(tl.sum(g * x, 1), 0), inside)


_RUNTIME = [
    "tokens",
    "seq_len",
    "table_rows",
    "num_bounds",
    "cos_st",
    "sin_st",
    "pos_sb",
    "pos_ss",
    "eps",
    "weight_offset",
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


@triton.jit(do_not_specialize=_RUNTIME)
def qk_norm_rope_kernel(
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
    q_weight_ptr,
    k_weight_ptr,
    weight_offset,
    eps,
    cos_ptr,
    sin_ptr,
    cos_st,
    sin_st,
    pos_ptr,
    pos_sb,
    pos_ss,
    cu_ptr,
    num_bounds,
    tokens,
    seq_len,
    table_rows,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr,
    TABLE_VEC: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    mask = token < tokens
    batch = (token // seq_len).to(tl.int64)
    place = (token % seq_len).to(tl.int64)
    row = token_rows(pos_ptr, pos_sb, pos_ss, cu_ptr, num_bounds, token, batch, place, mask, table_rows)
    cos, sin = load_tables(
        cos_ptr,
        sin_ptr,
        cos_st,
        sin_st,
        row,
        row,
        row,
        mask,
        HALF,
        BLOCK_HALF,
        TABLE_VEC,
        False,
        False,
        False,
        0,
        0,
        0,
    )
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (HQ + BH - 1) // BH
    if block < q_blocks:
        _norm_rope_block(
            q_ptr,
            q_sb,
            q_ss,
            q_sh,
            qo_ptr,
            qo_sb,
            qo_ss,
            qo_sh,
            q_weight_ptr,
            weight_offset,
            eps,
            block,
            batch,
            place,
            mask,
            cos,
            sin,
            HQ,
            D,
            HALF,
            OFFSET,
            INTERLEAVED,
            VEC,
            BT,
            BH,
            BLOCK_HALF,
            BLOCK_COPY,
        )
    else:
        _norm_rope_block(
            k_ptr,
            k_sb,
            k_ss,
            k_sh,
            ko_ptr,
            ko_sb,
            ko_ss,
            ko_sh,
            k_weight_ptr,
            weight_offset,
            eps,
            block - q_blocks,
            batch,
            place,
            mask,
            cos,
            sin,
            HK,
            D,
            HALF,
            OFFSET,
            INTERLEAVED,
            VEC,
            BT,
            BH,
            BLOCK_HALF,
            BLOCK_COPY,
        )


@triton.jit(do_not_specialize=[*_RUNTIME, "qg_sb", "qg_ss", "qg_sh", "kg_sb", "kg_ss", "kg_sh"])
def qk_norm_rope_bwd_kernel(
    qg_ptr,
    qg_sb,
    qg_ss,
    qg_sh,
    q_ptr,
    q_sb,
    q_ss,
    q_sh,
    qo_ptr,
    qo_sb,
    qo_ss,
    qo_sh,
    kg_ptr,
    kg_sb,
    kg_ss,
    kg_sh,
    k_ptr,
    k_sb,
    k_ss,
    k_sh,
    ko_ptr,
    ko_sb,
    ko_ss,
    ko_sh,
    q_weight_ptr,
    k_weight_ptr,
    weight_offset,
    q_partial_ptr,
    k_partial_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    cos_st,
    sin_st,
    pos_ptr,
    pos_sb,
    pos_ss,
    cu_ptr,
    num_bounds,
    tokens,
    seq_len,
    table_rows,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr,
    TABLE_VEC: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    mask = token < tokens
    batch = (token // seq_len).to(tl.int64)
    place = (token % seq_len).to(tl.int64)
    row = token_rows(pos_ptr, pos_sb, pos_ss, cu_ptr, num_bounds, token, batch, place, mask, table_rows)
    cos, sin = load_tables(
        cos_ptr,
        sin_ptr,
        cos_st,
        sin_st,
        row,
        row,
        row,
        mask,
        HALF,
        BLOCK_HALF,
        TABLE_VEC,
        True,
        False,
        False,
        0,
        0,
        0,
    )
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (HQ + BH - 1) // BH
    k_blocks: tl.constexpr = (HK + BH - 1) // BH
    # partial weight gradients: [token blocks, head blocks, D]
    if block < q_blocks:
        partial = q_partial_ptr + (tl.program_id(0).to(tl.int64) * q_blocks + block) * D
        _norm_rope_bwd_block(
            qg_ptr,
            qg_sb,
            qg_ss,
            qg_sh,
            q_ptr,
            q_sb,
            q_ss,
            q_sh,
            qo_ptr,
            qo_sb,
            qo_ss,
            qo_sh,
            q_weight_ptr,
            weight_offset,
            partial,
            eps,
            block,
            batch,
            place,
            mask,
            cos,
            sin,
            HQ,
            D,
            HALF,
            OFFSET,
            INTERLEAVED,
            VEC,
            BT,
            BH,
            BLOCK_HALF,
            BLOCK_COPY,
        )
    else:
        partial = k_partial_ptr + (tl.program_id(0).to(tl.int64) * k_blocks + block - q_blocks) * D
        _norm_rope_bwd_block(
            kg_ptr,
            kg_sb,
            kg_ss,
            kg_sh,
            k_ptr,
            k_sb,
            k_ss,
            k_sh,
            ko_ptr,
            ko_sb,
            ko_ss,
            ko_sh,
            k_weight_ptr,
            weight_offset,
            partial,
            eps,
            block - q_blocks,
            batch,
            place,
            mask,
            cos,
            sin,
            HK,
            D,
            HALF,
            OFFSET,
            INTERLEAVED,
            VEC,
            BT,
            BH,
            BLOCK_HALF,
            BLOCK_COPY,
        )


def _common(q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, elements):
    """Tile, grid, and the arguments that both kernels end with."""
    seq_len = q.shape[-3]
    tokens = seq_len if q.ndim == 3 else q.shape[0] * seq_len
    dim, half = q.shape[-1], cos.shape[1]
    heads = (q.shape[-2], k.shape[-2])
    tile = config(heads, 2 * half, dim - 2 * half, elements)
    table_vec = vector_width(4, cos.stride(0), sin.stride(0))
    grid = (triton.cdiv(tokens, tile["BT"]), sum(triton.cdiv(h, tile["BH"]) for h in heads))
    args = (
        cos,
        sin,
        cos.stride(0) // table_vec,
        sin.stride(0) // table_vec,
        positions,
        *position_strides(positions, q, ()),
        cu_seqlens,
        0 if cu_seqlens is None else cu_seqlens.shape[0],
        tokens,
        seq_len,
        cos.shape[0],
    )
    constants = {
        "HQ": heads[0],
        "HK": heads[1],
        "D": dim,
        "HALF": half,
        "OFFSET": rotary_offset,
        "INTERLEAVED": interleaved,
        "TABLE_VEC": table_vec,
        **tile,
    }
    return grid, args, constants


def qk_norm_rope_fwd(
    q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, weight_offset, interleaved, rotary_offset
):
    if q.device.type == "cpu":
        token_positions("qk_norm_rope", q.shape[:-2], cos.shape[0], positions, cu_seqlens, q.device)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grid, args, constants = _common(q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, 4096)
    if grid[0] == 0 or grid[1] == 0:
        return q_out, k_out
    vec, (q_st, qo_st, k_st, ko_st) = strides_of(q, q_out, k, k_out)
    with on_device(q):
        qk_norm_rope_kernel[grid](
            q,
            *q_st,
            q_out,
            *qo_st,
            k,
            *k_st,
            k_out,
            *ko_st,
            q_weight,
            k_weight,
            weight_offset,
            eps,
            *args,
            VEC=vec,
            **constants,
        )
    return q_out, k_out


def qk_norm_rope_bwd(
    q_grad,
    k_grad,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    positions,
    cu_seqlens,
    eps,
    weight_offset,
    interleaved,
    rotary_offset,
):
    if q.device.type == "cpu":
        token_positions("qk_norm_rope", q.shape[:-2], cos.shape[0], positions, cu_seqlens, q.device)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grid, args, constants = _common(q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, 2048)
    blocks = [triton.cdiv(x.shape[-2], constants["BH"]) for x in (q, k)]
    # one row per program; the second stage adds them in the order of the library, which is fixed
    partial = [torch.empty((grid[0] * n, q.shape[-1]), dtype=torch.float32, device=q.device) for n in blocks]
    if grid[0] and grid[1]:
        vec, (qg_st, q_st, qo_st, kg_st, k_st, ko_st) = strides_of(q_grad, q, dq, k_grad, k, dk)
        with on_device(q):
            qk_norm_rope_bwd_kernel[grid](
                q_grad,
                *qg_st,
                q,
                *q_st,
                dq,
                *qo_st,
                k_grad,
                *kg_st,
                k,
                *k_st,
                dk,
                *ko_st,
                q_weight,
                k_weight,
                weight_offset,
                *partial,
                eps,
                *args,
                VEC=vec,
                **constants,
            )
    return dq, dk, partial[0].sum(0).to(q_weight.dtype), partial[1].sum(0).to(k_weight.dtype)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for layout, heads, dim, rotary, offset, interleaved in LAYOUTS:
        table, weight = tensor("fp32", 8192, rotary // 2), tensor("bf16", dim)
        q, k = (tensor("bf16", 2, 4096, h, dim) for h in heads)
        options = {"interleaved": interleaved, "rotary_offset": offset}
        run = train("qk_norm_rope", q, k, weight, weight, table, table, **options)
        yield AotCase(layout, run, expect=("LDG.128", "STG.128"))
