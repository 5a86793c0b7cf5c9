"""Inputs of ``moe_route``: the routing of published models, odd expert counts, views, empty input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample

# model -> E, options
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "switch": (8, {"top_k": 1, "renormalize": False}),
    "mixtral": (8, {"top_k": 2}),
    "qwen3": (128, {"top_k": 8}),
    "deepseek_v2": (
        160,
        {"top_k": 6, "n_group": 8, "topk_group": 3, "group_score": "max", "renormalize": False, "scale": 16.0},
    ),
    "deepseek_v3": (256, {"top_k": 8, "score": "sigmoid", "n_group": 8, "topk_group": 4, "scale": 2.5}),
    "kimi_k2": (384, {"top_k": 8, "score": "sigmoid", "scale": 2.827}),
    "gpt_oss": (32, {"top_k": 4}),
    "sqrtsoftplus": (60, {"top_k": 5, "score": "sqrtsoftplus"}),
    "none": (7, {"top_k": 3, "score": "none"}),
}
BIASED = ("deepseek_v3", "kimi_k2", "sqrtsoftplus")


def logits_of(tokens: int, experts: int, device: Any = "cpu", dtype=torch.float32, seed: int = 0) -> Tensor:
    """Logits without ties or near ties: distinct, well separated values in random order."""
    generator = torch.Generator().manual_seed(seed + 31 * experts + tokens)
    grid = torch.linspace(-3, 3, experts) if experts > 1 else torch.zeros(1)
    order = torch.stack(
        [torch.randperm(experts, generator=generator) for _ in range(tokens)] or [torch.arange(experts)]
    )
    return grid[order][:tokens].to(device, dtype)


def bias_of(experts: int, device: Any = "cpu", seed: int = 0) -> Tensor:
    """Wider than the scores and mostly negative, and with steps of its own, so that no two biased scores tie."""
    generator = torch.Generator().manual_seed(seed + experts)
    return (torch.rand(experts, generator=generator) * 2 - 1.7).to(device)


def model_case(name: str, tokens: int, device: Any = "cpu", dtype=torch.float32, seed: int = 0):
    """(logits, bias or None, options)."""
    experts, options = MODELS[name]
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return logits, bias_of(experts, device) if name in BIASED else None, options


def _samples(device: torch.device) -> Iterator[Sample]:
    for name in MODELS:
        logits, bias, options = model_case(name, 9, device)
        yield Sample((logits, bias), options, name)
    yield Sample((logits_of(5, 16, device, torch.bfloat16),), {"top_k": 3}, "bf16")
    yield Sample((logits_of(6, 48, device)[:, 16:],), {"top_k": 3, "nan_policy": "zero"}, "view")
    yield Sample((logits_of(0, 16, device),), {"top_k": 3}, "no_tokens")
    yield Sample((logits_of(3, 1, device),), {"top_k": 1}, "one_expert")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"moe_route": _samples}
