"""Inputs of ``fp8_grouped_matmul``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...sample import Sample
from .quantize import quantized


def operands(
    rows: int, n: int, k: int, offsets: Sequence[int], device: torch.device | str = "cpu", *, b_rows: int = 128
) -> tuple[Tensor, ...]:
    """a, a_scale, b, b_scale, offsets of ``len(offsets) - 1`` experts."""
    experts = len(offsets) - 1
    bounds = torch.tensor(offsets, dtype=torch.int32, device=device)
    return (*quantized((rows, k), 1, device), *quantized((experts, n, k), b_rows, device, 1), bounds)


def _grouped_matmul(device: torch.device) -> Iterator[Sample]:
    yield Sample(operands(40, 70, 200, [2, 10, 10, 38], device), name="tiles")
    yield Sample(operands(9, 5, 6, [0, 4, 9], device, b_rows=1), {"out_dtype": torch.float32}, name="rows")


SAMPLES = {"fp8_grouped_matmul": _grouped_matmul}
