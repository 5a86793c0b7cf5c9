"""Paged latent rows to one packed tensor, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tilefuse.ops.mla import layout as layouts


def read_rows(cache: Tensor, slots: Tensor, kv_lora_rank: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Rows of valid slots (any shape), dequantised: [.., R + r] in ``dtype``, one rounding."""
    row = layouts.row_layout(layout, kv_lora_rank, cache.shape[-1])
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    rows = cache[page, offset]
    if not row.is_fp8:
        return rows.to(dtype)
    codes, scales, rotated = layouts.fp8_parts(rows, row)
    values = codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32).unflatten(-1, (-1, layouts.GROUP))
    exact = torch.promote_types(dtype, torch.float32)
    values = (values.to(exact) * scales.unsqueeze(-1).to(exact)).flatten(-2)
    return torch.cat((values.to(dtype), rotated.to(dtype)), -1)


def slots_of(block_table: Tensor, page_size: int, pages: int, length: int) -> tuple[Tensor, Tensor]:
    """Slots of the first ``length`` keys of one sequence and which of them exist: an entry outside the pool is none."""
    key = torch.arange(length, device=block_table.device)
    column = key // page_size
    inside = column < block_table.shape[0]
    if block_table.shape[0] == 0:
        return torch.zeros_like(key), inside
    page = block_table.long()[column.clamp(max=block_table.shape[0] - 1)]
    exists = inside & (page >= 0) & (page < pages)
    return torch.where(exists, page * page_size + key % page_size, 0), exists


def mla_gather_kv_fwd(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total_tokens: int,
    kv_lora_rank: int,
    layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    row = layouts.row_layout(layout, kv_lora_rank, cache.shape[-1])
    out = cache.new_zeros(total_tokens, row.rank + row.rope_dim, dtype=out_dtype)
    token = torch.arange(total_tokens, device=cache.device)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    pages, page_size = cache.shape[:2]
    if pages * page_size == 0 or block_table.numel() == 0 or total_tokens == 0:
        return out
    inside = (sequence >= 0) & (sequence < block_table.shape[0])
    sequence = sequence.clamp(0, block_table.shape[0] - 1)
    key = token - bounds[sequence]
    column = key.clamp(min=0) // page_size
    inside &= column < block_table.shape[1]
    page = block_table.long()[sequence, column.clamp(max=block_table.shape[1] - 1)]
    inside &= (page >= 0) & (page < pages)
    slots = torch.where(inside, page * page_size + key % page_size, 0)
    rows = read_rows(cache, slots, kv_lora_rank, layout, out_dtype)
    # selected, not multiplied: the row of an absent key may hold NaN
    return torch.where(inside.unsqueeze(-1), rows, out)
