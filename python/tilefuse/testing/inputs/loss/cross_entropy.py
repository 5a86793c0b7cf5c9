"""Inputs of ``cross_entropy``: every weight and option, leading dims, slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample
from .linear_cross_entropy import losses_of, weights
from .linear_logprobs import IGNORED, transformed
from .logprobs import case


def naive(
    logits,
    target,
    token_weight=None,
    class_weight=None,
    num_items=None,
    *,
    scale=1.0,
    softcap=0.0,
    ignore_index=IGNORED,
    **options,
):
    """The formula in PyTorch."""
    z = torch.where((target != ignore_index)[..., None], logits, 0)
    z = z if z.dtype == torch.float64 else z.float()
    z = transformed(z, scale, softcap)
    return losses_of(z, target, token_weight, class_weight, num_items, ignore_index=ignore_index, **options)


def _samples(device: torch.device) -> Iterator[Sample]:
    logits, target = case(9, 37, device)
    token, of_class = weights(9, 37, device)
    every = dict(scale=0.5, softcap=3.0, label_smoothing=0.1, z_loss=1e-2)
    yield Sample((logits, target, token, of_class, torch.tensor(5.0, device=device)), every, name="everything")
    yield Sample(case(6, 130, device, torch.bfloat16), name="bf16")
    yield Sample((logits, target, token, of_class), dict(every, reduction="sum"), name="sum")
    logits, target = case(10, 40, device, torch.float16, ignored=0.0)
    target[::3] = 3
    sliced = logits.view(2, 5, 40)[:, :-1], target.view(2, 5)[:, 1:].int()
    yield Sample(sliced, dict(ignore_index=3, reduction="none"), name="half_none")
    yield Sample(case(4, 20, device, ignored=1.1), name="all_ignored")
    yield Sample(case(0, 20, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"cross_entropy": _samples}
NAIVE = {"cross_entropy": naive}
