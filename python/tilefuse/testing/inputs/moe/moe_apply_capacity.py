"""Inputs of ``moe_apply_capacity``: both policies, ties, dropped ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample
from .moe_plan import ids_of


def _samples(device: torch.device) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)
    for policy in ("position", "weight"):
        ids = ids_of(12, 2, 4, device, dropped=0.2)
        weights = torch.randint(1, 5, (12, 2), generator=generator).float().to(device)
        yield Sample((ids, weights, 4, 3), {"policy": policy}, policy)
    yield Sample((ids.long(), weights.bfloat16(), 4, 0), name="no_capacity")
    yield Sample((ids[:0], weights[:0], 4, 3), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"moe_apply_capacity": _samples}
