"""Rotary embedding in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_positions(
    name: str, tokens: Sequence[int], table_rows: int, positions: Tensor | None, cu_seqlens: Tensor | None, device
) -> Tensor:
    """The position of every token, int64, clamped to the table.

    On CPU a position outside of the table raises; on a GPU the check would wait for the device.
    """
    if positions is None:
        found = torch.arange(tokens[-1], device=device)
        if cu_seqlens is not None:
            bounds = cu_seqlens.long()
            sequence = torch.searchsorted(bounds, found, right=True) - 1
            found = found - torch.where(sequence >= 0, bounds[sequence.clamp(min=0)], 0)
        found = found.expand(tuple(tokens))
    else:
        found = positions.long()
    if device.type == "cpu" and found.numel() and (found.min() < 0 or found.max() >= table_rows):
        worst = int(found.min()) if found.min() < 0 else int(found.max())
        arg = "cos" if positions is None else "positions"
        expected = f"a table that holds every position, {worst} too" if positions is None else f"in [0, {table_rows})"
        raise ValueError(
            f"tilefuse.{name}: {arg} must be {expected}, got {f'{table_rows} rows' if positions is None else worst}"
        )
    return found.clamp(0, max(table_rows - 1, 0))


def mrope_axes(mrope_section: Sequence[int], mrope_interleaved: bool, half: int, device) -> Tensor:
    """Which of the three position rows each pair takes."""
    _, h, w = mrope_section
    pair = torch.arange(half, device=device)
    if mrope_interleaved:
        axis = torch.where((pair % 3 == 1) & (pair < 3 * h), 1, 0)
        return torch.where((pair % 3 == 2) & (pair < 3 * w), 2, axis)
    return (pair >= mrope_section[0]).long() + (pair >= mrope_section[0] + h).long()


def token_tables(
    cos: Tensor, sin: Tensor, found: Tensor, dtype: torch.dtype, conjugate: bool, mrope_section, mrope_interleaved
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token, ``[..., 1, R / 2]``."""
    if mrope_section:
        axis = mrope_axes(mrope_section, mrope_interleaved, cos.shape[1], cos.device)
        row = found.movedim(0, -1)[..., axis]  # [..., R / 2]
        pair = torch.arange(cos.shape[1], device=cos.device)
        cos, sin = cos[row, pair], sin[row, pair]
    else:
        cos, sin = cos[found], sin[found]
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    return cos, -sin if conjugate else sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the whole last dim; x, cos and sin in the dtype to compute in."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _rotate_slice(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotary_offset: int) -> Tensor:
    end = rotary_offset + 2 * cos.shape[-1]
    return rotate(x[..., rotary_offset:end].to(cos.dtype), cos, sin, interleaved).to(x.dtype)


def _put_slice(x: Tensor, rotated: Tensor, rotary_offset: int) -> None:
    x[..., rotary_offset : rotary_offset + rotated.shape[-1]] = rotated


def _with_slice(x: Tensor, rotated: Tensor, rotary_offset: int) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    _put_slice(out, rotated, rotary_offset)
    return out


def compute_tables(name, x, cos, sin, positions, cu_seqlens, conjugate, mrope_section, mrope_interleaved):
    found = token_positions(name, x.shape[:-2], cos.shape[0], positions, cu_seqlens, x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return token_tables(cos, sin, found, dtype, conjugate, mrope_section, mrope_interleaved)


def rope_fwd(
    x, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section, mrope_interleaved
):
    cos, sin = compute_tables("rope", x, cos, sin, positions, cu_seqlens, conjugate, mrope_section, mrope_interleaved)
    return _with_slice(x, _rotate_slice(x, cos, sin, interleaved, rotary_offset), rotary_offset)


def rope_qk_fwd(
    q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section, mrope_interleaved
):
    cos, sin = compute_tables(
        "rope_qk", q, cos, sin, positions, cu_seqlens, conjugate, mrope_section, mrope_interleaved
    )
    q_out, k_out = (
        _with_slice(x, _rotate_slice(x, cos, sin, interleaved, rotary_offset), rotary_offset) for x in (q, k)
    )
    return q_out, k_out


def rope_inplace(
    x, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section, mrope_interleaved
):
    cos, sin = compute_tables("rope_", x, cos, sin, positions, cu_seqlens, conjugate, mrope_section, mrope_interleaved)
    _put_slice(x, _rotate_slice(x, cos, sin, interleaved, rotary_offset), rotary_offset)


def rope_qk_inplace(
    q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section, mrope_interleaved
):
    cos, sin = compute_tables(
        "rope_qk_", q, cos, sin, positions, cu_seqlens, conjugate, mrope_section, mrope_interleaved
    )
    for x in (q, k):
        _put_slice(x, _rotate_slice(x, cos, sin, interleaved, rotary_offset), rotary_offset)
