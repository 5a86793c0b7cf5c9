"""Attention whose keys and values differ in width, in plain PyTorch, blocked over query rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .mla_compress_kv import compute_dtype

# query rows at once: bounds the score matrix to ROWS x Sk per head
ROWS = 256


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Rows of q and of k that belong together: all of them, or one pair per packed sequence."""
    if cu_seqlens_q is None:
        yield slice(0, q.shape[-3]), slice(0, k.shape[-3])
        return
    bounds_q = [min(max(bound, 0), q.shape[0]) for bound in cu_seqlens_q.tolist()]
    bounds_k = [min(max(bound, 0), k.shape[0]) for bound in cu_seqlens_k.tolist()]
    for b in range(len(bounds_q) - 1):
        yield slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])


def heads_first(x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """[.., S, H, D] -> [.., H, rows, D] in the compute dtype."""
    return x[..., rows, :, :].to(dtype).transpose(-3, -2)


def blocks(
    queries: int, keys: int, causal: bool, device: torch.device
) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """Query rows [i, j), how many keys they see at most, and which (None: all)."""
    for i in range(0, queries, ROWS):
        j = min(i + ROWS, queries)
        if not causal:
            yield i, j, keys, None
            continue
        delta = keys - queries
        seen = min(max(j + delta, 0), keys)
        row = torch.arange(i, j, device=device).unsqueeze(1) + delta
        yield i, j, seen, torch.arange(seen, device=device) <= row


def mla_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), float("-inf"), dtype=dtype)
    for rows_q, rows_k in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        q_s, k_s, v_s = heads_first(q, rows_q, dtype), heads_first(k, rows_k, dtype), heads_first(v, rows_k, dtype)
        for i, j, seen, visible in blocks(q_s.shape[-2], k_s.shape[-2], causal, q.device):
            if seen == 0:
                continue
            scores = (q_s[..., i:j, :] @ k_s[..., :seen, :].transpose(-1, -2)) * softmax_scale
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            top = scores.amax(-1, keepdim=True)
            weights = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
            total = weights.sum(-1, keepdim=True)
            values = weights @ v_s[..., :seen, :] / torch.where(total == 0, 1.0, total)
            place = slice(rows_q.start + i, rows_q.start + j)
            out[..., place, :, :] = values.transpose(-3, -2).to(q.dtype)
            lse[..., place] = (top + torch.log(total)).squeeze(-1)
    return out, lse


def mla_attention_bwd(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dtype = compute_dtype(q)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = (x.contiguous() for x in (dq, dk, dv))
    for rows_q, rows_k in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        q_s, k_s, v_s = heads_first(q, rows_q, dtype), heads_first(k, rows_k, dtype), heads_first(v, rows_k, dtype)
        dout_s, o_s = heads_first(dout, rows_q, dtype), heads_first(out, rows_q, dtype)
        lse_s = lse[..., rows_q].to(dtype).unsqueeze(-1)
        # softmax's own gradient, with that of lse folded in
        delta = (dout_s * o_s).sum(-1, keepdim=True) - dlse[..., rows_q].to(dtype).unsqueeze(-1)
        dk_s, dv_s = torch.zeros_like(k_s), torch.zeros_like(v_s)
        for i, j, seen, visible in blocks(q_s.shape[-2], k_s.shape[-2], causal, q.device):
            if seen == 0:
                continue
            k_b, v_b, dout_b, lse_b = k_s[..., :seen, :], v_s[..., :seen, :], dout_s[..., i:j, :], lse_s[..., i:j, :]
            scores = (q_s[..., i:j, :] @ k_b.transpose(-1, -2)) * softmax_scale
            weights = torch.exp(scores - torch.where(lse_b == float("-inf"), float("inf"), lse_b))
            if visible is not None:
                weights = weights.masked_fill(~visible, 0.0)
            dv_s[..., :seen, :] += weights.transpose(-1, -2) @ dout_b
            ds = weights * (dout_b @ v_b.transpose(-1, -2) - delta[..., i:j, :]) * softmax_scale
            place = slice(rows_q.start + i, rows_q.start + j)
            dq[..., place, :, :] = (ds @ k_b).transpose(-3, -2).to(q.dtype)
            dk_s[..., :seen, :] += ds.transpose(-1, -2) @ q_s[..., i:j, :]
        dk[..., rows_k, :, :] = dk_s.transpose(-3, -2).to(k.dtype)
        dv[..., rows_k, :, :] = dv_s.transpose(-3, -2).to(v.dtype)
    return dq, dk, dv
