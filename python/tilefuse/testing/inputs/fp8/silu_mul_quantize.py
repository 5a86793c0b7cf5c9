"""Inputs of ``silu_mul_quantize``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...sample import Sample
from .quantize import magnitudes


def _silu_mul_quantize(device: torch.device) -> Iterator[Sample]:
    yield Sample((magnitudes((5, 600), torch.bfloat16).to(device),), name="ragged")
    yield Sample((magnitudes((2, 3, 256), torch.float32).to(device),), {"scale_format": "pow2"}, name="leading")


SAMPLES = {"silu_mul_quantize": _silu_mul_quantize}
