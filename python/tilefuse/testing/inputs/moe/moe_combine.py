"""Inputs of ``moe_combine``: dropped slots, weights in both dtypes, strided rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tilefuse

from ...sample import Sample
from .moe_plan import ids_of


def case(
    tokens, top_k, hidden, device: torch.device | str = "cpu", dtype=torch.float32, dropped=0.2, experts=6, seed=0
):
    """(y, inverse, weights), the plan's inverse of random ids."""
    generator = torch.Generator().manual_seed(seed + tokens + hidden)
    with tilefuse.backend("auto"):
        _, inverse, _ = tilefuse.moe_plan(ids_of(tokens, top_k, experts, device, dropped, seed), experts)
    y = torch.randn(tokens * top_k, hidden, generator=generator).to(device, dtype)
    return y, inverse, torch.rand(tokens, top_k, generator=generator).to(device)


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample(case(9, 3, 97, device), name="odd")
    yield Sample(case(8, 2, 64, device, torch.bfloat16), name="bf16")
    y, inverse, weights = case(5, 2, 48, device)
    yield Sample((y[:, 8:40], inverse.long(), weights), name="view_int64")
    yield Sample((y.half(), inverse, weights.half()), name="half_weights")
    yield Sample(case(0, 2, 16, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"moe_combine": _samples}
