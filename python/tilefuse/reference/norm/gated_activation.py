"""Gated activations in plain PyTorch, with the gradient written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rms_norm import compute_dtype


def _halves(gate: Tensor, up: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    if interleaved:
        return gate[..., ::2], gate[..., 1::2]
    return gate.chunk(2, -1)


def _activate(gate: Tensor, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The activation of gate and its derivative."""
    if activation == "relu2":
        positive = gate.relu()
        return positive.square(), 2.0 * positive
    if activation == "gelu":
        share = 0.5 * (1.0 + torch.erf(gate * math.sqrt(0.5)))
        return gate * share, share + gate * torch.exp(-0.5 * gate.square()) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        # 0.5 (1 + tanh(x)) is a sigmoid of twice the argument
        slope = 2.0 * math.sqrt(2.0 / math.pi)
        share = torch.sigmoid(slope * (gate + 0.044715 * gate * gate * gate))
        inner = slope * (1.0 + 3.0 * 0.044715 * gate.square())
        # far out the square of gate overflows beside a factor that is 0
        bend = torch.where((share == 0.0) | (share == 1.0), 0.0, gate * share * (1.0 - share) * inner)
        return gate * share, share + bend
    slope = alpha if activation == "swiglu_oai" else 1.0
    share = torch.sigmoid(slope * gate)
    return gate * share, share + slope * gate * share * (1.0 - share)


def _clamped(gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit > 0.0 else (gate, up)


def gated_activation_fwd(gate, up, activation, alpha, limit, interleaved):
    dtype = compute_dtype(gate)
    g, u = _clamped(*(t.to(dtype) for t in _halves(gate, up, interleaved)), limit)
    activated, _ = _activate(g, activation, alpha)
    return (activated * (u + 1.0 if activation == "swiglu_oai" else u)).to(gate.dtype).contiguous()


def gated_activation_bwd(dout, gate, up, activation, alpha, limit, interleaved):
    dtype = compute_dtype(gate)
    wide_gate, wide_up = (t.to(dtype) for t in _halves(gate, up, interleaved))
    g, u = _clamped(wide_gate, wide_up, limit)
    activated, slope = _activate(g, activation, alpha)
    dout = dout.to(dtype)
    dgate = dout * (u + 1.0 if activation == "swiglu_oai" else u) * slope
    dup = dout * activated
    if limit > 0.0:
        dgate = torch.where(wide_gate > limit, 0.0, dgate)
        dup = torch.where(wide_up.abs() > limit, 0.0, dup)
    dgate, dup = dgate.to(gate.dtype), dup.to(gate.dtype)
    if up is not None:
        return dgate.contiguous(), dup.contiguous()
    joined = torch.stack((dgate, dup), -1).flatten(-2) if interleaved else torch.cat((dgate, dup), -1)
    return joined, gate.new_empty(0)
