"""Inputs of the losses over pairs, and of whole sequences' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample


def pairs(size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
    """(chosen, rejected, ref_chosen, ref_rejected), log-probabilities of answers."""
    generator = torch.Generator().manual_seed(seed + size)
    return tuple((-4 * torch.rand(size, generator=generator) - 0.1).to(device, dtype) for _ in range(4))


def tokens(shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    """(logp, target); a third of the tokens is ignored, and their logp is NaN."""
    generator = torch.Generator().manual_seed(sum(shape))
    target = torch.randint(0, 50, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.3
    logp = -3 * torch.rand(shape, generator=generator)
    logp, target = logp.masked_fill(ignored, float("nan")), target.masked_fill(ignored, -100)
    return logp.to(device, dtype), target.to(device)


def _preference(device: torch.device) -> Iterator[Sample]:
    yield Sample(pairs(5, device), name="references")
    yield Sample(pairs(4, device, torch.bfloat16), {"kind": "robust", "label_smoothing": 0.1, "margin": 0.2}, "robust")
    for kind in ("hinge", "ipo", "apo_zero", "apo_down"):
        yield Sample(pairs(7, device), {"kind": kind, "beta": 0.5}, kind)
    for kind in ("simpo", "orpo"):
        yield Sample(pairs(6, device)[:2], {"kind": kind, "beta": 2.0}, kind)
    yield Sample(pairs(0, device), name="no_pairs")


def _sequence(device: torch.device) -> Iterator[Sample]:
    yield Sample(tokens((3, 5), device), {"average": True}, "padded")
    bounds = torch.tensor([1, 4, 4, 11], dtype=torch.int32, device=device)
    yield Sample((*tokens((12,), device), bounds), name="packed")
    logp, target = tokens((6,), device, torch.float16)
    yield Sample((logp, target.int(), bounds[:2].long()), {"average": True}, "half")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {
    "preference_loss": _preference,
    "sequence_logp": _sequence,
}
