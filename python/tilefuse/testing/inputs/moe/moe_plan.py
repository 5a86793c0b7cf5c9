"""Inputs of ``moe_plan``: both index widths, dropped ids, empty experts, nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample


def ids_of(tokens: int, top_k: int, experts: int, device: Any = "cpu", dropped: float = 0.0, seed: int = 0) -> Tensor:
    """Distinct random experts per token, int32; a share of the slots holds an id outside of [0, experts)."""
    generator = torch.Generator().manual_seed(seed + tokens + 7 * experts)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int()
    outside = torch.rand(tokens, top_k, generator=generator)
    ids = torch.where(outside < dropped / 2, -1, ids)
    return torch.where(outside > 1 - dropped / 2, experts, ids).int().to(device)


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample((ids_of(9, 2, 8, device), 8), name="plain")
    yield Sample((ids_of(40, 3, 7, device, dropped=0.3).long(), 7), name="dropped_int64")
    yield Sample((torch.full((5, 2), -1, dtype=torch.int32, device=device), 4), name="all_dropped")
    yield Sample((torch.zeros(6, 1, dtype=torch.int32, device=device), 5), name="one_expert_takes_all")
    yield Sample((ids_of(0, 2, 8, device), 8), name="no_tokens")
    yield Sample((ids_of(8, 4, 6, device).T, 6), name="transposed")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"moe_plan": _samples}
