"""Inputs of ``fp8_matmul``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...sample import Sample
from .quantize import quantized


def operands(
    m: int, n: int, k: int, device: torch.device | str = "cpu", *, b_rows: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, a_scale, b, b_scale with (1, 128) scales for a and (b_rows, 128) scales for b."""
    return (*quantized((m, k), 1, device, seed), *quantized((n, k), b_rows, device, seed + 1))


def _matmul(device: torch.device) -> Iterator[Sample]:
    yield Sample(operands(7, 130, 300, device), name="tiles")
    bias = torch.linspace(-1, 1, 64, device=device)
    yield Sample((*operands(70, 64, 128, device, b_rows=1), bias), {"out_dtype": torch.float32}, name="rows_bias")


SAMPLES = {"fp8_matmul": _matmul}
