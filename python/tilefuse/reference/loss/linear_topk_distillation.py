"""Reference of linear_topk_distillation: the sums of what is not listed, and k + 1 categories in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_logprobs import at_ids, blocks_of, capped_logits, head_gradients, kept_rows


def _wrong(teacher_ids: Tensor, kept: Tensor, vocabulary: int) -> Tensor:
    """Tokens with ids out of range or, as ids are sorted, next to themselves."""
    outside = ((teacher_ids < -1) | (teacher_ids >= vocabulary)) & kept[:, None]
    again = (teacher_ids[:, 1:] == teacher_ids[:, :-1]) & (teacher_ids[:, 1:] >= 0) & kept[:, None]
    if not teacher_ids.is_cuda:
        name = "tilefuse.linear_topk_distillation: teacher_ids must be"
        if outside.any():
            raise ValueError(f"{name} in [0, {vocabulary}) or -1, got {teacher_ids[outside][0].item()}")
        if again.any():
            raise ValueError(f"{name} distinct in each row, got {teacher_ids[:, 1:][again][0].item()} twice")
    return outside.any(1) | again.any(1)


def _excess(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
    """b - a - a log(b / a) >= 0, what a category adds to KL(a || b) of sides with the same sum."""
    return torch.where(a == 0, b, b - a - a * (log_b - log_a)).clamp(min=0)


def _or_zero(x: Tensor) -> Tensor:
    """x, and 0 in place of -inf."""
    return torch.where(x == -torch.inf, 0, x)


def _product(factor: Tensor, x: Tensor) -> Tensor:
    return torch.where(factor == 0, 0, factor * x)


def divergence(
    logits: Tensor, peak: Tensor, total: Tensor, teacher_logp: Tensor, there: Tensor, others: Tensor, beta, tail
) -> tuple[Tensor, Tensor]:
    """Losses [T], and their gradients in the logits [T, k] and in ``peak + log(total)``, that of all others.

    ``there``: which of the k are ids and not padding; ``others``: whether a token has ids that are not listed.
    """
    z = torch.where(there, logits.double(), -torch.inf)
    log_t = torch.where(there, teacher_logp.double(), -torch.inf)
    rest = peak.double() + total.double().log()
    log_sum_t = log_t.logsumexp(1)
    if tail == "renormalize":
        log_s, log_t = z - _or_zero(z.logsumexp(1))[:, None], log_t - _or_zero(log_sum_t)[:, None]
        log_s_tail = log_t_tail = torch.full_like(rest, -torch.inf)
    else:
        lse = torch.cat((z, rest[:, None]), 1).logsumexp(1)
        log_s, log_s_tail = z - lse[:, None], rest - lse
        log_t_tail = torch.where(others, 1 - log_sum_t.exp(), 0).clamp(min=0).log()
    used = (log_s_tail > -torch.inf) & (log_t_tail > -torch.inf) & (tail == "bucket")
    # of equal sums on both sides
    whole = used | ~others if tail == "bucket" else torch.full_like(used, tail == "renormalize")
    counts = torch.cat((there, used[:, None]), 1)
    log_s, log_t = torch.cat((log_s, log_s_tail[:, None]), 1), torch.cat((log_t, log_t_tail[:, None]), 1)
    s, t = log_s.exp(), log_t.exp()
    s_used, t_used = torch.where(counts, s, 0), torch.where(counts, t, 0)
    if beta == 0:
        terms, plain = _excess(t, log_t, s, log_s), t_used - s_used
        slope = -t_used
    elif beta == 1:
        terms, plain = _excess(s, log_s, t, log_t), s_used - t_used
        slope = _product(s_used, log_s - log_t + 1)
    else:
        m = (1 - beta) * s + beta * t
        log_m = m.log()
        terms = beta * _excess(t, log_t, m, log_m) + (1 - beta) * _excess(s, log_s, m, log_m)
        plain = torch.zeros_like(terms)
        slope = (1 - beta) * _product(s_used, log_s - log_m)
    losses = torch.where(counts, terms, 0).sum(1) + torch.where(whole, 0, plain.sum(1))
    gradient = slope - s * slope.sum(1, keepdim=True)
    return losses, gradient


def linear_topk_distillation_fwd(
    x, weight, target, bias, teacher_logp, teacher_ids, beta, tail, temperature, ignore_index
) -> tuple[Tensor, Tensor, Tensor]:
    rows, kept = kept_rows(x, target, ignore_index)
    wrong = _wrong(teacher_ids, kept, weight.shape[0])
    logits = rows.new_full(teacher_ids.shape, -torch.inf)
    peak, total = rows.new_full((rows.shape[0],), -torch.inf), rows.new_zeros(rows.shape[0])
    for start, w, b in blocks_of(weight, bias):
        z = capped_logits(rows, w, b, 1.0, 0.0) / temperature
        inside, at = at_ids(teacher_ids, start, z.shape[1])
        logits = torch.where(inside, z.gather(1, at), logits)
        # what is listed elsewhere goes to a column of its own
        z = torch.cat((z, z[:, :1]), 1).scatter(1, torch.where(inside, at, z.shape[1]), -torch.inf)[:, :-1]
        top = torch.maximum(peak, z.amax(1))
        # what was there was nothing, or -inf
        total = total * torch.where(peak == -torch.inf, 0, peak - top).exp() + (z - _or_zero(top)[:, None]).exp().sum(1)
        peak = top
    there = (teacher_ids >= 0) & kept[:, None]
    others = there.sum(1) < weight.shape[0]
    losses, gradient = divergence(logits, peak, total, teacher_logp, there, others, beta, tail)
    empty = total == 0
    norm = torch.stack((torch.where(empty, 0, peak), torch.where(empty, torch.inf, total.log())))
    losses, gradient = torch.where(wrong, torch.nan, losses), torch.where(wrong[:, None], torch.nan, gradient)
    losses, gradient = torch.where(kept, losses, 0), torch.where(kept[:, None], gradient, 0)
    return losses.to(rows.dtype), gradient.to(rows.dtype), torch.where(kept, norm, 0)


def linear_topk_distillation_bwd(
    x, weight, target, bias, teacher_ids, norm, coefficients, factor, temperature, ignore_index, *needs
) -> tuple[Tensor, Tensor, Tensor]:
    rows, kept = kept_rows(x, target, ignore_index)

    def gradients():
        for start, w, b in blocks_of(weight, bias):
            z = capped_logits(rows, w, b, 1.0, 0.0) / temperature
            share = ((z - norm[0][:, None]) - norm[1][:, None]).exp()
            inside, at = at_ids(teacher_ids, start, z.shape[1])
            dz = torch.cat((coefficients[:, -1:] * share, torch.zeros_like(z[:, :1])), 1)
            yield w, dz.scatter(1, torch.where(inside, at, z.shape[1]), coefficients[:, :-1])[:, :-1]

    return head_gradients(x, weight, bias, rows, kept, gradients(), factor, *needs)
