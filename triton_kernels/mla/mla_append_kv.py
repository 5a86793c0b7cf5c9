"""RMSNorm, RoPE, quantisation and the paged store of latent rows, one read and one write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import fp8
from ..common.launch import constants, on_device
from .host import check_slots
from .host import layout as layouts
from .mla_compress_kv import config, dims, load_pairs, load_tables, position_of, rstd_of, store_pairs
from .mla_gather_kv import GROUP, cache_parts, rope_vector


@triton.jit(do_not_specialize=["tokens", "table_rows", "pages"])
def mla_append_kv_fwd_kernel(
    kv_a_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    latent_ptr,
    scales_ptr,
    rotated_ptr,
    tokens,
    table_rows,
    pages,
    kv_stride,
    cos_stride,
    sin_stride,
    latent_page,
    latent_row,
    scale_page,
    scale_row,
    rotated_page,
    rotated_row,
    eps,
    quantize_eps,
    PAGE_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ROPE_VEC: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slot_mapping_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
    page = slot // PAGE_SIZE
    # a slot that is not in the pool is skipped: nothing of that row is read or written
    mask = (slot >= 0) & (page < pages)
    page = tl.where(mask, page, 0)
    offset = tl.where(mask, slot % PAGE_SIZE, 0)
    column = tl.arange(0, RANK_PAD)
    inside = column < RANK
    keep = mask[:, None] & inside[None, :]
    row_in = kv_a_ptr + token * kv_stride
    x = tl.load(row_in[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)  # [BLOCK_T, R]
    w = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * rstd_of(x, RANK, eps)[:, None] * w[None, :]
    row_out = latent_ptr + page * latent_page + offset * latent_row
    if FP8:
        groups: tl.constexpr = RANK_PAD // GROUP
        blocks = tl.reshape(y, [BLOCK_T, groups, GROUP])
        amax = tl.max(fp8.finite_magnitude(blocks), axis=2)  # [BLOCK_T, groups]
        scale = fp8.block_scale(amax, quantize_eps, True)
        codes = tl.reshape(fp8.quantize(blocks, scale[:, :, None], True, NATIVE), [BLOCK_T, RANK_PAD])
        tl.store(row_out[:, None] + column[None, :], codes, mask=keep)
        group = tl.arange(0, groups)
        row_scale = scales_ptr + page * scale_page + offset * scale_row
        tl.store(row_scale[:, None] + group[None, :], scale, mask=mask[:, None] & (group < RANK // GROUP)[None, :])
    else:
        tl.store(row_out[:, None] + column[None, :], y.to(latent_ptr.dtype.element_ty), mask=keep)
    if HALF > 0:
        position = position_of(positions_ptr, token, mask, table_rows)
        c, s = load_tables(cos_ptr, sin_ptr, cos_stride, sin_stride, position, mask, HALF, HALF_PAD)
        a, b = load_pairs(row_in + RANK, mask, HALF, HALF_PAD, INTERLEAVED)
        row_rope = rotated_ptr + (page * rotated_page + offset * rotated_row) * ROPE_VEC
        store_pairs(row_rope, a * c - b * s, b * c + a * s, mask, HALF, HALF_PAD, INTERLEAVED)


def mla_append_kv_fwd(
    kv_a: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    interleaved: bool,
    layout: str,
) -> None:
    row = layouts.row_layout(layout, weight.shape[0], cache.shape[-1])
    tokens = slot_mapping.shape[0]
    if tokens == 0 or cache.numel() == 0:
        return
    latent, scales, rotated = cache_parts(cache, row)
    rope_vec = rope_vector(rotated)
    if cache.device.type == "cpu":
        check_slots(slot_mapping, positions[:tokens], cache, cos.shape[0], row.rope_dim)
    tile = config(row.rank)
    with on_device(kv_a):
        mla_append_kv_fwd_kernel[(triton.cdiv(tokens, tile.block_t),)](
            kv_a,
            weight,
            cos,
            sin,
            positions,
            slot_mapping,
            latent,
            scales,
            rotated,
            tokens,
            cos.shape[0],
            cache.shape[0],
            kv_a.stride(0),
            cos.stride(0),
            sin.stride(0),
            *latent.stride()[:2],
            *scales.stride()[:2],
            *(s // rope_vec for s in rotated.stride()[:2]),
            eps,
            fp8.float_bits(1e-12),
            PAGE_SIZE=cache.shape[1],
            FP8=row.is_fp8,
            NATIVE=row.is_fp8 and fp8.native_cast(cache.device),
            ROPE_VEC=rope_vec,
            **dims(row.rank, row.rope_dim, interleaved),
            **constants(tile),
            # a fused multiply-add would round RoPE differently from the other backends
            enable_fp_fusion=False,
        )


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    table, where = tensor("fp32", 8192, 32), tensor("i64", 4096)
    for layout, cache in (("bf16", tensor("bf16", 256, 64, 576)), ("fp8", tensor("u8", 256, 64, 656))):
        inputs = tensor("bf16", 4096, 576), tensor("bf16", 512), table, table, where, cache, where
        expect = ("LDG.128",) if layout == "fp8" else ("LDG.128", "STG.128")
        yield AotCase(layout, call("mla_append_kv", *inputs, layout=layout), expect=expect)
