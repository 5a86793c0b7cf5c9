"""Rotary embedding and paged cache write in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from .rope import compute_tables, rope_fwd, rotate


def check_slots(slot_mapping: Tensor, k_cache: Tensor) -> None:
    """On CPU a slot past the cache raises; on a GPU it is skipped."""
    slots = k_cache.shape[0] * k_cache.shape[1]
    if slot_mapping.device.type == "cpu" and slot_mapping.numel() and slot_mapping.max() >= slots:
        errors.value_error(
            "rope_append_kv", "slot_mapping", f"below pages * page_size = {slots}", int(slot_mapping.max())
        )


def _write(cache: Tensor, rows: Tensor, scale: float, slots: Tensor) -> None:
    """Rows [.., H, D] in the dtype to compute in, to the cache's dtype, to their slots."""
    slots, rows = slots.flatten().long(), rows.flatten(0, -3)
    keep = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    slots, rows = slots[keep], rows[keep]
    if cache.dtype == torch.float8_e4m3fn:
        rows = (rows / rows.new_tensor(scale)).clamp(-448, 448).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    if slots.numel():
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows.to(cache.dtype)


def rope_append_kv_fwd(
    q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, interleaved, rotary_offset, k_scale, v_scale
):
    check_slots(slot_mapping, k_cache)
    token_cos, token_sin = compute_tables("rope_append_kv", q, cos, sin, positions, None, False, (), False)
    q_out = rope_fwd(q, cos, sin, positions, None, interleaved, rotary_offset, False, (), False)
    wide = k.to(token_cos.dtype)
    end = rotary_offset + 2 * cos.shape[1]
    turned = rotate(wide[..., rotary_offset:end], token_cos, token_sin, interleaved)
    _write(k_cache, torch.cat((wide[..., :rotary_offset], turned, wide[..., end:]), -1), k_scale, slot_mapping)
    _write(v_cache, v if v.dtype == v_cache.dtype else v.to(token_cos.dtype), v_scale, slot_mapping)
    return q_out
