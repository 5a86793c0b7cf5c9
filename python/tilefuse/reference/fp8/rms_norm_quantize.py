"""Residual add, RMSNorm and quantisation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import fp8_quantize_rows


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dim, kept, by halving a power of two of elements: an order that every backend can follow."""
    size = 128
    while size < x.shape[-1]:
        size *= 2
    x = F.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


def rms_norm_quantize_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_eps: float, pow2: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(compute)
    if residual is not None:
        total = total + residual.to(compute)
    # tensor divisors: torch multiplies by the rounded reciprocal when it divides by a number on a GPU
    squares = tree_sum(total * total)
    mean = squares / torch.full_like(squares, x.shape[-1])
    # torch's float32 square root is not correctly rounded on every CPU; a float64 one, rounded, is
    factor = torch.ones_like(mean) / torch.sqrt((mean + norm_eps).to(torch.float64)).to(compute)
    q, scale = fp8_quantize_rows(total * factor * weight.to(compute), pow2, eps)
    return q, scale, total.to(x.dtype) if residual is not None else x.clone(memory_format=torch.contiguous_format)
