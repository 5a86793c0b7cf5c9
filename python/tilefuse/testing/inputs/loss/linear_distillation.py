"""Inputs of ``linear_distillation``: a teacher of another size and dtype, biases, ids that pad either head."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample
from .distillation import IGNORED, divergences, reduce, weights
from .linear_logprobs import case as head
from .linear_logprobs import logits


def case(
    tokens: int,
    vocabulary: int,
    hidden: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    more: int = 0,
    ignored: float = 0.2,
):
    """(x, weight, teacher_x, teacher_weight, target, bias, teacher_bias); the teacher has ``more`` ids and is wider."""
    x, weight, target, bias = head(tokens, vocabulary, hidden, device, dtype, ignored)
    teacher_x, teacher_weight, _, teacher_bias = head(tokens, vocabulary + more, hidden + 3, device, dtype)
    return x, weight, teacher_x, teacher_weight, target, bias, teacher_bias


def naive(
    x,
    weight,
    teacher_x,
    teacher_weight,
    target=None,
    bias=None,
    teacher_bias=None,
    token_weight=None,
    num_items=None,
    *,
    beta=0.5,
    temperature=1.0,
    ignore_index=IGNORED,
    reduction="mean",
):
    """The formula on all logits."""
    keep = x.new_ones(x.shape[:-1], dtype=torch.bool) if target is None else target != ignore_index
    x, teacher_x = (torch.where(keep[..., None], states, 0) for states in (x, teacher_x))
    wide = torch.float64 if x.dtype == torch.float64 else teacher_x.dtype
    z = logits(x, weight, bias)
    teacher = logits(teacher_x.detach().to(wide), teacher_weight.detach().to(wide), teacher_bias)
    losses = divergences(z, teacher, beta, temperature)
    return reduce(losses, keep, token_weight, num_items, reduction)


def _samples(device: torch.device) -> Iterator[Sample]:
    token, items = weights(9, device), torch.tensor(5.0, device=device)
    everything = (*case(9, 37, 12, device, more=5), token, items)
    yield Sample(everything, dict(temperature=1.5), name="everything")
    yield Sample(case(6, 130, 16, device, torch.bfloat16, more=-7)[:4], dict(beta=0.0), name="bf16_smaller_teacher")
    x, weight, teacher_x, teacher_weight, target, bias, _ = case(6, 40, 24, device, torch.float16)
    shaped = (x.view(2, 3, 24), weight, teacher_x.float().view(2, 3, 27), teacher_weight.float())
    yield Sample(
        (*shaped, target.view(2, 3).int(), bias.half()), dict(beta=0.1, reduction="none"), name="half_float_teacher"
    )
    x, weight, *rest = case(5, 70, 9, device)
    strided = (x.t().contiguous().t(), weight.t().contiguous().t(), *rest)
    yield Sample(strided, dict(beta=1.0, reduction="sum"), name="strided")
    yield Sample(case(4, 20, 8, device, ignored=1.1), name="all_ignored")
    yield Sample(case(0, 20, 8, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"linear_distillation": _samples}
NAIVE = {"linear_distillation": naive}
