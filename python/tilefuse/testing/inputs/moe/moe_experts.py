"""Inputs of ``moe_experts``: odd sizes, dropped slots, empty experts, biases, every activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .moe_plan import ids_of


def case(
    tokens: int, experts: int, top_k: int, hidden: int, inner: int, device: Any = "cpu", dtype=torch.float32, *,
    bias=False, dropped=0.2, seed: int = 0,
) -> tuple:  # fmt: skip
    """(x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down)."""
    generator = torch.Generator().manual_seed(seed + tokens + hidden)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    x = normal(tokens, hidden)
    w_gate_up = normal(experts, 2 * inner, hidden, scale=hidden**-0.5)
    w_down = normal(experts, hidden, inner, scale=inner**-0.5)
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    biases = (normal(experts, 2 * inner), normal(experts, hidden)) if bias else (None, None)
    return x, w_gate_up, w_down, weights, ids_of(tokens, top_k, experts, device, dropped, seed), *biases


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample(case(9, 5, 2, 97, 47, device), name="odd")
    yield Sample(case(8, 4, 3, 64, 32, device, torch.bfloat16), {"activation": "gelu"}, "bf16_gelu")
    options = {"activation": "swiglu_oai", "limit": 1.0}
    yield Sample(case(7, 4, 2, 33, 16, device, bias=True), options, "gpt_oss")
    yield Sample(case(3, 4, 2, 32, 16, device, dropped=2.0), name="all_dropped")
    yield Sample(case(0, 4, 2, 32, 16, device), name="no_tokens")
    x, w_gate_up, w_down, *rest = case(5, 3, 2, 32, 16, device)
    w_gate_up, w_down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w_gate_up, w_down))
    yield Sample((x, w_gate_up, w_down, *rest), name="transposed")
    yield Sample(case(6, 4, 2, 48, 16, device), {"limit": 0.5}, "silu_clamped")
    yield Sample(case(6, 4, 2, 48, 16, device), {"activation": "gelu_erf"}, "gelu_erf")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"moe_experts": _samples}
