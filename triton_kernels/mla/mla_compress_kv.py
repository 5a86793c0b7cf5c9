"""RMSNorm of the latent part and RoPE of the rest of each row, one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import RowConfig, constants, on_device
from .host import token_positions


@triton.jit
def rstd_of(x, RANK: tl.constexpr, eps):
    # the float64 sum makes the result independent of its order: every backend rounds to the same bits
    wide = x.to(tl.float64)
    mean = (tl.sum(wide * wide, axis=1) / RANK).to(tl.float32)  # [BLOCK_T]
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def load_pairs(rows, mask, HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both members of every rotated pair as float32, [BLOCK_T, HALF_PAD] each; ``rows`` points at the first."""
    i = tl.arange(0, HALF_PAD)
    if INTERLEAVED:
        # one contiguous read, then apart
        offset = 2 * i[:, None] + tl.arange(0, 2)[None, :]
        keep = mask[:, None, None] & (i < HALF)[None, :, None]
        both = tl.load(rows[:, None, None] + offset[None, :, :], mask=keep, other=0.0)  # [BLOCK_T, HALF_PAD, 2]
        first, second = tl.split(both)
    else:
        keep = mask[:, None] & (i < HALF)[None, :]
        first = tl.load(rows[:, None] + i[None, :], mask=keep, other=0.0)  # [BLOCK_T, HALF_PAD]
        second = tl.load(rows[:, None] + (HALF + i)[None, :], mask=keep, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(rows, first, second, mask, HALF: tl.constexpr, HALF_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    i = tl.arange(0, HALF_PAD)
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        offset = 2 * i[:, None] + tl.arange(0, 2)[None, :]
        keep = mask[:, None, None] & (i < HALF)[None, :, None]
        tl.store(rows[:, None, None] + offset[None, :, :], tl.join(first, second).to(dtype), mask=keep)
    else:
        keep = mask[:, None] & (i < HALF)[None, :]
        tl.store(rows[:, None] + i[None, :], first.to(dtype), mask=keep)
        tl.store(rows[:, None] + (HALF + i)[None, :], second.to(dtype), mask=keep)


@triton.jit
def load_tables(cos_ptr, sin_ptr, cos_stride, sin_stride, position, mask, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    i = tl.arange(0, HALF_PAD)
    keep = mask[:, None] & (i < HALF)[None, :]
    c = tl.load(cos_ptr + position[:, None] * cos_stride + i[None, :], mask=keep, other=0.0)  # [BLOCK_T, HALF_PAD]
    s = tl.load(sin_ptr + position[:, None] * sin_stride + i[None, :], mask=keep, other=0.0)
    return c, s


@triton.jit
def position_of(positions_ptr, token, mask, table_rows):
    """Row of the tables, clamped: a wild position reads a wrong angle, never foreign memory."""
    if positions_ptr is None:
        position = token
    else:
        position = tl.load(positions_ptr + token, mask=mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(position, 0), table_rows - 1)


@triton.jit(do_not_specialize=["tokens", "table_rows"])
def mla_compress_kv_fwd_kernel(
    kv_a_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    tokens,
    table_rows,
    kv_stride,
    cos_stride,
    sin_stride,
    eps,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < tokens
    column = tl.arange(0, RANK_PAD)
    inside = column < RANK
    keep = mask[:, None] & inside[None, :]
    row_in = kv_a_ptr + token * kv_stride
    row_out = out_ptr + token * (RANK + 2 * HALF)
    x = tl.load(row_in[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)  # [BLOCK_T, R]
    w = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * rstd_of(x, RANK, eps)[:, None] * w[None, :]
    tl.store(row_out[:, None] + column[None, :], y.to(out_ptr.dtype.element_ty), mask=keep)
    if HALF > 0:
        position = position_of(positions_ptr, token, mask, table_rows)
        c, s = load_tables(cos_ptr, sin_ptr, cos_stride, sin_stride, position, mask, HALF, HALF_PAD)
        a, b = load_pairs(row_in + RANK, mask, HALF, HALF_PAD, INTERLEAVED)
        store_pairs(row_out + RANK, a * c - b * s, b * c + a * s, mask, HALF, HALF_PAD, INTERLEAVED)


@triton.jit(do_not_specialize=["tokens", "table_rows", "rows_per_program"])
def mla_compress_kv_bwd_kernel(
    dout_ptr,
    kv_a_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    dkv_a_ptr,
    dweight_ptr,
    tokens,
    table_rows,
    rows_per_program,
    dout_stride,
    kv_stride,
    cos_stride,
    sin_stride,
    eps,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, tokens)
    column = tl.arange(0, RANK_PAD)
    inside = column < RANK
    w = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([RANK_PAD], tl.float32)
    for start in range(0, rows_per_program, BLOCK_T):
        token = first + start + tl.arange(0, BLOCK_T)
        mask = token < last
        keep = mask[:, None] & inside[None, :]
        row_in = kv_a_ptr + token * kv_stride
        row_dout = dout_ptr + token * dout_stride
        row_out = dkv_a_ptr + token * (RANK + 2 * HALF)
        x = tl.load(row_in[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)  # [BLOCK_T, R]
        g = tl.load(row_dout[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)
        rstd = rstd_of(x, RANK, eps)[:, None]
        normed = x * rstd
        total += tl.sum(g * normed, axis=0)
        scaled = g * w[None, :]
        inner = tl.sum(scaled * normed, axis=1)[:, None] / RANK
        dx = (scaled - normed * inner) * rstd
        tl.store(row_out[:, None] + column[None, :], dx.to(dkv_a_ptr.dtype.element_ty), mask=keep)
        if HALF > 0:
            position = position_of(positions_ptr, token, mask, table_rows)
            c, s = load_tables(cos_ptr, sin_ptr, cos_stride, sin_stride, position, mask, HALF, HALF_PAD)
            a, b = load_pairs(row_dout + RANK, mask, HALF, HALF_PAD, INTERLEAVED)
            store_pairs(row_out + RANK, a * c + b * s, b * c - a * s, mask, HALF, HALF_PAD, INTERLEAVED)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * RANK + column, total, mask=inside)


# partial sums of the weight gradient: their number depends on the token count only, so two runs are bit-equal
MAX_PARTIALS = 256


def config(rank: int) -> RowConfig:
    """About 1 KiB of float32 per warp; twice that spills on sm_80."""
    rank_pad = triton.next_power_of_2(rank)
    rows = max(1, min(16, 2048 // rank_pad))
    return RowConfig(rows, 8 if rows * rank_pad >= 2048 else 4 if rows * rank_pad >= 1024 else 1)


def dims(rank: int, rope_dim: int, interleaved: bool) -> dict[str, int | bool]:
    return {
        "RANK": rank,
        "RANK_PAD": triton.next_power_of_2(rank),
        "HALF": rope_dim // 2,
        "HALF_PAD": triton.next_power_of_2(max(1, rope_dim // 2)),
        "INTERLEAVED": interleaved,
    }


def check_positions(name: str, cos: Tensor, positions: Tensor | None, tokens: int) -> None:
    """On CPU tensors (the interpreter) a position outside of the tables raises; a GPU clamps it."""
    if cos.device.type == "cpu" and cos.shape[1]:
        token_positions(name, (tokens,), cos.shape[0], positions, None, cos.device)


def mla_compress_kv_fwd(
    kv_a: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    tokens, width = kv_a.shape
    rank = weight.shape[0]
    out = torch.empty_like(kv_a, memory_format=torch.contiguous_format)
    if tokens == 0:
        return out
    check_positions("mla_compress_kv", cos, positions, tokens)
    tile = config(rank)
    with on_device(kv_a):
        mla_compress_kv_fwd_kernel[(triton.cdiv(tokens, tile.block_t),)](
            kv_a,
            weight,
            cos,
            sin,
            positions,
            out,
            tokens,
            cos.shape[0],
            kv_a.stride(0),
            cos.stride(0),
            sin.stride(0),
            eps,
            **dims(rank, width - rank, interleaved),
            **constants(tile),
            # a fused multiply-add would round RoPE differently from the other backends
            enable_fp_fusion=False,
        )
    return out


def mla_compress_kv_bwd(
    dout: Tensor,
    kv_a: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    tokens, width = kv_a.shape
    rank = weight.shape[0]
    dkv_a = torch.empty_like(kv_a, memory_format=torch.contiguous_format)
    if tokens == 0:
        return dkv_a, torch.zeros_like(weight)
    tile = config(rank)
    steps = triton.cdiv(tokens, tile.block_t * MAX_PARTIALS)
    rows = steps * tile.block_t
    programs = triton.cdiv(tokens, rows)
    partial = torch.empty(programs, rank, dtype=torch.float32, device=kv_a.device)
    with on_device(kv_a):
        mla_compress_kv_bwd_kernel[(programs,)](
            dout,
            kv_a,
            weight,
            cos,
            sin,
            positions,
            dkv_a,
            partial,
            tokens,
            cos.shape[0],
            rows,
            dout.stride(0),
            kv_a.stride(0),
            cos.stride(0),
            sin.stride(0),
            eps,
            **dims(rank, width - rank, interleaved),
            **constants(tile),
        )
    return dkv_a, partial.sum(0).to(weight.dtype)


def aot_cases():
    from ...testing.aot import AotCase, call, tensor, train

    table, positions = tensor("fp32", 8192, 32), tensor("i32", 4096)
    for dtype in ("bf16", "fp16", "fp32"):
        inputs = tensor(dtype, 4096, 576), tensor(dtype, 512), table, table, positions
        yield AotCase(dtype, train("mla_compress_kv", *inputs), expect=("LDG.128", "STG.128"))
    inputs = tensor("bf16", 4096, 576), tensor("bf16", 512), table, table
    yield AotCase("half", call("mla_compress_kv", *inputs, interleaved=False))
