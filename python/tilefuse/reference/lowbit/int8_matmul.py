"""The 8-bit integer product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def columns(value: Tensor) -> Tensor:
    """Values of rows as ``[rows, G]``; one of all groups has G = 1."""
    return value[:, None] if value.ndim == 1 else value


def int8_matmul_fwd(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    a_zero: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    # float64 holds every sum of products exactly, in any order
    left, right = a.double(), b.double()
    if a_zero is not None:
        left -= columns(a_zero)
    a_scale, b_scale = columns(a_scale), columns(b_scale)
    groups = b_scale.shape[1] if a_scale.shape[1] == 1 else a_scale.shape[1]
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=wide, device=a.device)
    size = a.shape[1] // groups if groups else 0
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        scale = a_scale[:, g % a_scale.shape[1], None].to(wide) * b_scale[None, :, g % b_scale.shape[1]].to(wide)
        out += (left[:, part] @ right[:, part].t()).to(wide) * scale
    return (out if bias is None else out + bias).to(out_dtype)
