"""The dispatch plan, against a stable sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled
from ..shapes import DEEPSEEK_V3 as M


def eager(ids, experts):
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=ids.device)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(
        0, flat.long(), torch.ones_like(flat, dtype=torch.int64)
    )
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return order.int(), inverse.int(), offsets.int()


def cases() -> Iterator[Case]:
    for tokens in (1, 128, 4096, 32768):

        def inputs(device, generator, tokens=tokens):
            scores = torch.rand(tokens, M.experts, device=device, generator=generator)
            return scores.topk(M.top_k, dim=-1)[1].int(), M.experts

        yield Case(
            op="moe_plan",
            name=f"{M.name}, {tokens} tokens",
            dtype="int32",
            inputs=inputs,
            run=tilefuse.moe_plan,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            exact=True,
            bytes=tokens * M.top_k * 12,
            call_cost=tokens == 1,
            suite="quick" if tokens == 4096 else "full",
        )
