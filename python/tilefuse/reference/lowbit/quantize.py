"""Integer quantisation in plain PyTorch. ``group_scales`` and ``levels`` are the exact rule, the rest is storage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.lowbit.quantize import FLOAT32_MAX, UNITS, code_dtype, groups_of


def zero_of(bits: int, symmetric: bool = True) -> int:
    """The code of 0 where none is stored: what symmetric codes have."""
    return 0 if code_dtype(bits, symmetric) == torch.int8 else 2 ** (bits - 1)


def grouped(x: Tensor, group_size: int) -> Tensor:
    """``[rows, K]`` as ``[rows, G, elements]``, filled up with zeros, which move no extreme."""
    rows, k = x.shape
    groups, size = groups_of(k, group_size), group_size or max(k, 1)
    return F.pad(x, (0, groups * size - k)).view(rows, groups, size)


def ungrouped(x: Tensor, k: int) -> Tensor:
    """``grouped`` taken back."""
    return x.flatten(1)[:, :k].contiguous()


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def group_scales(x: Tensor, bits: int, symmetric: bool, eps: float) -> tuple[Tensor, Tensor]:
    """scale (float32) and zero (uint8), ``[rows, G]``, of float32 groups ``[rows, G, elements]``."""
    eps = torch.tensor(eps, dtype=torch.float32).item()
    if symmetric:
        low, spread, steps = None, finite(x).abs().amax(-1), 2 ** (bits - 1) - 1
    else:
        low, high = finite(x).amin(-1).clamp(max=0.0), finite(x).amax(-1).clamp(min=0.0)
        spread, steps = (high - low).clamp(max=FLOAT32_MAX), 2**bits - 1
    # a tensor divisor: torch multiplies by the rounded reciprocal when it divides by a number on a GPU
    scale = torch.where(spread == 0, 1.0, spread.clamp(min=eps) / torch.full_like(spread, steps))
    if low is None:
        return scale, torch.full_like(scale, zero_of(bits), dtype=torch.uint8)
    return scale, (-low / scale).round().clamp(0, steps).to(torch.uint8)


def levels(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """``code - zero`` of float32 groups as float32, and whether it is what ``x / scale`` rounds to, not a clamp's."""
    y = x / scale.unsqueeze(-1)
    y = torch.where(y.isnan(), 0.0, y)
    if symmetric:
        qmax = 2 ** (bits - 1) - 1
        # + 0: no negative zero
        return y.clamp(-qmax, qmax).round() + 0.0, y.abs() <= qmax
    top, shift = 2**bits - 1, zero.to(torch.float32).unsqueeze(-1)
    code = y.round() + shift
    return code.clamp(0, top) - shift, (code >= 0) & (code <= top)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[rows, columns]``, columns a multiple of what fills bytes, in the storage of ``int_quantize``."""
    if bits == 8:
        return codes
    nibbles = (codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4
    if bits == 4:
        return nibbles
    upper = codes >> 4
    pairs = upper[:, ::4] | upper[:, 1::4] << 2 | upper[:, 2::4] << 4 | upper[:, 3::4] << 6
    rows, whole = codes.shape[0], codes.shape[1] // 32
    # both planes of a block side by side
    planes = nibbles[:, : whole * 16].view(rows, whole, 16), pairs[:, : whole * 8].view(rows, whole, 8)
    return torch.cat((torch.cat(planes, -1).flatten(1), nibbles[:, whole * 16 :], pairs[:, whole * 8 :]), 1)


def unpack_codes(q: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, columns]`` of stored ones, in q's dtype."""
    if bits == 8:
        return q
    if bits == 4:
        return torch.stack((q & 15, q >> 4), -1).flatten(1)
    rows, whole = q.shape[0], q.shape[1] // 24
    rest = q.shape[1] % 24 // 3
    blocks, tail = q[:, : whole * 24].reshape(rows, whole, 24), q[:, whole * 24 :]
    nibbles = torch.cat((blocks[..., :16].flatten(1), tail[:, : 2 * rest]), 1)
    pairs = torch.cat((blocks[..., 16:].flatten(1), tail[:, 2 * rest :]), 1)
    upper = torch.stack([pairs >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
    return torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1) | upper << 4


def int_quantize_fwd(
    x: Tensor, bits: int, group_size: int, symmetric: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    k = x.shape[1]
    groups = grouped(x.to(torch.float32), group_size)
    scale, zero = group_scales(groups, bits, symmetric, eps)
    level, _ = levels(groups, scale, zero, bits, symmetric)
    codes = ungrouped(level + zero.unsqueeze(-1), k).to(code_dtype(bits, symmetric))
    filling = -k % UNITS[bits][0]
    if filling:
        codes = torch.cat((codes, zero[:, -1:].expand(-1, filling)), 1)
    return pack_codes(codes, bits).contiguous(), scale, zero


def group_of_columns(values: Tensor, columns: int, group_size: int) -> Tensor:
    """``[rows, G]`` spread to ``[rows, columns]``; what is past the last group is of the last one."""
    at = torch.arange(columns, device=values.device) // (group_size or max(columns, 1))
    return values[:, at.clamp(max=max(values.shape[1] - 1, 0))]


def int_dequantize_fwd(
    q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, out_dtype: torch.dtype
) -> Tensor:
    codes = unpack_codes(q, bits).to(torch.float32)
    shift = zero_of(bits) if zero is None else group_of_columns(zero, codes.shape[1], group_size).to(torch.float32)
    compute = torch.float64 if out_dtype == torch.float64 else torch.float32
    wide = group_of_columns(scale, codes.shape[1], group_size).to(compute)
    return ((codes - shift).to(compute) * wide).to(out_dtype).contiguous()
