"""Inputs of ``t5_distance_bias``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample


def _samples(device: torch.device) -> Iterator[Sample]:
    weight = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).to(device)
    yield Sample((weight, 200), name="encoder")
    yield Sample((weight, 300), {"bidirectional": False}, "decoder")
    yield Sample((weight[:12, 1:4].bfloat16(), 17), {"num_buckets": 12, "max_distance": 9}, "few_buckets")
    yield Sample((weight, 1), name="one_token")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"t5_distance_bias": _samples}
