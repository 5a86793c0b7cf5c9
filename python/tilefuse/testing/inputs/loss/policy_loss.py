"""Inputs of ``policy_loss``: padded and packed answers, NaN in whatever is masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample

BOUNDS = (1, 5, 5, 14, 19)


def case(
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 0.3,
    per_sequence: int = 0,
    masked: float = 0.3,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """(logp, advantages, old_logp, ref_logp, mask, token_weight); ``spread`` is that of the log-ratios.

    With ``per_sequence`` advantages are that many. A third of the tokens is masked, and holds NaN.
    """
    generator = torch.Generator().manual_seed(seed + sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    logp = -2 * torch.rand(shape, generator=generator)
    old, ref = logp + spread * draw(*shape), logp + spread * draw(*shape)
    weight = 0.5 + torch.rand(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) >= masked
    advantages = draw(per_sequence) if per_sequence else draw(*shape).masked_fill(~mask, float("nan"))
    tokens = (x.masked_fill(~mask, float("nan")) for x in (logp, old, ref, weight))
    logp, old, ref, weight = (x.to(device, dtype) for x in tokens)
    return logp, advantages.to(device, dtype), old, ref, mask.to(device), weight


def bounds(device: torch.device | str = "cpu") -> Tensor:
    """Of sequences in 20 tokens: one is empty, and a token on either side belongs to none."""
    return torch.tensor(BOUNDS, dtype=torch.int32, device=device)


def _samples(device: torch.device) -> Iterator[Sample]:
    grpo: dict[str, Any] = {"kl_beta": 0.1, "reduction": "sequence"}
    yield Sample(case((3, 7), device, per_sequence=3), grpo, "grpo")
    items = torch.tensor(40.0, device=device)
    packed = (*case((20,), device), bounds(device), items)
    yield Sample(packed, {"kl_beta": 0.2, "kl": "k3+", "kl_weighted": True, "dual_clip": 1.2}, "packed")
    gspo: dict[str, Any] = {"level": "sequence", "reduction": "none", "kl": "k2", "kl_beta": 0.3}
    yield Sample((*case((20,), device, per_sequence=4), bounds(device).long()), gspo, "gspo_packed")
    logp, advantages, old, ref, mask, weight = case((2, 9), device, torch.bfloat16, seed=1)
    yield Sample((logp, advantages, old, ref, mask.int(), weight), {"kind": "cispo", "reduction": "sum"}, "cispo_bf16")
    logp, advantages, *_ = case((12,), device, masked=0.0)
    yield Sample((logp, advantages), {"kind": "reinforce"}, "reinforce")
    yield Sample(case((0, 5), device), {"level": "sequence"}, "no_sequences")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"policy_loss": _samples}
