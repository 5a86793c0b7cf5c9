"""Grouped block-scaled e4m3 matmul in plain PyTorch. Reads the offsets on the host."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...packing import plain
from .matmul import fp8_matmul_fwd


def fp8_grouped_matmul_fwd(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    b = plain(b, 3, a.shape[1])
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    # bounds clamped and made ascending: the same reading on every backend
    bounds = offsets.clamp(0, a.shape[0]).cummax(0).values.tolist()
    for e, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            rows = slice(begin, end)
            scale = None if a_scale is None else a_scale[rows]
            out[rows] = fp8_matmul_fwd(a[rows], scale, b[e], b_scale[e], None, out_dtype)
    return out
