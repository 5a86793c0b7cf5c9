"""Inputs of ``qk_norm_rope``: the tensors of ``rope_qk`` without its other options, and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .rope import cases as rope_cases
from .rope import normal


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, ...], tuple, dict[str, Any]]]:
    """name, (q, k, q_weight, k_weight), the other tensors (cos, sin, positions?, cu_seqlens?) and the options."""
    for i, (name, q, k, rest, options) in enumerate(rope_cases(device, dtype)):
        # the gradient of a norm over two numbers cancels: no two float32 evaluations of it agree
        if set(options) <= {"interleaved", "rotary_offset"} and name != "dim2":
            # weights are often float32; Gemma stores them less 1
            weight_dtype = dtype if i % 2 or dtype == torch.float64 else torch.float32
            offset = 1.0 if i % 3 == 0 else 0.0
            dim = q.shape[-1]
            weights = [
                normal(dim, device=device, dtype=torch.float32, seed=seed).mul(0.2).add(1.0 - offset).to(weight_dtype)
                for seed in (1, 2)
            ]
            if offset:
                options = options | {"weight_offset": offset, "eps": 1e-5}
            yield name, (q, k, *weights), rest, options


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, rest, options in cases(device, torch.bfloat16):
        yield Sample((*tensors, *rest), options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"qk_norm_rope": _samples}
