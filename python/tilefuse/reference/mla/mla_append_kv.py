"""Latent rows into the paged cache, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tilefuse.ops.mla import layout as layouts

from ..fp8.quantize import quantize_blocks
from .mla_compress_kv import normed_and_rotated

# the fp8 family's default; an all-zero block has scale 1 whatever it is
QUANTIZE_EPS = 1e-12


def check_slots(slot_mapping: Tensor, positions: Tensor, cache: Tensor, table_rows: int, rope_dim: int) -> Tensor:
    """Which tokens are stored. On CPU a slot past the cache or a position past the tables raises first."""
    slots = cache.shape[0] * cache.shape[1]
    stored = slot_mapping >= 0
    if cache.device.type == "cpu" and slot_mapping.numel():
        worst = int(slot_mapping.max())
        if worst >= slots:
            raise ValueError(f"tilefuse.mla_append_kv: slot_mapping must be less than {slots}, got {worst}")
        outside = stored & ((positions < 0) | (positions >= table_rows))
        if rope_dim and outside.any():
            worst = int(positions[outside][0])
            raise ValueError(f"tilefuse.mla_append_kv: positions must be in [0, {table_rows}), got {worst}")
    return stored & (slot_mapping < slots)


def mla_append_kv_fwd(
    kv_a: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    interleaved: bool,
    layout: str,
) -> None:
    row = layouts.row_layout(layout, weight.shape[0], cache.shape[-1])
    kv_a, positions = kv_a[: slot_mapping.shape[0]], positions[: slot_mapping.shape[0]]
    stored = check_slots(slot_mapping, positions, cache, cos.shape[0], row.rope_dim)
    kept = torch.where(stored, positions, 0)
    normed, rotated = normed_and_rotated("mla_append_kv", kv_a, weight, cos, sin, kept, eps, interleaved)
    if row.is_fp8:
        codes, scales = quantize_blocks(normed.float().unflatten(-1, (-1, layouts.GROUP)), pow2=True, eps=QUANTIZE_EPS)
        rows = cache.new_empty(kv_a.shape[0], row.width)
        parts = (codes.flatten(-2).view(torch.uint8), scales, rotated.to(torch.bfloat16))
        for part, value in zip(layouts.fp8_parts(rows, row), parts):
            part.copy_(value)
    else:
        rows = torch.cat((normed, rotated), -1).to(cache.dtype)
    slot = slot_mapping[stored].long()
    cache[slot // cache.shape[1], slot % cache.shape[1]] = rows[stored]
