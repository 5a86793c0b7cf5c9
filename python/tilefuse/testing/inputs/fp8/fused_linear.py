"""Inputs of ``rms_norm_fp8_linear`` and ``silu_mul_fp8_linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample


def _normal(device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(torch.bfloat16).to(device)


def _rms_norm(device: torch.device) -> Iterator[Sample]:
    normal = _normal(device)
    x, residual = normal(2, 5, 150), normal(2, 5, 150)
    yield Sample((x, normal(150), normal(70, 150), normal(70), residual), {"norm_eps": 1e-5}, name="plain")
    yield Sample((normal(9, 64), normal(64).float(), normal(32, 64)), {"scale_format": "pow2"}, name="no residual")


def _silu_mul(device: torch.device) -> Iterator[Sample]:
    normal = _normal(device)
    yield Sample((normal(2, 5, 300), normal(70, 150)), name="plain")
    yield Sample((normal(9, 128), normal(32, 64), normal(32)), {"scale_format": "pow2"}, name="bias")


SAMPLES = {"rms_norm_fp8_linear": _rms_norm, "silu_mul_fp8_linear": _silu_mul}
