"""Reference of the router's losses; every step is differentiable, so that autograd can take the forward passes."""

import torch
from torch import Tensor

from .moe_route import route_scores


def _rows(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits in float32 with excluded rows set to 0, so that nothing in them matters, and 1 or 0 per row."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    if valid is None:
        return x, x.new_ones(x.shape[0])
    return torch.where(valid[:, None], x, torch.zeros_like(x)), valid.to(x.dtype)


def _sum_of_scores(s: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum, 1 in place of 0, and whether it was 0: none of such a row's scores counts."""
    total = s.sum(-1, keepdim=True)
    empty = total == 0
    return torch.where(empty, 1, total), empty


def _shares(
    logits: Tensor, ids: Tensor, use: Tensor, kind: str, n_devices: int, sequences: int, scale: float
) -> Tensor:
    """What one score of each expert adds to the loss, ``[sequences, E]``: its ``f``, over the tokens and sequences."""
    tokens, experts = logits.shape
    choices = ids[:, :1] if kind == "gshard" else ids
    known = (choices >= 0) & (choices < experts)
    # one spare column takes the dropped ids
    chosen = torch.where(known, choices, experts).long()
    hits = use.new_zeros((tokens, experts + 1)).scatter_add(1, chosen, use.new_ones(chosen.shape))[:, :experts]
    count = use.view(sequences, -1).sum(1)  # [sequences]
    size = count.clamp(min=1)[:, None]
    even = experts / choices.shape[1]
    if kind == "communication":
        hits = hits.view(tokens, n_devices, -1).amax(-1).clamp(max=1)
        even = n_devices / min(ids.shape[1], n_devices)
    f = (hits * use[:, None]).view(sequences, tokens // sequences, -1).sum(1) * even / size
    if kind == "device":
        f = f.view(sequences, n_devices, -1).mean(-1)
    f = f.repeat_interleave(experts // f.shape[1], 1)
    return f * scale / (size * (count > 0).sum().clamp(min=1))


def moe_balance_loss_fwd(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    kind: str,
    score: str,
    n_devices: int,
    sequences: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    x, use = _rows(logits, valid)
    shares = _shares(logits, ids, use, kind, n_devices, sequences, scale)
    s = route_scores(x, score)
    if kind == "sequence":
        total, empty = _sum_of_scores(s)
        s = torch.where(empty, 0, s / total)
    p = (s * use[:, None]).view(sequences, x.shape[0] // sequences, -1).sum(1)
    return (shares * p).sum(), shares


def moe_balance_loss_bwd(
    dout: Tensor, logits: Tensor, shares: Tensor, valid: Tensor | None, score: str, normalized: bool
) -> Tensor:
    x, use = _rows(logits, valid)
    s = route_scores(x, score)
    d = (dout * shares).repeat_interleave(x.shape[0] // shares.shape[0], 0)
    if normalized:
        total, empty = _sum_of_scores(s)
        d = torch.where(empty, 0, (d - (d * s).sum(-1, keepdim=True) / total) / total)
    if score == "softmax":
        d = s * (d - (d * s).sum(-1, keepdim=True))
    elif score == "sigmoid":
        d = d * s * (1 - s)
    elif score == "sqrtsoftplus":
        d = torch.where(s == 0, 0, d * torch.sigmoid(x) / (2 * s))
    return torch.where(use[:, None] == 0, 0, d).to(logits.dtype)


def moe_z_loss_fwd(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    x, use = _rows(logits, valid)
    lse = torch.where(use == 0, 0, x.logsumexp(-1))
    return lse.square().sum() / use.sum().clamp(min=1), lse


def moe_z_loss_bwd(dout: Tensor, logits: Tensor, lse: Tensor, valid: Tensor | None) -> Tensor:
    x, use = _rows(logits, valid)
    d = (2 * dout / use.sum().clamp(min=1)) * lse[:, None] * torch.exp(x - lse[:, None])
    return torch.where(use[:, None] == 0, 0, d).to(logits.dtype)
