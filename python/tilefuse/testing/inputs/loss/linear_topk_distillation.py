"""Inputs of ``linear_topk_distillation``: unsorted ids, padding with NaN, ignored tokens, each tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .linear_logprobs import IGNORED, logits
from .linear_logprobs import case as head_case


def case(
    tokens: int,
    vocabulary: int,
    hidden: int,
    listed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    apart: float = 0.5,
    ignored: float = 0.2,
    padded: float = 0.2,
    temperature: float = 1.0,
):
    """(x, weight, teacher_logp, teacher_ids, target, bias).

    The teacher's logits are the student's and noise of the size ``apart``. Its ids come in no order, a part of them -1.
    """
    x, weight, target, bias = head_case(tokens, vocabulary, hidden, device, dtype, ignored)
    generator = torch.Generator().manual_seed(tokens + vocabulary + listed)
    z = logits(x.double(), weight.double(), bias.double()).cpu()
    z = z + apart * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    logp, ids = (z / temperature).log_softmax(-1).topk(listed, -1)
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    logp, ids = logp.gather(-1, order).float(), ids.gather(-1, order)
    hidden_ids = torch.rand(ids.shape, generator=generator) < padded
    logp, ids = logp.masked_fill(hidden_ids, torch.nan), ids.masked_fill(hidden_ids, -1)
    return x, weight, logp.to(device), ids.to(device), target, bias


def _term(log_s, log_t, beta):
    s, t = log_s.exp(), log_t.exp()
    if beta == 0:
        return t * (log_t - log_s)
    if beta == 1:
        return s * (log_s - log_t)
    log_m = ((1 - beta) * s + beta * t).log()
    return beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)


def naive(
    x,
    weight,
    teacher_logp,
    teacher_ids,
    target=None,
    bias=None,
    token_weight=None,
    num_items=None,
    *,
    beta=0.0,
    tail="bucket",
    temperature=1.0,
    ignore_index=IGNORED,
    reduction="mean",
):
    """The formula on all logits."""
    kept = torch.ones_like(x[..., 0], dtype=torch.bool) if target is None else target != ignore_index
    z = logits(torch.where(kept[..., None], x, 0), weight, bias, temperature=temperature)
    there = (teacher_ids >= 0) & kept[..., None]
    at = torch.where(there, teacher_ids, 0).long()
    log_p = z.log_softmax(-1)
    log_s, log_t = log_p.gather(-1, at), torch.where(there, teacher_logp.to(z.dtype), 0)
    if tail == "renormalize":
        # a row without ids is left alone
        out = ~there & there.any(-1, keepdim=True)
        log_s = log_s - log_s.masked_fill(out, -torch.inf).logsumexp(-1, keepdim=True)
        log_t = log_t - log_t.masked_fill(out, -torch.inf).logsumexp(-1, keepdim=True)
    losses = torch.where(there, _term(log_s, log_t, beta), 0).sum(-1)
    if tail == "bucket":
        known = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool, device=z.device)
        known = known.scatter(-1, torch.where(there, teacher_ids, z.shape[-1]).long(), True)[..., :-1]
        s = torch.where(known, 0, log_p.exp()).sum(-1)
        t = 1 - torch.where(there, log_t.exp(), 0).sum(-1)
        used = (s > 0) & (t > 0) & ~known.all(-1)
        losses = losses + torch.where(
            used, _term(torch.where(used, s, 1).log(), torch.where(used, t, 1).log(), beta), 0
        )
    losses = losses if token_weight is None else losses * token_weight.to(z.dtype)
    losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    divisor = kept.sum() if num_items is None else torch.as_tensor(num_items, device=z.device)
    return losses.sum() / divisor if divisor != 0 else losses.sum() * 0


def _samples(device: torch.device) -> Iterator[Sample]:
    x, weight, logp, ids, target, bias = case(9, 37, 12, 5, device, temperature=1.5)
    token_weight = torch.arange(9, device=device) / 4
    everything: tuple[Any, ...] = (x, weight, logp, ids, target, bias, token_weight, torch.tensor(5.0, device=device))
    yield Sample(everything, dict(beta=0.3, temperature=1.5), name="everything")
    x, weight, logp, ids, *_ = case(6, 130, 16, 9, device, torch.bfloat16)
    yield Sample((x, weight, logp.nan_to_num().bfloat16(), ids.int()), name="bf16")
    x, weight, logp, ids, target, bias = case(6, 40, 24, 7, device, torch.float16)
    shaped = (x.view(2, 3, 24), weight, logp.view(2, 3, 7), ids.view(2, 3, 7), target.view(2, 3).int(), bias.half())
    yield Sample(shaped, dict(beta=1.0, tail="renormalize", reduction="none"), name="half_renormalize_none")
    x, weight, logp, ids, target, _ = case(5, 20, 8, 20, device, padded=0.0)
    yield Sample((x, weight, logp, ids, target), dict(reduction="sum"), name="all_listed")
    yield Sample((x, weight, logp, ids, target), dict(beta=1.0, tail="none"), name="truncated")
    yield Sample(case(4, 20, 8, 3, device, ignored=1.1), name="all_ignored")
    yield Sample(case(0, 20, 8, 3, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"linear_topk_distillation": _samples}
NAIVE = {"linear_topk_distillation": naive}
