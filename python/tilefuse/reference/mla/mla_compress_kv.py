"""RMSNorm of the latent part and RoPE of the rest, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rstd_of(latent: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)``, [.., 1] in latent's (compute) dtype.

    The sum is taken in float64 so that its order does not show after rounding: every backend stores the same bits.
    """
    mean = latent.double().square().sum(-1, keepdim=True) / latent.shape[-1]
    return 1.0 / torch.sqrt(mean.to(latent.dtype) + eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool = False) -> Tensor:
    """Rotates the last dim of x ``[T, .., r]`` by rows of tables ``[T, r / 2]``."""
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1] // 2,)
    cos, sin = cos.to(x.dtype).view(shape), sin.to(x.dtype).view(shape)
    if conjugate:
        sin = -sin
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def table_rows(cos: Tensor, sin: Tensor, positions: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """The rows of the tables for each token; positions past the table are clamped here, raised on by the op."""
    if cos.shape[1] == 0 or tokens == 0:
        return cos.new_zeros(tokens, cos.shape[1]), sin.new_zeros(tokens, cos.shape[1])
    if positions is None:
        return cos[:tokens], sin[:tokens]
    index = positions.long().clamp(0, cos.shape[0] - 1)
    return cos[index], sin[index]


def normed_and_rotated(
    kv_a: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Both parts of a latent row, unrounded: [T, R] and [T, r] in float32 (float64 for float64 inputs)."""
    dtype = compute_dtype(kv_a)
    rank = weight.shape[0]
    latent = kv_a[:, :rank].to(dtype)
    normed = latent * rstd_of(latent, eps) * weight.to(dtype)
    cos, sin = table_rows(cos, sin, positions, kv_a.shape[0])
    return normed, rotate(kv_a[:, rank:].to(dtype), cos, sin, interleaved)


def mla_compress_kv_fwd(
    kv_a: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    return torch.cat(normed_and_rotated(kv_a, weight, cos, sin, positions, eps, interleaved), -1).to(kv_a.dtype)


def mla_compress_kv_bwd(
    grad: Tensor,
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
    latent, grad_latent = kv_a[:, :rank].to(dtype), grad[:, :rank].to(dtype)
    rstd = rstd_of(latent, eps)
    normed = latent * rstd
    scaled = grad_latent * weight.to(dtype)
    grad_in = (scaled - normed * (scaled * normed).sum(-1, keepdim=True) / rank) * rstd
    cos, sin = table_rows(cos, sin, positions, kv_a.shape[0])
    grad_rope = rotate(grad[:, rank:].to(dtype), cos, sin, interleaved, conjugate=True)
    grad_weight = (grad_latent * normed).sum(0).to(weight.dtype)
    return torch.cat((grad_in, grad_rope), -1).to(kv_a.dtype), grad_weight
