"""Reference of moe_route: scores, selection with defined ties and NaN order, weights, and their gradient."""

import torch
from torch import Tensor

EPS = 1e-20


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def route_scores(x: Tensor, score: str) -> Tensor:
    """Scores of every expert, NaN wherever plain arithmetic gives NaN (a softmax row with one NaN is all NaN)."""
    if score == "softmax":
        return torch.softmax(x, dim=-1)
    if score == "sigmoid":
        return torch.sigmoid(x)
    if score == "sqrtsoftplus":
        y = _softplus(x)
        # where it underflows, the root's slope 1 / 0 would meet a slope of 0
        return torch.where(y == 0, y, torch.where(y == 0, 1, y).sqrt())
    return x


def _selection_scores(x: Tensor, score: str) -> Tensor:
    """Scores with NaN logits set aside before the row reduction, so that the others stay comparable."""
    if score != "softmax":
        return route_scores(x, score)
    nan = x.isnan()
    top = x.masked_fill(nan, -torch.inf).amax(-1, keepdim=True)
    # the largest logit counts 1 even when it is infinite, where inf - inf would be NaN
    e = torch.where(x == top, torch.ones_like(x), torch.exp(x - top)).masked_fill(nan, 0)
    return (e / e.sum(-1, keepdim=True)).masked_fill(nan, torch.nan)


def _order(value: Tensor, rank: Tensor) -> Tensor:
    """Indices by rank ascending, then value descending, then index ascending."""
    order = value.sort(dim=-1, descending=True, stable=True).indices
    by_rank = rank.gather(-1, order).sort(dim=-1, stable=True).indices
    return order.gather(-1, by_rank)


def route_select(
    x: Tensor, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int, group_score: str
) -> Tensor:
    """Ids of the chosen experts, ``[T, top_k]`` int64."""
    tokens, experts = x.shape
    biased = _selection_scores(x, score)
    if bias is not None:
        biased = biased + bias.to(x.dtype)
    # without a bias, logits order like softmax scores and do not underflow to ties
    key = x if score == "softmax" and bias is None else biased
    nan = key.isnan()
    key = key.masked_fill(nan, -torch.inf)
    rank = nan.to(torch.int8)
    if n_group > 1:
        grouped = (key if group_score == "max" else biased.masked_fill(biased.isnan(), -torch.inf)).view(
            tokens, n_group, experts // n_group
        )
        if group_score == "max" or experts == n_group:
            of_group = grouped.amax(-1)
        else:
            of_group = grouped.topk(2, dim=-1).values.sum(-1)
            of_group = of_group.masked_fill(of_group.isnan(), -torch.inf)
        best = _order(of_group, torch.zeros_like(of_group, dtype=torch.int8))[:, :topk_group]
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        rank = rank.masked_fill(~kept.repeat_interleave(experts // n_group, dim=1), 2)
    return _order(key, rank)[:, :top_k]


def _computed(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def moe_route_fwd(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    group_score: str,
    scale: float,
    nan_policy: str,
) -> tuple[Tensor, Tensor]:
    x = _computed(logits)
    ids = route_select(x, bias, top_k, score, n_group, topk_group, group_score)
    weights = route_scores(x, score).gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    weights = weights * scale
    if nan_policy == "zero":
        weights = weights.masked_fill(weights.isnan().any(-1, keepdim=True), 0)
    return weights, ids.int()


def moe_route_bwd(
    dweights: Tensor, logits: Tensor, ids: Tensor, score: str, renormalize: bool, scale: float, nan_policy: str
) -> Tensor:
    x = _computed(logits)
    ids = ids.long()
    s = route_scores(x, score)
    chosen = s.gather(1, ids)
    total = chosen.sum(-1, keepdim=True) + EPS
    d_chosen = dweights.to(x.dtype) * scale
    dot = (d_chosen * chosen).sum(-1, keepdim=True)
    if renormalize:
        d_chosen = (d_chosen - dot / total) / total
    # elementwise scores leave the experts that were not chosen at exactly 0, whatever their logits hold
    dx = torch.zeros_like(s)
    if score == "softmax":
        # sum_i s_i ds_i; renormalised weights do not move with a common factor, up to eps
        inner = dot * EPS / (total * total) if renormalize else dot
        dx = s * (dx.scatter_(1, ids, d_chosen) - inner)
    elif score == "sigmoid":
        dx.scatter_(1, ids, d_chosen * chosen * (1 - chosen))
    elif score == "sqrtsoftplus":
        slope = torch.sigmoid(x.gather(1, ids)) / (2 * chosen)
        dx.scatter_(1, ids, d_chosen * slope.masked_fill(chosen == 0, 0))
    else:
        dx.scatter_(1, ids, d_chosen)
    if nan_policy == "zero":
        weights = chosen / total if renormalize else chosen
        dx = dx.masked_fill((weights * scale).isnan().any(-1, keepdim=True), 0)
    return dx.to(logits.dtype)
