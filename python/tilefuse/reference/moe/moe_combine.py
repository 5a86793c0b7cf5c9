"""Reference of moe_combine: the weighted sum of each token's expert rows."""

import torch
from torch import Tensor


def _rows(y: Tensor, inverse: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Row of each slot ``[T, k]`` (0 where dropped) and whether it is kept."""
    at = inverse.long().view(-1, top_k)
    kept = (at >= 0) & (at < y.shape[0])
    return at.masked_fill(~kept, 0), kept


def moe_combine_fwd(y: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    compute = y.dtype if y.dtype == torch.float64 else torch.float32
    at, kept = _rows(y, inverse, top_k)
    out = torch.zeros(at.shape[0], y.shape[1], dtype=compute, device=y.device)
    for j in range(top_k):
        if y.shape[0] == 0:
            break
        term = y[at[:, j]].to(compute)
        if weights is not None:
            term = term * weights[:, j, None].to(compute)
        out = out + term.masked_fill(~kept[:, j, None], 0)
    return out.to(y.dtype)


def moe_combine_bwd(dout: Tensor, y: Tensor, inverse: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    compute = y.dtype if y.dtype == torch.float64 else torch.float32
    at, kept = _rows(y, inverse, top_k)
    dy = torch.zeros(y.shape, dtype=compute, device=y.device)
    dweights = torch.zeros(at.shape, dtype=compute, device=y.device)
    if y.shape[0]:
        g = dout.to(compute)
        for j in range(top_k):
            dot = (g * y[at[:, j]].to(compute)).sum(-1)
            dweights[:, j] = dot.masked_fill(~kept[:, j], 0)
            dy[at[kept[:, j], j]] = (g * weights[:, j, None].to(compute))[kept[:, j]]
    return dy.to(y.dtype), dweights.to(weights.dtype)
