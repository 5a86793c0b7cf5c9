"""RMSNorm of q and k heads, then rotary embedding: a program takes a block of tokens by a block of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import on_device, vector_width
from .host import token_positions
from .rope import LAYOUTS, config, layout, load_tables, position_strides, rotate_half, strides_of, token_rows


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
    L,
    HEADS: tl.constexpr,
):
    head = head_block * L.BLOCK_H + tl.arange(0, L.BLOCK_H)
    mask = (token_mask[:, None] & (head < HEADS)[None, :])[:, :, None]
    head = head.to(tl.int64)[None, :]
    x_row = x_ptr + ((batch * x_sb + place * x_ss)[:, None] + head * x_sh)[:, :, None] * L.VEC  # [BLOCK_T, BLOCK_H, 1]
    out_row = out_ptr + ((batch * out_sb + place * out_ss)[:, None] + head * out_sh)[:, :, None] * L.VEC
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    pair = tl.arange(0, L.BLOCK_HALF)[None, None, :]
    dim = tl.arange(0, L.BLOCK_COPY)[None, None, :]
    wide = tl.arange(0, 2 * L.BLOCK_HALF)[None, None, :]
    if L.INTERLEAVED:
        x = tl.load(x_row + L.OFFSET + wide, mask & (wide < 2 * L.HALF), 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, R]
        a, b = tl.split(tl.reshape(x, (L.BLOCK_T, L.BLOCK_H, L.BLOCK_HALF, 2)))
    else:
        a = tl.load(x_row + L.OFFSET + pair, mask & (pair < L.HALF), 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, R / 2]
        b = tl.load(x_row + L.OFFSET + L.HALF + pair, mask & (pair < L.HALF), 0.0).to(tl.float32)
    square = tl.sum(a * a, 2) + tl.sum(b * b, 2)  # [BLOCK_T, BLOCK_H]
    for start in tl.static_range(0, L.OFFSET, L.BLOCK_COPY):
        # [BLOCK_T, BLOCK_H, BLOCK_COPY]
        c = tl.load(x_row + start + dim, mask & (dim < L.OFFSET - start), 0.0).to(tl.float32)
        square += tl.sum(c * c, 2)
    for start in tl.static_range(L.OFFSET + 2 * L.HALF, L.D, L.BLOCK_COPY):
        c = tl.load(x_row + start + dim, mask & (dim < L.D - start), 0.0).to(tl.float32)
        square += tl.sum(c * c, 2)
    rstd = (1.0 / tl.sqrt(square / L.D + eps))[:, :, None]
    if L.INTERLEAVED:
        weight = tl.load(weight_ptr + L.OFFSET + wide, wide < 2 * L.HALF, 0.0).to(tl.float32) + weight_offset
        wa, wb = tl.split(tl.reshape(weight, (1, 1, L.BLOCK_HALF, 2)))
        a, b = rotate_half(a * rstd * wa, b * rstd * wb, cos, sin)
        out = tl.reshape(tl.join(a, b), (L.BLOCK_T, L.BLOCK_H, 2 * L.BLOCK_HALF))
        tl.store(out_row + L.OFFSET + wide, out.to(out_ptr.dtype.element_ty), mask & (wide < 2 * L.HALF))
    else:
        wa = tl.load(weight_ptr + L.OFFSET + pair, pair < L.HALF, 0.0).to(tl.float32) + weight_offset
        wb = tl.load(weight_ptr + L.OFFSET + L.HALF + pair, pair < L.HALF, 0.0).to(tl.float32) + weight_offset
        a, b = rotate_half(a * rstd * wa, b * rstd * wb, cos, sin)
        tl.store(out_row + L.OFFSET + pair, a.to(out_ptr.dtype.element_ty), mask & (pair < L.HALF))
        tl.store(out_row + L.OFFSET + L.HALF + pair, b.to(out_ptr.dtype.element_ty), mask & (pair < L.HALF))
    for start in tl.static_range(0, L.OFFSET, L.BLOCK_COPY):
        inside = dim < L.OFFSET - start
        c = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, BLOCK_COPY]
        weight = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
        tl.store(out_row + start + dim, (c * rstd * weight).to(out_ptr.dtype.element_ty), mask & inside)
    for start in tl.static_range(L.OFFSET + 2 * L.HALF, L.D, L.BLOCK_COPY):
        inside = dim < L.D - start
        c = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, BLOCK_COPY]
        weight = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
        tl.store(out_row + start + dim, (c * rstd * weight).to(out_ptr.dtype.element_ty), mask & inside)


@triton.jit
def _norm_rope_bwd_block(
    dout_ptr,
    dout_sb,
    dout_ss,
    dout_sh,
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
    L,
    HEADS: tl.constexpr,
):
    head = head_block * L.BLOCK_H + tl.arange(0, L.BLOCK_H)
    mask = (token_mask[:, None] & (head < HEADS)[None, :])[:, :, None]
    head = head.to(tl.int64)[None, :]
    dout_row = dout_ptr + ((batch * dout_sb + place * dout_ss)[:, None] + head * dout_sh)[:, :, None] * L.VEC
    x_row = x_ptr + ((batch * x_sb + place * x_ss)[:, None] + head * x_sh)[:, :, None] * L.VEC  # [BLOCK_T, BLOCK_H, 1]
    out_row = out_ptr + ((batch * out_sb + place * out_ss)[:, None] + head * out_sh)[:, :, None] * L.VEC
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    pair = tl.arange(0, L.BLOCK_HALF)[None, None, :]
    dim = tl.arange(0, L.BLOCK_COPY)[None, None, :]
    wide = tl.arange(0, 2 * L.BLOCK_HALF)[None, None, :]
    # the rotary slice: gradients turned back, then both sums over the row
    if L.INTERLEAVED:
        inside = mask & (wide < 2 * L.HALF)
        g = tl.load(dout_row + L.OFFSET + wide, inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, R]
        ga, gb = tl.split(tl.reshape(g, (L.BLOCK_T, L.BLOCK_H, L.BLOCK_HALF, 2)))
        x = tl.load(x_row + L.OFFSET + wide, inside, 0.0).to(tl.float32)
        xa, xb = tl.split(tl.reshape(x, (L.BLOCK_T, L.BLOCK_H, L.BLOCK_HALF, 2)))
        weight = tl.load(weight_ptr + L.OFFSET + wide, wide < 2 * L.HALF, 0.0).to(tl.float32) + weight_offset
        wa, wb = tl.split(tl.reshape(weight, (1, 1, L.BLOCK_HALF, 2)))
    else:
        inside = mask & (pair < L.HALF)
        ga = tl.load(dout_row + L.OFFSET + pair, inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, R / 2]
        gb = tl.load(dout_row + L.OFFSET + L.HALF + pair, inside, 0.0).to(tl.float32)
        xa = tl.load(x_row + L.OFFSET + pair, inside, 0.0).to(tl.float32)
        xb = tl.load(x_row + L.OFFSET + L.HALF + pair, inside, 0.0).to(tl.float32)
        wa = tl.load(weight_ptr + L.OFFSET + pair, pair < L.HALF, 0.0).to(tl.float32) + weight_offset
        wb = tl.load(weight_ptr + L.OFFSET + L.HALF + pair, pair < L.HALF, 0.0).to(tl.float32) + weight_offset
    ga, gb = rotate_half(ga, gb, cos, sin)
    square = tl.sum(xa * xa, 2) + tl.sum(xb * xb, 2)  # [BLOCK_T, BLOCK_H]
    cross = tl.sum(ga * wa * xa, 2) + tl.sum(gb * wb * xb, 2)
    for part in tl.static_range(2):
        for start in tl.static_range(
            0 if part == 0 else L.OFFSET + 2 * L.HALF, L.OFFSET if part == 0 else L.D, L.BLOCK_COPY
        ):
            inside = dim < (L.OFFSET if part == 0 else L.D) - start
            x = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, BLOCK_COPY]
            g = tl.load(dout_row + start + dim, mask & inside, 0.0).to(tl.float32)
            w = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
            square += tl.sum(x * x, 2)
            cross += tl.sum(g * w * x, 2)
    rstd = 1.0 / tl.sqrt(square / L.D + eps)
    mean = (cross * rstd / L.D)[:, :, None]
    rstd = rstd[:, :, None]
    xa = xa * rstd
    xb = xb * rstd
    # rows past the end hold zeros and add nothing
    weight_a = tl.sum(tl.sum(ga * xa, 1), 0)  # [R / 2]
    weight_b = tl.sum(tl.sum(gb * xb, 1), 0)
    a = rstd * (ga * wa - xa * mean)
    b = rstd * (gb * wb - xb * mean)
    if L.INTERLEAVED:
        inside = mask & (wide < 2 * L.HALF)
        out = tl.reshape(tl.join(a, b), (L.BLOCK_T, L.BLOCK_H, 2 * L.BLOCK_HALF))
        tl.store(out_row + L.OFFSET + wide, out.to(out_ptr.dtype.element_ty), inside)
        flat = tl.arange(0, 2 * L.BLOCK_HALF)
        weight_ab = tl.reshape(tl.join(weight_a, weight_b), (2 * L.BLOCK_HALF,))
        tl.store(partial_ptr + L.OFFSET + flat, weight_ab, flat < 2 * L.HALF)
    else:
        inside = mask & (pair < L.HALF)
        tl.store(out_row + L.OFFSET + pair, a.to(out_ptr.dtype.element_ty), inside)
        tl.store(out_row + L.OFFSET + L.HALF + pair, b.to(out_ptr.dtype.element_ty), inside)
        flat = tl.arange(0, L.BLOCK_HALF)
        tl.store(partial_ptr + L.OFFSET + flat, weight_a, flat < L.HALF)
        tl.store(partial_ptr + L.OFFSET + L.HALF + flat, weight_b, flat < L.HALF)
    flat = tl.arange(0, L.BLOCK_COPY)
    for part in tl.static_range(2):
        for start in tl.static_range(
            0 if part == 0 else L.OFFSET + 2 * L.HALF, L.OFFSET if part == 0 else L.D, L.BLOCK_COPY
        ):
            inside = dim < (L.OFFSET if part == 0 else L.D) - start
            x = tl.load(x_row + start + dim, mask & inside, 0.0).to(tl.float32) * rstd  # [BLOCK_T, BLOCK_H, BLOCK_COPY]
            g = tl.load(dout_row + start + dim, mask & inside, 0.0).to(tl.float32)
            w = tl.load(weight_ptr + start + dim, inside, 0.0).to(tl.float32) + weight_offset
            tl.store(out_row + start + dim, (rstd * (g * w - x * mean)).to(out_ptr.dtype.element_ty), mask & inside)
            inside = flat < (L.OFFSET if part == 0 else L.D) - start
            tl.store(partial_ptr + start + flat, tl.sum(tl.sum(g * x, 1), 0), inside)


_TABLES = ("tokens", "seq_len", "table_rows", "num_bounds", "cos_st", "sin_st", "pos_sb", "pos_ss")
_RUNTIME = (*_TABLES, "eps", "weight_offset", "q_sb", "q_ss", "q_sh", "k_sb", "k_ss", "k_sh")


@triton.jit(do_not_specialize=[*_RUNTIME, "qo_sb", "qo_ss", "qo_sh", "ko_sb", "ko_ss", "ko_sh"])
def qk_norm_rope_fwd_kernel(
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
    L,
):
    token = tl.program_id(0) * L.BLOCK_T + tl.arange(0, L.BLOCK_T)
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
        L,
        False,
        False,
        False,
        0,
        0,
        0,
    )
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (L.HQ + L.BLOCK_H - 1) // L.BLOCK_H
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
            L,
            L.HQ,
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
            L,
            L.HK,
        )


@triton.jit(do_not_specialize=[*_RUNTIME, "dq_out_sb", "dq_out_ss", "dq_out_sh", "dk_out_sb", "dk_out_ss", "dk_out_sh"])
def qk_norm_rope_bwd_kernel(
    dq_out_ptr,
    dq_out_sb,
    dq_out_ss,
    dq_out_sh,
    q_ptr,
    q_sb,
    q_ss,
    q_sh,
    dq_ptr,
    dk_out_ptr,
    dk_out_sb,
    dk_out_ss,
    dk_out_sh,
    k_ptr,
    k_sb,
    k_ss,
    k_sh,
    dk_ptr,
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
    L,
):
    token = tl.program_id(0) * L.BLOCK_T + tl.arange(0, L.BLOCK_T)
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
        L,
        True,
        False,
        False,
        0,
        0,
        0,
    )
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (L.HQ + L.BLOCK_H - 1) // L.BLOCK_H
    k_blocks: tl.constexpr = (L.HK + L.BLOCK_H - 1) // L.BLOCK_H
    # partial weight gradients: [token blocks, head blocks, D]
    if block < q_blocks:
        partial = q_partial_ptr + (tl.program_id(0).to(tl.int64) * q_blocks + block) * L.D
        _norm_rope_bwd_block(
            dq_out_ptr,
            dq_out_sb,
            dq_out_ss,
            dq_out_sh,
            q_ptr,
            q_sb,
            q_ss,
            q_sh,
            dq_ptr,
            seq_len.to(tl.int64) * (L.HQ * L.D // L.VEC),
            L.HQ * L.D // L.VEC,
            L.D // L.VEC,
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
            L,
            L.HQ,
        )
    else:
        partial = k_partial_ptr + (tl.program_id(0).to(tl.int64) * k_blocks + block - q_blocks) * L.D
        _norm_rope_bwd_block(
            dk_out_ptr,
            dk_out_sb,
            dk_out_ss,
            dk_out_sh,
            k_ptr,
            k_sb,
            k_ss,
            k_sh,
            dk_ptr,
            seq_len.to(tl.int64) * (L.HK * L.D // L.VEC),
            L.HK * L.D // L.VEC,
            L.D // L.VEC,
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
            L,
            L.HK,
        )


def _common(q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, vec, elements):
    """Tile, grid, and the arguments that both kernels end with."""
    seq_len = q.shape[-3]
    tokens = seq_len if q.ndim == 3 else q.shape[0] * seq_len
    dim, half = q.shape[-1], cos.shape[1]
    heads = (q.shape[-2], k.shape[-2])
    tile = config(heads, 2 * half, dim - 2 * half, elements)
    table_vec = vector_width(4, cos.stride(0), sin.stride(0))
    grid = (triton.cdiv(tokens, tile.block_t), sum(triton.cdiv(h, tile.block_h) for h in heads))
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
        layout(heads, dim, half, rotary_offset, interleaved, vec, table_vec, tile=tile),
    )
    return tile, grid, args


def qk_norm_rope_fwd(
    q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, weight_offset, interleaved, rotary_offset
):
    if q.device.type == "cpu":
        token_positions("qk_norm_rope", q.shape[:-2], cos.shape[0], positions, cu_seqlens, q.device)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    vec, (q_st, qo_st, k_st, ko_st) = strides_of(q, q_out, k, k_out)
    tile, grid, args = _common(q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, vec, 4096)
    if grid[0] == 0 or grid[1] == 0:
        return q_out, k_out
    with on_device(q):
        qk_norm_rope_fwd_kernel[grid](
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
            num_warps=tile.num_warps,
        )
    return q_out, k_out


def qk_norm_rope_bwd(
    dq_out,
    dk_out,
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
    vec, (dq_out_st, q_st, _, dk_out_st, k_st, _) = strides_of(dq_out, q, dq, dk_out, k, dk)
    tile, grid, args = _common(q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, vec, 2048)
    blocks = [triton.cdiv(x.shape[-2], tile.block_h) for x in (q, k)]
    # one row per program; the second stage adds them in the order of the library, which is fixed
    partial = [torch.empty((grid[0] * n, q.shape[-1]), dtype=torch.float32, device=q.device) for n in blocks]
    if grid[0] and grid[1]:
        with on_device(q):
            qk_norm_rope_bwd_kernel[grid](
                dq_out,
                *dq_out_st,
                q,
                *q_st,
                dq,
                dk_out,
                *dk_out_st,
                k,
                *k_st,
                dk,
                q_weight,
                k_weight,
                weight_offset,
                *partial,
                eps,
                *args,
                num_warps=tile.num_warps,
            )
    return dq, dk, partial[0].sum(0).to(q_weight.dtype), partial[1].sum(0).to(k_weight.dtype)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for name, heads, dim, rotary, offset, interleaved in LAYOUTS:
        table, weight = tensor("fp32", 8192, rotary // 2), tensor("bf16", dim)
        q, k = (tensor("bf16", 2, 4096, h, dim) for h in heads)
        options = {"interleaved": interleaved, "rotary_offset": offset}
        run = train("qk_norm_rope", q, k, weight, weight, table, table, **options)
        yield AotCase(name, run, expect=("LDG.128", "STG.128"))
