"""Capacity, against the one-hot and cumulative sum that GShard-style code uses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled
from ..shapes import MIXTRAL_8X7B as M


def eager(ids, weights, experts, capacity):
    """Position of every slot in its expert's queue, from a cumulative sum over [k * T, E]."""
    hot = torch.nn.functional.one_hot(ids.T.flatten().long(), experts)
    place = (hot.cumsum(0) * hot).sum(-1).view(ids.shape[1], -1).T - 1
    kept = place < capacity
    return torch.where(kept, ids, -1).int(), weights * kept


def cases() -> Iterator[Case]:
    for tokens in (512, 4096, 32768):

        def inputs(device, generator, tokens=tokens):
            scores = torch.rand(tokens, M.experts, device=device, generator=generator)
            weights, ids = scores.topk(M.top_k, dim=-1)
            return ids.int(), weights, M.experts, tokens * M.top_k // M.experts

        yield Case(
            op="moe_apply_capacity",
            name=f"{M.name}, {tokens} tokens, factor 1",
            dtype="int32",
            inputs=inputs,
            run=tilefuse.moe_apply_capacity,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            exact=True,
            bytes=tokens * M.top_k * 16,
            suite="quick" if tokens == 4096 else "full",
        )
