"""Inputs of ``distillation``: every beta, a larger vocabulary of the teacher, weights, leading dims."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample

IGNORED = -100


def case(
    tokens: int,
    vocabulary: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    more: int = 0,
    apart: float = 1.0,
    ignored: float = 0.2,
    seed: int = 0,
):
    """(logits, teacher_logits, target): the teacher has ``more`` ids, and its logits about ``apart`` away."""
    generator = torch.Generator().manual_seed(seed + tokens + vocabulary + more)
    logits = 2 * torch.randn(tokens, vocabulary, generator=generator)
    logits = logits.to(dtype)
    teacher = logits.float() + apart * torch.randn(tokens, vocabulary, generator=generator)
    teacher = torch.cat((teacher, 2 * torch.randn(tokens, max(more, 0), generator=generator)), 1)
    teacher = teacher[:, : vocabulary + more]
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return logits.to(device), teacher.to(device, dtype), target.to(device)


def divergences(logits, teacher_logits, beta, temperature):
    """Of each row, by the definition."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids = min(logits.shape[-1], teacher_logits.shape[-1])
    log_s, log_t = (z[..., :ids].to(wide).div(temperature).log_softmax(-1) for z in (logits, teacher_logits.detach()))

    def kl(log_p, log_q):
        p = log_p.exp()
        return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)

    if beta == 0:
        return kl(log_t, log_s)
    if beta == 1:
        return kl(log_s, log_t)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def reduce(losses, keep, token_weight, num_items, reduction):
    losses = losses if token_weight is None else losses * token_weight.to(losses.dtype)
    losses = torch.where(keep, losses, 0.0)
    if reduction != "mean":
        return losses if reduction == "none" else losses.sum()
    divisor = keep.sum() if num_items is None else num_items
    return losses.sum() / divisor if divisor != 0 else losses.sum() * 0


def naive(
    logits,
    teacher_logits,
    target=None,
    token_weight=None,
    num_items=None,
    *,
    beta=0.5,
    temperature=1.0,
    ignore_index=IGNORED,
    reduction="mean",
):
    keep = logits.new_ones(logits.shape[:-1], dtype=torch.bool) if target is None else target != ignore_index
    logits, teacher_logits = (torch.where(keep[..., None], z, 0) for z in (logits, teacher_logits))
    losses = divergences(logits, teacher_logits, beta, temperature)
    return reduce(losses, keep, token_weight, num_items, reduction)


def weights(tokens: int, device: torch.device | str = "cpu"):
    """Some are 0."""
    token = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    token[::5] = 0.0
    return token.to(device)


def _samples(device: torch.device) -> Iterator[Sample]:
    logits, teacher, target = case(9, 37, device, more=5)
    items = torch.tensor(5.0, device=device)
    yield Sample((logits, teacher, target, weights(9, device), items), dict(temperature=1.5), name="everything")
    yield Sample(case(6, 130, device, torch.bfloat16)[:2], dict(beta=0.0), name="bf16_teacher")
    yield Sample(case(6, 130, device)[:2], dict(beta=1.0, reduction="sum"), name="student")
    logits, teacher, target = case(6, 40, device, torch.float16, more=-8)
    shaped = (logits.view(2, 3, 40), teacher.float().view(2, 3, 32), target.view(2, 3).int())
    yield Sample(shaped, dict(beta=0.1, reduction="none"), name="half_none")
    logits, teacher, target = case(3, 4100, device)
    yield Sample((logits.t().contiguous().t(), teacher, target), name="two_blocks_strided")
    yield Sample(case(4, 20, device, ignored=1.1), name="all_ignored")
    yield Sample(case(0, 20, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"distillation": _samples}
NAIVE = {"distillation": naive}
