"""Inputs of ``moe_experts_fp8``: block edges that are ragged, dropped slots, both kinds of weight scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import tilefuse

from ...sample import Sample
from . import moe_experts


def case(tokens, experts, top_k, hidden, inner, device: Any = "cpu", dtype=torch.bfloat16, *, dropped=0.2) -> tuple:
    """(x, w_gate_up, its scale, w_down, its scale, weights, ids)."""
    x, w_gate_up, w_down, weights, ids, *_ = moe_experts.case(
        tokens, experts, top_k, hidden, inner, device, dtype, dropped=dropped
    )
    quantised = []
    for w in (w_gate_up, w_down):
        codes, scales = zip(*(tilefuse.fp8_quantize(matrix, block=(128, 128)) for matrix in w))
        # bytes: not every operation takes FP8
        codes = torch.stack([c.view(torch.uint8) for c in codes]).view(torch.float8_e4m3fn)
        quantised += [codes, torch.stack(scales)]
    return x, *quantised, weights, ids


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample(case(9, 3, 2, 160, 96, device), name="ragged")
    yield Sample(case(5, 3, 2, 128, 64, device, torch.float32), {"activation": "gelu"}, "gelu")
    yield Sample(case(0, 2, 2, 128, 64, device), name="no_tokens")
    yield Sample(case(5, 3, 2, 128, 64, device), {"limit": 0.3}, "silu_clamped")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"moe_experts_fp8": _samples}
