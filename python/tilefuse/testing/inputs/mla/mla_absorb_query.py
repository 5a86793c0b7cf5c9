"""Inputs of ``mla_absorb_query``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .common import normal, tables


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (q, w_uk, cos, sin, positions) and options."""
    order = torch.tensor([31, 0, 5, 5, 7, 1, 2], device=device)
    for name, tokens, heads, nope, rank, rope, options in (
        ("deepseek", 7, 2, 128, 512, 64, {}),
        ("half", 7, 3, 64, 256, 64, {"interleaved": False}),
        ("no_rope", 7, 1, 72, 96, 0, {}),
        ("odd_widths", 7, 3, 20, 90, 6, {}),
        ("one_head", 5, 1, 21, 91, 6, {}),
        ("counted", 33, 2, 32, 64, 16, {}),
        ("no_tokens", 0, 2, 32, 64, 16, {}),
    ):
        q = normal(heads, tokens, nope + rope, device=device, dtype=dtype).transpose(0, 1)
        # the key half of kv_b_proj, a view
        w_ukv = normal(heads, nope + 24, rank, device=device, dtype=torch.float32, seed=3) * nope**-0.5
        positions = None if name == "counted" else order[:tokens].int()
        yield name, (q, w_ukv.to(dtype)[:, :nope], *tables(rope, 40, device), positions), options


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"mla_absorb_query": _samples}
