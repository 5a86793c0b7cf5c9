"""Up-projection of latent rows straight into keys and values: nothing is concatenated or copied afterwards."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common.launch import constants, on_device
from .mla_absorb_query import Config, config


@triton.jit
def _head_block(pid, P: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Head, whether this block of columns belongs to v, and its first column there."""
    k_blocks: tl.constexpr = (P + BLOCK - 1) // BLOCK
    blocks: tl.constexpr = k_blocks + (V + BLOCK - 1) // BLOCK
    head = (pid // blocks).to(tl.int64)
    block = pid % blocks
    is_v = block >= k_blocks
    return head, is_v, tl.where(is_v, block - k_blocks, block) * BLOCK


@triton.jit(do_not_specialize=["tokens"])
def mla_expand_kv_fwd_kernel(
    latent_ptr,
    weight_ptr,
    k_ptr,
    v_ptr,
    tokens,
    latent_stride,
    w_stride,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < tokens
    head, is_v, first = _head_block(tl.program_id(1), P, V, BLOCK_N)
    column = first + tl.arange(0, BLOCK_N)
    width = tl.where(is_v, V, P)
    inside = column < width
    w_rows = weight_ptr + (head * (P + V) + tl.where(is_v, P, 0) + column) * w_stride
    row_in = latent_ptr + token * latent_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, RANK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            row_in[:, None] + k[None, :], mask=mask[:, None] & (k < RANK)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        b = tl.load(
            w_rows[:, None] + k[None, :], mask=inside[:, None] & (k < RANK)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(a, tl.trans(b.to(a.dtype)), acc, input_precision="ieee")
    keep = mask[:, None] & inside[None, :]
    value = acc.to(k_ptr.dtype.element_ty)
    row_k = k_ptr + (token * HEADS + head) * (P + ROPE)
    if is_v:
        row_v = v_ptr + (token * HEADS + head) * V
        tl.store(row_v[:, None] + column[None, :], value, mask=keep)
    else:
        tl.store(row_k[:, None] + column[None, :], value, mask=keep)
    if ROPE > 0:  # noqa: SIM102, the outer one is decided by the compiler
        # V > 0, so the first block of v copies the shared part to every head's key
        if is_v & (first == 0):
            r = tl.arange(0, ROPE_PAD)
            keep_r = mask[:, None] & (r < ROPE)[None, :]
            rope = tl.load(row_in[:, None] + RANK + r[None, :], mask=keep_r, other=0.0)  # [BLOCK_M, r]
            tl.store(row_k[:, None] + P + r[None, :], rope, mask=keep_r)


@triton.jit
def _dout_product(
    acc, dout_rows, w_rows, w_stride, mask, n, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc [BLOCK_M, BLOCK_N] += dout [BLOCK_M, WIDTH] @ weight rows [WIDTH, BLOCK_N]."""
    for start in range(0, WIDTH, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside = c < WIDTH
        a = tl.load(
            dout_rows[:, None] + c[None, :], mask=mask[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        keep = inside[:, None] & (n < RANK)[None, :]
        b = tl.load(
            w_rows + c.to(tl.int64)[:, None] * w_stride + n[None, :], mask=keep, other=0.0
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def mla_expand_kv_bwd_latent_kernel(
    dk_ptr,
    dv_ptr,
    weight_ptr,
    dlatent_ptr,
    tokens,
    gk_token,
    gk_head,
    gv_token,
    gv_head,
    w_stride,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of latent rows: a product over all heads' columns, and the sum over heads of the shared part."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < tokens
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_out = dlatent_ptr + token * (RANK + ROPE)
    if tl.program_id(1) * BLOCK_N < RANK:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        from_k = dk_ptr + token * gk_token
        from_v = dv_ptr + token * gv_token
        w_rows = weight_ptr
        for _ in range(HEADS):
            acc = _dout_product(acc, from_k, w_rows, w_stride, mask, n, P, RANK, BLOCK_K)
            acc = _dout_product(acc, from_v, w_rows + P * w_stride, w_stride, mask, n, V, RANK, BLOCK_K)
            from_k += gk_head
            from_v += gv_head
            w_rows += (P + V) * w_stride
        keep = mask[:, None] & (n < RANK)[None, :]
        tl.store(row_out[:, None] + n[None, :], acc.to(dlatent_ptr.dtype.element_ty), mask=keep)
    elif ROPE > 0:
        r = tl.arange(0, ROPE_PAD)
        keep_r = mask[:, None] & (r < ROPE)[None, :]
        total = tl.zeros([BLOCK_M, ROPE_PAD], tl.float32)
        from_k = dk_ptr + token * gk_token + P
        for _ in range(HEADS):
            total += tl.load(from_k[:, None] + r[None, :], mask=keep_r, other=0.0).to(tl.float32)  # [BLOCK_M, r]
            from_k += gk_head
        tl.store(row_out[:, None] + RANK + r[None, :], total.to(dlatent_ptr.dtype.element_ty), mask=keep_r)


@triton.jit
def _weight_product(
    acc,
    dout_ptr,
    g_token,
    latent_ptr,
    latent_stride,
    tokens,
    column,
    WIDTH: tl.constexpr,
    n,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] += dout[:, column].T @ latent[:, n], over tokens in their order."""
    for start in range(0, tokens, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = (token < tokens)[:, None]
        keep = mask & (column < WIDTH)[None, :]
        a = tl.load(dout_ptr + token[:, None] * g_token + column[None, :], mask=keep, other=0.0)  # [BLOCK_K, BLOCK_M]
        keep = mask & (n < RANK)[None, :]
        b = tl.load(
            latent_ptr + token[:, None] * latent_stride + n[None, :], mask=keep, other=0.0
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(a), b.to(a.dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def mla_expand_kv_bwd_weight_kernel(
    dk_ptr,
    dv_ptr,
    latent_ptr,
    dweight_ptr,
    tokens,
    gk_token,
    gk_head,
    gv_token,
    gv_head,
    latent_stride,
    RANK: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head, is_v, first = _head_block(tl.program_id(0), P, V, BLOCK_M)
    column = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if is_v:
        acc = _weight_product(
            acc, dv_ptr + head * gv_head, gv_token, latent_ptr, latent_stride, tokens, column, V, n, RANK, BLOCK_K
        )
    else:
        acc = _weight_product(
            acc, dk_ptr + head * gk_head, gk_token, latent_ptr, latent_stride, tokens, column, P, n, RANK, BLOCK_K
        )
    row = (head * (P + V) + tl.where(is_v, P, 0) + column) * RANK
    keep = (column < tl.where(is_v, V, P))[:, None] & (n < RANK)[None, :]
    tl.store(dweight_ptr + row[:, None] + n[None, :], acc.to(dweight_ptr.dtype.element_ty), mask=keep)


def latent_config(tokens: int, rank: int, depth: int, itemsize: int) -> Config:
    """For the gradient of latent rows, whose float32 form spills with 4 warps on sm_100."""
    tile = config(tokens, rank, depth, itemsize)
    return replace(tile, num_warps=8) if itemsize > 2 else tile


def weight_config(rows: int, rank: int, tokens: int, itemsize: int, target: str) -> Config:
    """For the gradient of the weight, whose two branches keep stages of their own: AMD's 64 KiB hold two of each."""
    tile = config(rows, rank, tokens, itemsize)
    return replace(tile, num_stages=2) if target.startswith("gfx") else tile


def mla_expand_kv_fwd(
    latent: Tensor, w_ukv: Tensor, kv_lora_rank: int, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    tokens, width = latent.shape
    rope_dim = width - kv_lora_rank
    heads = w_ukv.shape[0] // (nope_dim + v_dim)
    k = torch.empty(tokens, heads, nope_dim + rope_dim, dtype=latent.dtype, device=latent.device)
    v = torch.empty(tokens, heads, v_dim, dtype=latent.dtype, device=latent.device)
    if v.numel() == 0:
        return k, v
    tile = config(tokens, max(nope_dim, v_dim), kv_lora_rank, latent.element_size())
    blocks = triton.cdiv(nope_dim, tile.block_n) + triton.cdiv(v_dim, tile.block_n)
    with on_device(latent):
        mla_expand_kv_fwd_kernel[(triton.cdiv(tokens, tile.block_m), heads * blocks)](
            latent,
            w_ukv,
            k,
            v,
            tokens,
            latent.stride(0),
            w_ukv.stride(0),
            HEADS=heads,
            RANK=kv_lora_rank,
            P=nope_dim,
            V=v_dim,
            ROPE=rope_dim,
            ROPE_PAD=triton.next_power_of_2(max(1, rope_dim)),
            **constants(tile),
        )
    return k, v


def mla_expand_kv_bwd(
    dk: Tensor, dv: Tensor, latent: Tensor, w_ukv: Tensor, kv_lora_rank: int, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    tokens, width = latent.shape
    rope_dim = width - kv_lora_rank
    heads = w_ukv.shape[0] // (nope_dim + v_dim)
    dlatent = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
    dw_ukv = torch.empty(w_ukv.shape, dtype=w_ukv.dtype, device=w_ukv.device)
    shape = {"RANK": kv_lora_rank, "P": nope_dim, "V": v_dim}
    strides = (*dk.stride()[:2], *dv.stride()[:2])
    with on_device(latent):
        if tokens:
            tile = latent_config(tokens, kv_lora_rank, v_dim, latent.element_size())
            blocks = triton.cdiv(kv_lora_rank, tile.block_n) + (rope_dim > 0)
            mla_expand_kv_bwd_latent_kernel[(triton.cdiv(tokens, tile.block_m), blocks)](
                dk,
                dv,
                w_ukv,
                dlatent,
                tokens,
                *strides,
                w_ukv.stride(0),
                HEADS=heads,
                ROPE=rope_dim,
                ROPE_PAD=triton.next_power_of_2(max(1, rope_dim)),
                **shape,
                **constants(tile),
            )
        target = arch.of(latent.device)
        tile = weight_config(max(nope_dim, v_dim), kv_lora_rank, max(tokens, 1), latent.element_size(), target)
        blocks = triton.cdiv(nope_dim, tile.block_m) + triton.cdiv(v_dim, tile.block_m)
        mla_expand_kv_bwd_weight_kernel[(heads * blocks, triton.cdiv(kv_lora_rank, tile.block_n))](
            dk, dv, latent, dw_ukv, tokens, *strides, latent.stride(0), **shape, **constants(tile)
        )
    return dlatent, dw_ukv


def aot_cases():
    from ...testing.aot import AotCase, call, tensor, train

    dims = {"kv_lora_rank": 512, "nope_dim": 128, "v_dim": 128}
    for dtype in ("bf16", "fp32"):
        expect = ("LDG.128", "STG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        weight = tensor(dtype, 128 * 256, 512)
        many, few = tensor(dtype, 4096, 576), tensor(dtype, 8, 576)
        yield AotCase(f"many_{dtype}", train("mla_expand_kv", many, weight, **dims), expect=expect)
        yield AotCase(f"few_{dtype}", call("mla_expand_kv", few, weight, **dims), expect=expect)
