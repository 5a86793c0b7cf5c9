"""Dense softmax attention of a few rows against a few keys, forward and backward.

Every reference of this family tiles with it.

Shapes: ``q [B, m, Hq, D]``, ``k [B, n, Hkv, D]``, ``v [B, n, Hkv, Dv]``; query head ``h`` reads key/value head
``h // (Hq // Hkv)``. ``visible``, ``distance`` and ``bias`` broadcast to ``[B, Hq, m, n]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

INFINITE = float("inf")


def compute_dtype(q: Tensor) -> torch.dtype:
    """float64 inputs are computed in float64, everything else in float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, m, Hq, D] -> [B, Hkv, group, m, D]."""
    return x.to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, n, Hkv, D] -> [B, Hkv, 1, n, D]."""
    return x.to(dtype).permute(0, 2, 1, 3)[:, :, None]


def _ungrouped(x: Tensor) -> Tensor:
    """[B, Hkv, group, m, D] -> [B, m, Hq, D]."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _logits(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    distance: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Masked logits, tanh of the soft cap (if any) and the mask, all [B, Hkv, group, m, n]."""
    dtype, kv_heads, heads = compute_dtype(q), k.shape[2], q.shape[2]
    logits = _grouped(q, kv_heads, dtype) @ _heads(k, dtype).transpose(-1, -2) * scale
    tanh = None
    if softcap > 0:
        tanh = torch.tanh(logits / softcap)
        logits = tanh * softcap
    for by_distance in (None if slopes is None else -slopes.to(dtype)[:, None, None] * distance.to(dtype), bias):
        if by_distance is not None:
            by_distance = by_distance.to(dtype).expand(q.shape[0], heads, *logits.shape[-2:])
            logits = logits + by_distance.unflatten(1, (kv_heads, -1))
    mask = visible.expand(q.shape[0], heads, *logits.shape[-2:]).unflatten(1, (kv_heads, -1))
    return logits.masked_fill(~mask, -INFINITE), tanh, mask


def _seen(x: Tensor, mask: Tensor) -> Tensor:
    """Zeroes the rows of x [B, Hkv, 1, n, D] that no query of this tile sees: 0 * NaN is NaN."""
    return x.masked_fill(~mask.any(dim=3).any(dim=2)[:, :, None, :, None], 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    distance: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out [B, m, Hq, Dv] and lse [B, Hq, m] in the compute dtype."""
    dtype = compute_dtype(q)
    logits, _, mask = _logits(q, k, visible, distance, slopes, bias, scale, softcap)
    if logits.shape[-1] == 0:
        top = logits.new_full(logits.shape[:-1], -INFINITE)
    else:
        top = logits.amax(-1)
    if sinks is not None:
        sinks = sinks.to(dtype).view(1, k.shape[2], -1, 1)
        top = torch.maximum(top, sinks)
    safe = top.masked_fill(top == -INFINITE, 0)
    p = torch.exp(logits - safe[..., None])
    total = p.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - safe)
    out = p @ _seen(_heads(v, dtype), mask) / total.masked_fill(total == 0, 1)[..., None]
    return _ungrouped(out), (safe + total.log()).flatten(1, 2)


def _score_gradient(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    distance: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Probabilities, gradient of the biased scores, tanh of the soft cap and mask, all [B, Hkv, group, m, n]."""
    dtype, kv_heads = compute_dtype(q), k.shape[2]
    logits, tanh, mask = _logits(q, k, visible, distance, slopes, bias, scale, softcap)
    lse = lse.to(dtype).unflatten(1, (kv_heads, -1))[..., None]
    p = torch.exp(logits - lse.masked_fill(lse == -INFINITE, 0)).masked_fill(~mask, 0)
    # nor does a row without a visible key touch its keys' gradients, whatever it holds
    dout = _grouped(dout, kv_heads, dtype).masked_fill(~mask.any(-1, keepdim=True), 0)
    dp = (dout @ _seen(_heads(v, dtype), mask).transpose(-1, -2)).masked_fill(~mask, 0)
    return p, p * (dp - delta.to(dtype).unflatten(1, (kv_heads, -1))[..., None]), tanh, mask


def attend_bwd(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    **biases: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in the compute dtype. ``delta [B, Hq, m]`` is sum(dout * out) - dlse."""
    dtype, kv_heads = compute_dtype(q), k.shape[2]
    p, ds, tanh, mask = _score_gradient(dout, delta, q, k, v, lse, visible, scale=scale, softcap=softcap, **biases)
    if tanh is not None:
        ds = ds * (1 - tanh.masked_fill(~mask, 0) ** 2)
    ds = ds * scale
    alive = mask.any(-1, keepdim=True)
    dout, queries = (_grouped(x, kv_heads, dtype).masked_fill(~alive, 0) for x in (dout, q))
    dq = _ungrouped(ds @ _seen(_heads(k, dtype), mask))
    dk = (ds.transpose(-1, -2) @ queries).sum(2).permute(0, 2, 1, 3)
    dv = (p.transpose(-1, -2) @ dout).sum(2).permute(0, 2, 1, 3)
    return dq, dk, dv


def attend_bwd_bias(*tensors: Tensor, scale: float, softcap: float = 0.0, **biases: Tensor | None) -> Tensor:
    """Gradient of a bias [Hq, m, n] in the compute dtype; the arguments are those of ``attend_bwd``."""
    return _score_gradient(*tensors, scale=scale, softcap=softcap, **biases)[1].sum(0).flatten(0, 1)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sum(dout * out) - dlse: [B, S, H, D] -> [B, H, S], packed [T, H, D] -> [H, T]."""
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(-1, -2)
    return delta if dlse is None else delta - dlse.to(dtype)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum exp(sink - lse) * delta over batch and rows; lse and delta are [B, H, S] or [H, T]."""
    logits = sinks.to(lse.dtype)[:, None]
    p = torch.exp(logits - lse).masked_fill(lse == -INFINITE, 0)
    summed = (p * delta).transpose(-1, -2).reshape(-1, sinks.shape[0]).sum(0)
    return -summed.to(sinks.dtype)
