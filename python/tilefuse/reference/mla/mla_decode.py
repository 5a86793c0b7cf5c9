"""Attention of absorbed queries over the latent cache, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .mla_compress_kv import compute_dtype
from .mla_gather_kv import read_rows, slots_of


def attend(
    q: Tensor, rows: Tensor, visible: Tensor, sinks: Tensor | None, softmax_scale: float, rank: int
) -> tuple[Tensor, Tensor]:
    """q [S, H, R + r] over rows [S or 1, K, R + r], visible [S, K]: out [S, H, R], lse [H, S]."""
    # a masked row may hold NaN: zero it, a zero weight would not hide it
    rows = torch.where(visible.any(0).unsqueeze(-1) if rows.shape[0] == 1 else visible.unsqueeze(-1), rows, 0)
    scores = (q @ rows.transpose(1, 2)) * softmax_scale  # [S, H, K]
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = torch.logsumexp(scores, -1) if rows.shape[1] else scores.new_full(scores.shape[:2], float("-inf"))
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))
    # an empty row has weight exp(-inf - 0) = 0 everywhere
    weights = torch.exp(scores - torch.where(total == float("-inf"), 0.0, total).unsqueeze(-1))
    weights = weights.masked_fill(~visible.unsqueeze(1), 0.0)
    return weights @ rows[..., :rank], lse.T


def mla_decode_fwd(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
    window: int,
    layout: str,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q, cache)
    batch, queries, heads, _ = q.shape
    out = q.new_zeros(batch, queries, heads, kv_lora_rank)
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
    lengths = seq_lens.tolist()
    for b in range(batch):
        length = min(lengths[b], block_table.shape[1] * cache.shape[1])
        if length <= 0 or queries == 0 or cache.shape[0] == 0:
            continue
        slots, exists = slots_of(block_table[b], cache.shape[1], cache.shape[0], length)
        key = torch.arange(length, device=q.device)
        # the position of each query row: the last row is the sequence's last token
        own = lengths[b] - queries + torch.arange(queries, device=q.device)
        visible = exists.unsqueeze(0).repeat(queries, 1)
        if causal:
            visible &= key <= own.unsqueeze(1)
        if window >= 0:
            visible &= key >= own.unsqueeze(1) - window
        rows = read_rows(cache, slots, kv_lora_rank, layout, dtype).unsqueeze(0)
        o, l = attend(q[b].to(dtype), rows, visible, sinks, softmax_scale, kv_lora_rank)
        out[b], lse[b] = o.to(q.dtype), l.float()
    return out, lse


def mla_sparse_decode_fwd(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q, cache)
    batch, queries, heads, _ = q.shape
    out = q.new_zeros(batch, queries, heads, kv_lora_rank)
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
    if cache.shape[0] * cache.shape[1] == 0 or queries == 0:
        return out, lse
    for b in range(batch):
        visible = (indices[b] >= 0) & (indices[b] < cache.shape[0] * cache.shape[1])
        rows = read_rows(cache, torch.where(visible, indices[b].long(), 0), kv_lora_rank, layout, dtype)
        o, l = attend(q[b].to(dtype), rows, visible, sinks, softmax_scale, kv_lora_rank)
        out[b], lse[b] = o.to(q.dtype), l.float()
    return out, lse
