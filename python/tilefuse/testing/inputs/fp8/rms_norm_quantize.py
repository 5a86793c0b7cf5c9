"""Inputs of ``rms_norm_quantize``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...sample import Sample
from .quantize import magnitudes


def _rms_norm_quantize(device: torch.device) -> Iterator[Sample]:
    weight = torch.linspace(0.5, 1.5, 300, device=device)
    x, residual = (magnitudes((5, 300), torch.bfloat16, seed).to(device) for seed in (0, 1))
    yield Sample((x, weight), name="plain")
    yield Sample((x, weight.bfloat16(), residual), {"scale_format": "pow2", "norm_eps": 1e-5}, name="residual")


SAMPLES = {"rms_norm_quantize": _rms_norm_quantize}
