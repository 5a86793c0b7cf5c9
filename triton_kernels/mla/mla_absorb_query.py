"""Per-head products between query space and latent space, with RoPE of the rest of each row in the same pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import constants, on_device
from .mla_compress_kv import check_positions, load_pairs, load_tables, position_of, store_pairs


@triton.jit(do_not_specialize=["tokens", "table_rows"])
def mla_absorb_query_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    tokens,
    table_rows,
    x_token,
    x_head,
    w_head,
    w_k,
    w_n,
    cos_stride,
    sin_stride,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, h] = x[t, h, :K] @ weight[h] | rotated x[t, h, K:]."""
    head = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < tokens
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = x_ptr + token * x_token + head * x_head
    row_out = out_ptr + (token * HEADS + head) * (N + 2 * HALF)
    weight_ptr += head * w_head
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            row_in[:, None] + k[None, :], mask=mask[:, None] & (k < K)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        keep = (k < K)[:, None] & (n < N)[None, :]
        b = tl.load(weight_ptr + k[:, None] * w_k + n[None, :] * w_n, mask=keep, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    tl.store(row_out[:, None] + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (n < N)[None, :])
    if HALF > 0:  # noqa: SIM102, the outer one is decided by the compiler
        if tl.program_id(1) == 0:
            position = position_of(positions_ptr, token, mask, table_rows)
            c, s = load_tables(cos_ptr, sin_ptr, cos_stride, sin_stride, position, mask, HALF, HALF_PAD)
            if CONJUGATE:
                s = -s
            a, b = load_pairs(row_in + K, mask, HALF, HALF_PAD, INTERLEAVED)
            store_pairs(row_out + N, a * c - b * s, b * c + a * s, mask, HALF, HALF_PAD, INTERLEAVED)


@triton.jit(do_not_specialize=["tokens"])
def mla_absorb_query_bwd_weight_kernel(
    q_ptr,
    dout_ptr,
    dweight_ptr,
    tokens,
    q_token,
    q_head,
    g_token,
    g_head,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw_uk[h] = q[:, h, :K].T @ dout[:, h, :N], summed over tokens in their order."""
    head = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += head * q_head
    dout_ptr += head * g_head
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = (token < tokens)[:, None]
        a = tl.load(
            q_ptr + token[:, None] * q_token + p[None, :], mask=mask & (p < K)[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_M]
        b = tl.load(
            dout_ptr + token[:, None] * g_token + n[None, :], mask=mask & (n < N)[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    keep = (p < K)[:, None] & (n < N)[None, :]
    at = head * K * N + p.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(dweight_ptr + at, acc.to(dweight_ptr.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """Tile of a product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(rows: int, columns: int, depth: int, itemsize: int) -> Config:
    """For [rows, depth] x [depth, columns]: narrow where there are few rows, as in decode."""
    if itemsize > 2:
        return Config(32 if rows > 16 else 16, 64, 32, 4, 2)
    block_m = 16 if rows <= 16 else 64 if rows <= 256 else 128
    return Config(block_m, 64 if columns <= 64 else 128, 32 if depth <= 32 else 64, 8 if block_m == 128 else 4, 3)


def product(
    x: Tensor,
    weight: Tensor,
    weight_strides: tuple[int, int, int],
    k: int,
    n: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    tokens, heads, width = x.shape
    out = torch.empty(tokens, heads, n + width - k, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    check_positions("mla_absorb_query", cos, positions, tokens)
    half = (width - k) // 2
    tile = config(tokens, n, k, x.element_size())
    with on_device(x):
        mla_absorb_query_kernel[(triton.cdiv(tokens, tile.block_m), triton.cdiv(n, tile.block_n), heads)](
            x,
            weight,
            cos,
            sin,
            positions,
            out,
            tokens,
            cos.shape[0],
            *x.stride()[:2],
            *weight_strides,
            cos.stride(0),
            sin.stride(0),
            HEADS=heads,
            K=k,
            N=n,
            HALF=half,
            HALF_PAD=triton.next_power_of_2(max(1, half)),
            INTERLEAVED=interleaved,
            CONJUGATE=conjugate,
            **constants(tile),
        )
    return out


def mla_absorb_query_fwd(
    q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    _, nope, rank = w_uk.shape
    return product(q, w_uk, w_uk.stride(), nope, rank, cos, sin, positions, interleaved, False)


def mla_absorb_query_bwd(
    dout: Tensor, q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    heads, nope, rank = w_uk.shape
    transposed = (w_uk.stride(0), w_uk.stride(2), w_uk.stride(1))
    dq = product(dout, w_uk, transposed, rank, nope, cos, sin, positions, interleaved, True)
    dw_uk = torch.empty(w_uk.shape, dtype=w_uk.dtype, device=w_uk.device)
    tile = config(nope, rank, q.shape[0], q.element_size())
    if dw_uk.numel():
        with on_device(q):
            mla_absorb_query_bwd_weight_kernel[
                (triton.cdiv(nope, tile.block_m), triton.cdiv(rank, tile.block_n), heads)
            ](q, dout, dw_uk, q.shape[0], *q.stride()[:2], *dout.stride()[:2], K=nope, N=rank, **constants(tile))
    return dq, dw_uk


def aot_cases():
    from ...testing.aot import AotCase, call, tensor, train

    for dtype in ("bf16", "fp32"):
        expect = ("LDG.128", "STG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        table, weight = tensor("fp32", 8192, 32), tensor(dtype, 128, 128, 512)
        q, positions = tensor(dtype, 4096, 128, 192), tensor("i32", 4096)
        prefill = train("mla_absorb_query", q, weight, table, table, positions)
        yield AotCase(f"prefill_{dtype}", prefill, expect=expect)
        if dtype == "bf16":
            decode = call("mla_absorb_query", tensor(dtype, 8, 128, 192), weight, table, table, tensor("i32", 8))
            yield AotCase(f"decode_{dtype}", decode, expect=expect)
