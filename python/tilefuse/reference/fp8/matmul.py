"""Block-scaled e4m3 matmul in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...packing import plain
from .quantize import expand_scale


def fp8_matmul_fwd(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    b = plain(b, 2, a.shape[1])
    if a_scale is None:
        a_scale = b_scale.new_ones((a.shape[0], b_scale.shape[1]))
    n, k = b.shape
    scale_rows = 1 if b_scale.shape[0] == n else 128
    if out_dtype == torch.float64:
        left = a.double() * expand_scale(a_scale.double(), tuple(a.shape), 1)
        right = b.double() * expand_scale(b_scale.double(), tuple(b.shape), scale_rows)
        out = left @ right.t()
    else:
        out = a.new_zeros((a.shape[0], n), dtype=torch.float32)
        b_scale = b_scale.repeat_interleave(scale_rows, 0)[:n]
        for block in range(a_scale.shape[1]):
            part = slice(block * 128, min(block * 128 + 128, k))
            # codes and their products are exact in float32
            product = a[:, part].float() @ b[:, part].float().t()
            # kept finite: zero codes times an overflown product would be NaN
            factor = (a_scale[:, block, None] * b_scale[None, :, block]).clamp(max=torch.finfo(torch.float32).max)
            out += product * factor
    return (out if bias is None else out + bias.to(out.dtype)).to(out_dtype)
