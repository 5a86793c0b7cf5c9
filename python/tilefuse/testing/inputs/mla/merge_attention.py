"""Inputs of ``merge_attention``: padded and packed, empty sides that hold NaN, unequal strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .common import normal


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (out_a, lse_a, out_b, lse_b) and options (none)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def side(lead: tuple[int, ...], rows: int, heads: int, dim: int, seed: int, padding: int = 0):
        out = normal(*lead, rows, heads, dim + padding, device=device, dtype=dtype, seed=seed)[..., :dim]
        lse = normal(*lead, rows, heads, device=device, dtype=wide, seed=seed + 9) * 3
        return out, lse.transpose(-1, -2)

    yield "padded", (*side((2,), 7, 3, 128, 0), *side((2,), 7, 3, 128, 1)), {}
    # heads of one side lie further apart: values padded to the width of keys
    yield "packed", (*side((), 19, 2, 128, 0), *side((), 19, 2, 128, 1, padding=64)), {}
    yield "odd", (*side((), 5, 3, 72, 0), *side((), 5, 3, 72, 1)), {}
    out_a, lse_a, out_b, lse_b = (*side((), 6, 1, 32, 0), *side((), 6, 1, 32, 1))
    lse_a[:, 0], lse_b[:, 1] = float("-inf"), float("-inf")
    lse_a[:, 2] = lse_b[:, 2] = float("-inf")
    lse_a[:, 3] = float("inf")
    lse_a[:, 4], lse_b[:, 4] = 500.0, -500.0
    for row in (0, 2, 3):
        out_a[row] = float("nan")
    for row in (1, 2):
        out_b[row] = float("nan")
    yield "empty_sides", (out_a, lse_a, out_b, lse_b), {}
    yield "no_rows", (*side((), 0, 2, 16, 0), *side((), 0, 2, 16, 1)), {}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"merge_attention": _samples}
