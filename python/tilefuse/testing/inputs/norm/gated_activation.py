"""Inputs of ``gated_activation``: every activation, both layouts, clamps, views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .rms_norm import normal


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor | None], dict[str, Any]]]:
    """name, (gate, up) and options."""

    def make(*shape, seed=0):
        return normal(*shape, device=device, dtype=dtype, seed=seed) * 2

    for activation in ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"):
        yield activation, (make(5, 83), make(5, 83, seed=1)), {"activation": activation}
    yield "joined", (make(2, 3, 96), None), {}
    yield "interleaved", (make(4, 2 * 35), None), {"layout": "interleaved", "activation": "gelu_tanh"}
    yield "silu_clamped", (make(4, 40), make(4, 40, seed=1)), {"limit": 1.5}
    oai = {"activation": "swiglu_oai", "limit": 2.0, "alpha": 1.5, "layout": "interleaved"}
    yield "oai_clamped", (make(3, 64), None), oai
    yield "vector", (make(21), make(21, seed=1)), {}
    both = make(6, 3, 160)
    yield "views", (both[:, 1, 3:70], both[:, 2, 90:157]), {}
    yield "transposed", (both[:, 0].T, both[:, 1].T), {"activation": "gelu"}
    yield "empty", (make(0, 32), None), {}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, options in cases(device, torch.bfloat16):
        yield Sample(tensors, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"gated_activation": _samples}
