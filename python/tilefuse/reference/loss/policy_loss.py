"""Reference of policy_loss: each token's terms, their derivatives, and the sums over sequences."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class _Tokens(NamedTuple):
    """What a loss and its gradient are made of; flat [T], neutral where masked."""

    keep: Tensor
    weight: Tensor  # 0 where masked
    sequence: Tensor
    sequences: int
    size: Tensor  # [sequences] tokens kept
    loss: Tensor  # unweighted
    dratio: Tensor  # derivative of the loss in the logarithm of the ratio
    dlogp: Tensor  # the rest of its derivative in logp
    inside: Tensor  # whether the log-ratio is within its limit
    stats: tuple[Tensor, ...]  # clipped low, high and dual, k1, k3, ratio


def _sums(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Sum per sequence in float64, in the order of tokens."""
    total = torch.zeros(sequences, dtype=torch.float64, device=x.device)
    return total.index_put((sequence,), x.double(), accumulate=True)


def _k3(e: Tensor) -> Tensor:
    """exp(e) - e - 1, by its series where that cancels."""
    series = torch.ones_like(e)
    for n in range(20, 2, -1):
        series = 1 + series * e / n
    return torch.where(e.abs() < 1, e * e / 2 * series, torch.exp(e) - 1 - e)


def _clamped(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    if limit == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    return x.clamp(-limit, limit), ~(x.abs() > limit)


def _nonzero(factor: Tensor, x: Tensor) -> Tensor:
    """factor * x, where a factor of 0 gives 0 even times inf."""
    return torch.where(factor == 0, 0, factor * x)


def _places(logp: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Sequence of each token, whether it is in one, and how many there are."""
    token = torch.arange(logp.numel(), device=logp.device)
    everywhere = torch.ones_like(token, dtype=torch.bool)
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
        inside = (sequence >= 0) & (sequence < sequences)
        return torch.where(inside, sequence, 0), inside, sequences
    if logp.dim() == 2:
        return token // max(1, logp.shape[1]), everywhere, logp.shape[0]
    return torch.zeros_like(token), everywhere, 1


def _tokens(
    logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, kind, level, clip_low, clip_high, dual_clip,
    kl, kl_beta, kl_weighted, log_ratio_limit,
) -> _Tokens:  # fmt: skip
    sequence, keep, sequences = _places(logp, cu_seqlens)
    if mask is not None:
        keep = keep & mask.flatten()
    flat = [None if x is None else torch.where(keep, x.flatten(), 0) for x in (logp, old_logp, ref_logp, token_weight)]
    x, old, ref, weight = flat
    assert x is not None
    weight = keep.to(x.dtype) if weight is None else weight
    per_sequence = advantages.dim() == 2 and advantages.shape[1] == 1
    if per_sequence and sequences == 0:
        a = torch.zeros_like(x)
    else:
        a = torch.where(keep, advantages.flatten()[sequence] if per_sequence else advantages.flatten(), 0)
    size = _sums(keep, sequence, max(1, sequences))

    log_ratio = torch.zeros_like(x) if old is None else x - old
    token_log, token_inside = _clamped(log_ratio, log_ratio_limit)
    token_ratio = torch.exp(token_log)
    ratio, inside = token_ratio, token_inside
    if level == "sequence":
        mean = (_sums(log_ratio, sequence, max(1, sequences)) / size.clamp(min=1)).to(x.dtype)
        mean, mean_inside = _clamped(mean, log_ratio_limit)
        ratio, inside = torch.exp(mean)[sequence], mean_inside[sequence]

    low, high, dual = 1 - clip_low, 1 + clip_high, dual_clip or math.inf
    too_high = ratio > high
    dratio = dlogp = torch.zeros_like(x)
    clipped_low = clipped_dual = torch.zeros_like(keep)
    clipped_high = clipped_low
    if kind == "clip":
        clipped_low, clipped_high = (ratio < low) & (a < 0), too_high & (a > 0)
        clipped_dual = (ratio > dual) & (a < 0)
        used = torch.where(clipped_low, low, torch.where(clipped_high, high, torch.where(clipped_dual, dual, ratio)))
        loss = _nonzero(-a, used)
        dratio = torch.where(clipped_low | clipped_high | clipped_dual, 0, _nonzero(-a, ratio))
    elif kind == "cispo":
        clipped_high = too_high
        dlogp = _nonzero(-a, torch.where(too_high, high, ratio))
        loss = _nonzero(dlogp, x)
    else:
        dlogp, loss = -a, _nonzero(-a, x)

    k1 = k3 = torch.zeros_like(x)
    if ref is not None:
        e, e_inside = _clamped(ref - x, log_ratio_limit)
        k1, k3 = -e, _k3(e)
        if kl_beta != 0:
            value = {"k1": k1, "k2": e * e / 2}.get(kl, k3)
            slope = {"k1": torch.ones_like(e), "k3": -(k3 + e)}.get(kl, -e) * e_inside
            if kl_weighted:
                slope = token_ratio * (slope + value * token_inside)
                value = token_ratio * value
            loss, dlogp = loss + kl_beta * value, dlogp + kl_beta * slope
    counted = tuple(s.to(x.dtype) for s in (clipped_low, clipped_high, clipped_dual))
    stats = (*counted, k1, k3, ratio)
    return _Tokens(keep, weight, sequence, sequences, size, loss, dratio, dlogp, inside, stats)


def policy_loss_fwd(
    logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, num_items, kind, level, clip_low, clip_high,
    dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit, reduction,
):  # fmt: skip
    t = _tokens(
        logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, kind, level, clip_low, clip_high,
        dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit,
    )  # fmt: skip
    each = _nonzero(t.weight, t.loss)
    count = t.keep.sum()
    stats = torch.zeros(8, dtype=logp.dtype, device=logp.device)
    if each.numel():
        means = [torch.where(t.keep, s, 0).double().sum() / count.clamp(min=1) for s in t.stats]
        largest = torch.where(t.keep, t.stats[-1], 0).max()
        stats = torch.stack([count.double(), *means, largest.double()]).to(logp.dtype)
    if reduction == "none":
        return each.view(logp.shape), stats
    if reduction == "sequence":
        per_sequence = _sums(each, t.sequence, max(1, t.sequences)) / t.size.clamp(min=1)
        total, divisor = per_sequence.sum(), torch.full_like(count, t.sequences)
    else:
        total, divisor = each.double().sum(), count if reduction == "token" else torch.ones_like(count)
    divisor = divisor.double() if num_items is None else num_items.double()
    return torch.where(divisor == 0, 0, total / divisor).to(logp.dtype), stats


def policy_loss_bwd(
    dloss, stats, logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, num_items, kind, level,
    clip_low, clip_high, dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit, reduction,
):  # fmt: skip
    t = _tokens(
        logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, kind, level, clip_low, clip_high,
        dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit,
    )  # fmt: skip
    upstream = dloss.flatten().expand(t.loss.shape)
    if reduction in ("token", "sequence"):
        if num_items is not None:
            divisor = num_items
        else:
            divisor = stats[0] if reduction == "token" else torch.full_like(stats[0], t.sequences)
        upstream = torch.where(divisor == 0, 0, upstream / divisor)
        if reduction == "sequence":
            upstream = upstream / t.size.clamp(min=1).to(logp.dtype)[t.sequence]
    coefficient = _nonzero(t.weight, upstream)
    through_ratio = _nonzero(coefficient, torch.where(t.inside, t.dratio, 0))
    if level == "sequence":
        per_sequence = _sums(through_ratio, t.sequence, max(1, t.sequences)) / t.size.clamp(min=1)
        through_ratio = torch.where(t.keep, per_sequence.to(logp.dtype)[t.sequence], 0)
    return (through_ratio + _nonzero(coefficient, t.dlogp)).view(logp.shape)
