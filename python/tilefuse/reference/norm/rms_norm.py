"""RMSNorm in plain PyTorch, with the gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows and ``rstd [..., 1]`` of rows in the dtype of the arithmetic."""
    mean = x.square().mean(-1, keepdim=True)
    # a row whose squares overflow is scaled by a power of two first
    small = 2.0**-800 if x.dtype == torch.float64 else 2.0**-100
    factor = torch.where(mean.isinf(), small, 1.0).to(x.dtype)
    scaled = x * factor
    rstd = (scaled.square().mean(-1, keepdim=True) + eps * factor * factor).rsqrt()
    return scaled * rstd, rstd * factor


def scale_of(weight: Tensor | None, weight_offset: float, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if weight is None else weight.to(dtype) + weight_offset


def rms_norm_fwd(x, weight, eps, weight_offset, llama):
    dtype = compute_dtype(x)
    normed, rstd = normalize(x.to(dtype), eps)
    if llama:
        normed = normed.to(x.dtype).to(dtype)
    y = normed * scale_of(weight, weight_offset, dtype)
    return y.to(x.dtype).contiguous(), rstd.squeeze(-1)


def add_rms_norm_fwd(x, residual, weight, eps, weight_offset, llama):
    dtype = compute_dtype(x)
    h = (x.to(dtype) + residual.to(dtype)).to(x.dtype).contiguous()
    y, rstd = rms_norm_fwd(h, weight, eps, weight_offset, llama)
    return y, h, rstd


def norm_gradient(dnormed: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of a row from that of its normed row."""
    return rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))


def rms_norm_bwd(dout, dh, x, weight, rstd, weight_offset, with_dweight):
    dtype = compute_dtype(x)
    dout, rstd = dout.to(dtype), rstd.unsqueeze(-1)
    normed = x.to(dtype) * rstd
    dx = norm_gradient(dout * scale_of(weight, weight_offset, dtype), normed, rstd)
    if dh is not None:
        dx = dx + dh.to(dtype)
    if with_dweight:
        dweight = (dout * normed).sum(0).to(weight.dtype)
    else:
        dweight = (x if weight is None else weight).new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight
