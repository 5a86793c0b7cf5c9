"""Fake quantisation in plain PyTorch: the codes of ``quantize``, and the gradients written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.lowbit.fake_quantize import EPS
from ..norm.rms_norm import compute_dtype
from .quantize import FLOAT32_MAX, finite, group_scales, grouped, levels, ungrouped


def pack_bits(mask: Tensor) -> Tensor:
    """bool ``[rows, K]`` as uint8 ``[rows, ceil(K / 8)]``, the first element lowest."""
    rows, k = mask.shape
    bits = F.pad(mask.to(torch.uint8), (0, -k % 8)).view(rows, -(-k // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, k: int) -> Tensor:
    bits = torch.stack([packed >> i & 1 for i in range(8)], -1)
    return bits.flatten(1)[:, :k].bool()


def _scales(groups: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int, symmetric: bool):
    """scale and zero as float32 and uint8: those given, or the groups' own."""
    if scale is None:
        return group_scales(groups, bits, symmetric, EPS)
    return scale.to(torch.float32), torch.zeros_like(scale, dtype=torch.uint8) if zero is None else zero


def fake_quantize_fwd(x, scale, zero, bits, group_size, symmetric, scale_gradient, keep):
    k = x.shape[1]
    groups = grouped(x.to(torch.float32), group_size)
    scale, zero = _scales(groups, scale, zero, bits, symmetric)
    level, inside = levels(groups, scale, zero, bits, symmetric)
    dtype = compute_dtype(x)
    out = ungrouped(level.to(dtype) * scale.to(dtype).unsqueeze(-1), k).to(x.dtype)
    mask = pack_bits(ungrouped(inside, k)) if keep else x.new_empty((0, 0), dtype=torch.uint8)
    return out, mask


def fake_quantize_bwd(dout, inside):
    return torch.where(unpack_bits(inside, dout.shape[1]), dout, 0.0).contiguous()


def _scale_terms(dout: Tensor, x: Tensor, scale: Tensor, level: Tensor, inside: Tensor) -> Tensor:
    """What the elements of groups add to the gradient of their scale, in dout's dtype."""
    y = x / scale.unsqueeze(-1)
    level, y = level.to(dout.dtype), torch.where(y.isnan(), 0.0, y)
    return dout * torch.where(inside, level - y, level)


def fake_quantize_bwd_scale(dout, x, scale, zero, bits, group_size, symmetric):
    k, dtype = x.shape[1], compute_dtype(x)
    groups = grouped(x.to(torch.float32), group_size)
    narrow, zero = _scales(groups, scale, zero, bits, symmetric)
    level, inside = levels(groups, narrow, zero, bits, symmetric)
    upstream = grouped(dout.to(dtype), group_size)
    terms = _scale_terms(upstream, grouped(x.to(dtype), group_size), scale.to(dtype), level, inside)
    dx = torch.where(ungrouped(inside, k), dout, 0.0).contiguous()
    return dx, terms.sum(-1).to(scale.dtype).contiguous()


def fake_quantize_bwd_amax(dout, x, bits, group_size, symmetric):
    k, dtype = x.shape[1], compute_dtype(x)
    narrow, wide = grouped(x.to(torch.float32), group_size), grouped(x.to(dtype), group_size)
    scale, zero = group_scales(narrow, bits, symmetric, EPS)
    level, inside = levels(narrow, scale, zero, bits, symmetric)
    if symmetric:
        # the largest quotient may lie an ulp past the end, and is no clamp's
        inside = ~narrow.isinf()
    # of the values, not of their filling
    there = grouped(torch.ones_like(x, dtype=torch.bool), group_size)
    upstream = grouped(dout.to(dtype), group_size)
    dscale = _scale_terms(upstream, wide, scale.to(dtype), level, inside).sum(-1, keepdim=True)
    kept = finite(narrow)
    if symmetric:
        spread = kept.abs().amax(-1, keepdim=True)
        ends, steps = [((narrow.abs() == spread) & there, narrow.sign())], 2 ** (bits - 1) - 1
    else:
        high, low = kept.amax(-1, keepdim=True).clamp(min=0), kept.amin(-1, keepdim=True).clamp(max=0)
        spread, steps = high - low, 2**bits - 1
        ends = [((narrow == high) & there, 1.0), ((narrow == low) & there, -1.0)]
    least = torch.tensor(EPS, dtype=torch.float32).item()
    dspread = torch.where((spread >= least) & (spread <= FLOAT32_MAX), dscale / steps, 0.0)
    dx = upstream if symmetric else torch.where(inside, upstream, 0.0)
    for ties, sign in ends:
        dx = dx + torch.where(ties, sign * dspread / ties.sum(-1, keepdim=True), 0.0)
    return ungrouped(dx, k).to(x.dtype)
