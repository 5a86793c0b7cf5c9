"""Inputs of ``fp8_linear``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...sample import Sample


def _linear(device: torch.device) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(device)

    yield Sample((normal(2, 5, 150), normal(70, 150)), name="plain")
    yield Sample((normal(9, 64), normal(32, 64), normal(32)), {"scale_format": "pow2"}, name="bias")


SAMPLES = {"fp8_linear": _linear}
