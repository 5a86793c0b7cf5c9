"""Reference of the expert layer's own kernels: up-projection with activation, and the activation's backward."""

import math

import torch
from torch import Tensor

from .grouped_matmul import computed, grouped_matmul_fwd


def activate(gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    if activation in ("gelu", "gelu_erf"):
        return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu" else "none") * up
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def activate_bwd(
    gate: Tensor, up: Tensor, dh: Tensor, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``activate`` for gate and up."""
    if activation == "gelu_erf":
        cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
        return dh * up * (cdf + gate * density), dh * gate * cdf
    if activation == "gelu":
        factor, cubic = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(factor * (gate + cubic * gate**3))
        slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * factor * (1 + 3 * cubic * gate * gate)
        return dh * up * slope, dh * 0.5 * gate * (1 + t)
    g, u = (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit > 0 else (gate, up)
    if activation == "silu":
        s = torch.sigmoid(g)
        d_gate, d_up = dh * u * s * (1 + g * (1 - s)), dh * g * s
    else:
        s = torch.sigmoid(alpha * g)
        d_gate, d_up = dh * (u + 1) * s * (1 + alpha * g * (1 - s)), dh * g * s
    if limit > 0:
        # a clamped value passes no gradient, one at the bound does
        d_gate = d_gate.masked_fill(gate > limit, 0)
        d_up = d_up.masked_fill(up.abs() > limit, 0)
    return d_gate, d_up


def _kept(offsets: Tensor, rows: int) -> Tensor:
    at = torch.arange(rows, device=offsets.device)
    return ((at >= offsets[0]) & (at < offsets[-1]))[:, None]


def moe_experts_up(
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    order: Tensor,
    bias: Tensor | None,
    top_k: int,
    activation: str,
    alpha: float,
    limit: float,
    save: bool,
    w_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    z = grouped_matmul_fwd(x, w_gate_up, offsets, order, bias, top_k, computed(x[:0]).dtype, w_scale)
    h = activate(*z.chunk(2, dim=-1), activation, alpha, limit)
    return h.to(x.dtype), z.to(x.dtype) if save else x.new_empty((0, z.shape[1]))


def moe_experts_act_bwd(
    z: Tensor,
    dh: Tensor,
    offsets: Tensor,
    order: Tensor,
    weights: Tensor,
    activation: str,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _kept(offsets, z.shape[0])
    slot = order.long()
    w = computed(weights).flatten()[slot][:, None].masked_fill(~kept, 0).to(computed(z[:0]).dtype)
    d = computed(dh).masked_fill(~kept, 0)
    gate, up = computed(z).masked_fill(~kept, 0).chunk(2, dim=-1)
    h = activate(gate, up, activation, alpha, limit)
    dz = torch.cat(activate_bwd(gate, up, d * w, activation, alpha, limit), dim=-1)
    dweights = torch.empty_like(weights, dtype=h.dtype).flatten()
    dweights[slot] = (h * d).sum(-1)
    return dz.to(z.dtype), (h * w).to(z.dtype), dweights.view(weights.shape).to(weights.dtype)
