"""Inputs of ``logprobs``: ignored tokens, leading dims, slices, a vocabulary of more than one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample
from .linear_logprobs import IGNORED, statistics, transformed


def case(
    tokens: int,
    vocabulary: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.2,
    spread: float = 2.0,
    seed: int = 0,
):
    """(logits, target)."""
    generator = torch.Generator().manual_seed(seed + tokens + vocabulary)
    logits = spread * torch.randn(tokens, vocabulary, generator=generator)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return logits.to(device, dtype), target.to(device)


def naive(logits, target, *, scale=1.0, softcap=0.0, temperature=1.0, ignore_index=IGNORED):
    # NaN in the row of an ignored token reaches nothing
    z = torch.where((target != ignore_index)[..., None], logits, 0)
    z = z if z.dtype == torch.float64 else z.float()
    return statistics(transformed(z, scale, softcap, temperature), target, ignore_index)


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample(case(9, 37, device), dict(scale=0.5, softcap=3.0, temperature=1.5), name="softcap")
    yield Sample(case(6, 130, device, torch.bfloat16), name="bf16")
    logits, target = case(10, 40, device, torch.float16, ignored=0.0)
    target[::3] = 3
    sliced = logits.view(2, 5, 40)[:, :-1], target.view(2, 5)[:, 1:].int()
    yield Sample(sliced, dict(ignore_index=3), name="half_sliced")
    logits, target = case(5, 4100, device, ignored=0.0)
    yield Sample((logits.t().contiguous().t(), target), name="two_blocks_strided")
    yield Sample(case(4, 20, device, ignored=1.1), name="all_ignored")
    yield Sample(case(0, 20, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"logprobs": _samples}
NAIVE = {"logprobs": naive}
