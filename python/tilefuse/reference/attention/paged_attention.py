"""Attention over a paged key/value cache in PyTorch: gathers the keys that a sequence's rows can see."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import INFINITE, attend, compute_dtype


def paged_attention_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    k_scale: float,
    v_scale: float,
) -> tuple[Tensor, Tensor]:
    batch, sq, heads, _ = q.shape
    pages, page_size = k_cache.shape[:2]
    dtype = compute_dtype(q)
    out = q.new_zeros(batch, sq, heads, v_cache.shape[-1])
    lse = q.new_full((batch, heads, sq), -INFINITE, dtype=dtype)
    for b, length in enumerate(seq_lens.tolist()):
        length = max(0, min(length, block_table.shape[1] * page_size))
        at = torch.arange(sq, device=q.device)[:, None] + (length - sq)
        first = 0 if left < 0 else max(0, length - sq - left)
        keys = torch.arange(min(first, length), length, device=q.device)
        page = block_table[b].long()[keys // page_size]
        there = (page >= 0) & (page < pages)
        page = torch.where(there, page, torch.zeros_like(page))
        # [1, n, Hkv, D]
        k, v = (
            (cache[page, keys % page_size].to(dtype) * factor).masked_fill(~there[:, None, None], 0)[None]
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        offset = keys[None, :] - at
        visible = there[None, :].expand(sq, -1)
        visible = visible & (offset >= -left) if left >= 0 else visible
        visible = visible & (offset <= right) if right >= 0 else visible
        rows, row_lse = attend(
            q[b : b + 1],
            k,
            v,
            visible,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            slopes=alibi_slopes,
            distance=offset.abs(),
        )
        out[b], lse[b] = rows[0].to(out.dtype), row_lse[0]
    return out, lse
