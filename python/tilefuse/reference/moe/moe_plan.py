"""Reference of moe_plan: a stable sort of slots by expert."""

import torch
from torch import Tensor


def moe_plan_fwd(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = ids.reshape(-1).long()
    dropped = (flat < 0) | (flat >= num_experts)
    expert = flat.masked_fill(dropped, num_experts)
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=ids.device))
    inverse = inverse.masked_fill(dropped, -1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    offsets = torch.cat([counts.new_zeros(1), counts[:num_experts].cumsum(0)])
    return order.int(), inverse.int(), offsets.int()
