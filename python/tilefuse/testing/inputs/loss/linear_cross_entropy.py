"""Inputs of ``linear_cross_entropy``: every weight and option, leading dims, gradients made in the forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample
from .linear_logprobs import IGNORED, case, logits, statistics


def weights(tokens: int, vocabulary: int, device: torch.device | str = "cpu", seed: int = 0):
    """(token_weight, class_weight), some of both 0."""
    generator = torch.Generator().manual_seed(seed + tokens + vocabulary)
    token = torch.rand(tokens, generator=generator)
    of_class = torch.rand(vocabulary, generator=generator)
    token[::5], of_class[::7] = 0.0, 0.0
    return token.to(device), of_class.to(device)


def naive(
    x,
    weight,
    target,
    bias=None,
    token_weight=None,
    class_weight=None,
    num_items=None,
    *,
    scale=1.0,
    softcap=0.0,
    ignore_index=IGNORED,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    recompute=True,
):
    """The formula on all logits."""
    x = torch.where((target != ignore_index)[..., None], x, 0)
    z = logits(x, weight, bias, scale=scale, softcap=softcap)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
    return losses_of(z, target, token_weight, class_weight, num_items, ignore_index=ignore_index, **options)


def losses_of(
    z,
    target,
    token_weight=None,
    class_weight=None,
    num_items=None,
    *,
    ignore_index=IGNORED,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
):
    """The formula on transformed logits."""
    kept = target != ignore_index
    logp, lse, *_ = statistics(z, target, ignore_index)
    c = z.new_ones(z.shape[-1]) if class_weight is None else class_weight.to(z.dtype)
    of_target = torch.where(kept, c[torch.where(kept, target, 0).long()], 0.0)
    losses = (1 - label_smoothing) * of_target * -logp + z_loss * lse.square()
    if label_smoothing > 0:
        losses = losses + label_smoothing / z.shape[-1] * (c * -z.log_softmax(-1)).sum(-1)
    losses = losses if token_weight is None else losses * token_weight.to(z.dtype)
    losses = torch.where(kept, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    divisor = of_target.sum() if num_items is None else torch.as_tensor(num_items, dtype=z.dtype, device=z.device)
    return losses.sum() / divisor if divisor != 0 else losses.sum() * 0


def _samples(device: torch.device) -> Iterator[Sample]:
    x, weight, target, bias = case(9, 37, 12, device)
    token, of_class = weights(9, 37, device)
    every = dict(scale=0.5, softcap=3.0, label_smoothing=0.1, z_loss=1e-2)
    yield Sample((x, weight, target, bias, token, of_class, torch.tensor(5.0, device=device)), every, name="everything")
    yield Sample(case(6, 130, 16, device, torch.bfloat16)[:3], name="bf16")
    yield Sample(
        (x, weight, target, bias, token, of_class), dict(every, reduction="sum", recompute=False), name="in_the_forward"
    )
    x, weight, target, bias = case(6, 40, 24, device, torch.float16, ignored=0.0)
    target[::3] = 3
    shaped = (x.view(2, 3, 24), weight, target.view(2, 3).int(), bias.half())
    yield Sample(shaped, dict(ignore_index=3, reduction="none"), name="half_none")
    yield Sample(case(4, 20, 8, device, ignored=1.1), dict(recompute=False), name="all_ignored")
    yield Sample(case(0, 20, 8, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"linear_cross_entropy": _samples}
NAIVE = {"linear_cross_entropy": naive}
