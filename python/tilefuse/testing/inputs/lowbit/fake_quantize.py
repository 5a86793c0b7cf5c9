"""Inputs of ``fake_quantize``: both rules, own and given scales, some of which clamp, views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from ..norm.rms_norm import normal


def given(x: Tensor, bits: int, group_size: int, symmetric: bool = True) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of groups that clamp about a tenth of normal values."""
    groups = -(-x.shape[-1] // group_size) if group_size else 1
    shape = (*x.shape[:-1], groups)
    scale = normal(*shape, seed=3).abs().mul(0.1).add(1.6).to(x.device)
    if symmetric:
        return scale / (2 ** (bits - 1) - 1), None
    generator = torch.Generator().manual_seed(4)
    zero = torch.randint(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, shape, generator=generator, dtype=torch.uint8)
    return scale * 2 / (2**bits - 1), zero.to(x.device)


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor | None, Tensor | None], dict[str, Any]]]:
    """name, (x, scale, zero) and options."""

    def make(*shape, seed=0):
        return normal(*shape, device=device, dtype=dtype, seed=seed)

    x = make(5, 80)
    yield "own", (x, None, None), {"group_size": 32}
    yield "own_asymmetric", (make(2, 3, 75), None, None), {"bits": 8, "group_size": 0, "symmetric": False}
    yield "amax", (x, None, None), {"group_size": 32, "scale_gradient": True}
    extremes = {"bits": 6, "group_size": 40, "symmetric": False, "scale_gradient": True}
    yield "extremes", (make(4, 75), None, None), extremes
    yield "given", (x, *given(x, 4, 32)), {"group_size": 32}
    narrow = make(6, 2, 70)[:, 1, 3:68]
    asymmetric = {"bits": 6, "group_size": 16, "symmetric": False}
    yield "given_asymmetric", (narrow, *given(narrow, 6, 16, False)), asymmetric
    yield "transposed", (make(64, 3).T, None, None), {"bits": 8, "group_size": 64}
    vector = make(21)
    yield "vector", (vector, *given(vector, 8, 0)), {"bits": 8, "group_size": 0}
    yield "empty", (make(0, 32), None, None), {"group_size": 32}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, options in cases(device, torch.bfloat16):
        yield Sample(tensors, options, name)


SAMPLES = {"fake_quantize": _samples}
