"""Reference of the expert layer's own kernels: up-projection with activation, and the activation's backward."""

import torch
from torch import Tensor

from .grouped_matmul import computed, grouped_matmul_fwd


def activate(gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


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
) -> tuple[Tensor, Tensor]:
    z = grouped_matmul_fwd(x, w_gate_up, offsets, order, bias, top_k, computed(x[:0]).dtype)
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
    with torch.enable_grad():
        leaf = computed(z.detach()).masked_fill(~kept, 0).clone().requires_grad_()
        h = activate(*leaf.chunk(2, dim=-1), activation, alpha, limit)
        (dz,) = torch.autograd.grad(h, leaf, d * w)
    h = h.detach()
    dweights = torch.empty_like(weights, dtype=h.dtype).flatten()
    dweights[slot] = (h * d).sum(-1)
    return dz.to(z.dtype), (h * w).to(z.dtype), dweights.view(weights.shape).to(weights.dtype)
