"""RMSNorm of the latent part and RoPE of the rest, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rope.rope import rotate, token_positions, token_tables


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rstd_of(latent: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)``, [.., 1] in latent's (compute) dtype.

    The sum is taken in float64 so that its order does not show after rounding: every backend stores the same bits.
    """
    mean = latent.double().square().sum(-1, keepdim=True) / latent.shape[-1]
    # torch's float32 square root is not correctly rounded on every machine, the float64 one rounds to it
    return 1.0 / torch.sqrt((mean.to(latent.dtype) + eps).double()).to(latent.dtype)


def tables_of(
    name: str,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token, [T, 1, r / 2]."""
    if cos.shape[1] == 0 or tokens == 0:
        empty = cos.new_zeros(tokens, 1, cos.shape[1], dtype=dtype)
        return empty, empty
    found = token_positions(name, (tokens,), cos.shape[0], positions, None, cos.device)
    return token_tables(cos, sin, found, dtype, conjugate, (), False)


def normed_and_rotated(
    name: str,
    kv_a: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Both parts of a latent row, unrounded: [T, R] and [T, r] in float32 (float64 for float64 inputs)."""
    dtype = compute_dtype(kv_a)
    rank = weight.shape[0]
    latent = kv_a[:, :rank].to(dtype)
    normed = latent * rstd_of(latent, eps) * weight.to(dtype)
    cos, sin = tables_of(name, cos, sin, positions, kv_a.shape[0], dtype)
    return normed, rotate(kv_a[:, None, rank:].to(dtype), cos, sin, interleaved).squeeze(1)


def mla_compress_kv_fwd(
    kv_a: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    parts = normed_and_rotated("mla_compress_kv", kv_a, weight, cos, sin, positions, eps, interleaved)
    return torch.cat(parts, -1).to(kv_a.dtype)


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
    """Gradients of kv_a (its dtype) and weight (its dtype)."""
    dtype = compute_dtype(kv_a)
    rank = weight.shape[0]
    latent, dlatent = kv_a[:, :rank].to(dtype), dout[:, :rank].to(dtype)
    rstd = rstd_of(latent, eps)
    normed = latent * rstd
    scaled = dlatent * weight.to(dtype)
    din = (scaled - normed * (scaled * normed).sum(-1, keepdim=True) / rank) * rstd
    cos, sin = tables_of("mla_compress_kv", cos, sin, positions, kv_a.shape[0], dtype, conjugate=True)
    drope = rotate(dout[:, None, rank:].to(dtype), cos, sin, interleaved).squeeze(1)
    dweight = (dlatent * normed).sum(0).to(weight.dtype)
    return torch.cat((din, drope), -1).to(kv_a.dtype), dweight
