"""Block-sparse attention in PyTorch: one small dense attention per listed row of blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import INFINITE, attend, attend_bwd, compute_dtype, row_delta


def _rows(
    q: Tensor, k: Tensor, row_offsets: Tensor, col_index: Tensor, key_mask: Tensor | None, block_size: int, causal: bool
) -> Iterator[tuple[slice, slice, slice, slice, Tensor, Tensor]]:
    """(batch, query heads, kv heads, query tokens, keys [n] with repeats, visible [m, n]) of each row of blocks."""
    batch, sq, heads, _ = q.shape
    sk, kv_heads = k.shape[1], k.shape[2]
    group, delta = heads // kv_heads, sk - sq
    columns = -(-sk // block_size)
    offsets, cols = row_offsets.tolist(), col_index.tolist()
    within = torch.arange(block_size, device=q.device)
    shared_batch = len(offsets) == 1 and key_mask is None
    for b in range(1 if shared_batch else batch):
        of_batch = offsets[b if len(offsets) > 1 else 0]
        batches = slice(0, batch) if shared_batch else slice(b, b + 1)
        for h, of_head in enumerate(of_batch):
            if len(of_batch) == 1:
                q_heads, kv = slice(0, heads), slice(0, kv_heads)
            else:
                q_heads, kv = slice(h, h + 1), slice(h // group, h // group + 1)
            for i in range(len(of_head) - 1):
                start = min(max(of_head[i], 0), len(cols))
                listed = [c for c in cols[start : max(of_head[i + 1], start)] if 0 <= c < columns]
                tokens = slice(i * block_size, min((i + 1) * block_size, sq))
                base = torch.tensor(listed, dtype=torch.long, device=q.device)[:, None] * block_size
                keys = (base + within).flatten()
                keys = keys[keys < sk]
                visible = torch.ones(tokens.stop - tokens.start, keys.shape[0], dtype=torch.bool, device=q.device)
                if causal:
                    at = torch.arange(tokens.start, tokens.stop, device=q.device) + delta
                    visible &= keys[None, :] <= at[:, None]
                if key_mask is not None:
                    visible &= key_mask[b][keys][None, :]
                yield batches, q_heads, kv, tokens, keys, visible


def block_sparse_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    col_index: Tensor,
    key_mask: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -INFINITE, dtype=compute_dtype(q))
    lists = _rows(q, k, row_offsets, col_index, key_mask, block_size, causal)
    for batches, heads, kv, tokens, keys, visible in lists:
        rows, row_lse = attend(
            q[batches, tokens, heads], k[batches, :, kv][:, keys], v[batches, :, kv][:, keys], visible, scale=scale
        )
        out[batches, tokens, heads] = rows.to(out.dtype)
        lse[batches, heads, tokens] = row_lse
    return out, lse


def block_sparse_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    col_index: Tensor,
    key_mask: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(q)
    delta = row_delta(dout, out, dlse, dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    lists = _rows(q, k, row_offsets, col_index, key_mask, block_size, causal)
    for batches, heads, kv, tokens, keys, visible in lists:
        grads = attend_bwd(
            dout[batches, tokens, heads],
            delta[batches, heads, tokens],
            q[batches, tokens, heads],
            k[batches, :, kv][:, keys],
            v[batches, :, kv][:, keys],
            lse[batches, heads, tokens],
            visible,
            scale=scale,
        )
        dq[batches, tokens, heads] = grads[0]
        dk[batches, :, kv].index_add_(1, keys, grads[1])
        dv[batches, :, kv].index_add_(1, keys, grads[2])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
