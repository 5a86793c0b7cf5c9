"""At most so many slots per expert: GShard's rule by position, and by weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal

EXPERTS, TOP_K, FACTOR = 64, 2, 1.25


def kept(ids, weights, keep):
    return torch.where(keep, ids, -1), torch.where(keep, weights, 0.0)


def by_position(capacity: int):
    """GShard's cumulative sums of one-hot masks, first choices before second ones."""

    def run(ids, weights):
        taken = torch.nn.functional.one_hot(ids.long().T.flatten(), EXPERTS)
        place = (taken.cumsum(0) * taken).sum(-1)
        return kept(ids, weights, (place <= capacity).view(TOP_K, -1).T)

    return run


def by_weight(capacity: int):
    """Each expert's largest weights by topk over a dense [E, slots] matrix."""

    def run(ids, weights):
        flat, expert = weights.flatten(), ids.long().flatten()
        dense = weights.new_full((EXPERTS, flat.numel()), -1.0)
        dense[expert, torch.arange(flat.numel(), device=ids.device)] = flat
        values, slots = dense.topk(capacity, dim=-1)
        keep = torch.zeros_like(flat, dtype=torch.bool)
        keep = keep.index_put((slots[values >= 0],), torch.tensor(True, device=ids.device))
        return kept(ids, weights, keep.view_as(ids))

    return run


def cases() -> Iterator[Case]:
    for tokens, policy, suite, devices in (
        (4096, "position", "quick", ("cpu", "cuda")),
        (4096, "weight", "full", ("cpu", "cuda")),
        (32768, "position", "full", ("cuda",)),
    ):
        capacity = math.ceil(FACTOR * tokens * TOP_K / EXPERTS)

        def inputs(device, generator, tokens=tokens):
            logits = normal((tokens, EXPERTS), torch.float32, device, generator)
            # some experts are more popular than others, or nothing would be dropped
            logits += normal((EXPERTS,), torch.float32, device, generator, 0.5)
            weights, ids = logits.softmax(-1).topk(TOP_K, -1)
            return ids.int(), weights

        eager = by_position(capacity) if policy == "position" else by_weight(capacity)
        peers = {"eager": eager, "torch.compile": Peer(eager, compile=True)}
        yield Case(
            op="moe_apply_capacity",
            name=f"{tokens} tokens, {EXPERTS} experts, k {TOP_K}, by {policy}",
            dtype="float32",
            inputs=inputs,
            run=lambda ids, weights, capacity=capacity, policy=policy: tilefuse.moe_apply_capacity(
                ids, weights, EXPERTS, capacity, policy=policy
            ),
            exact=True,
            peers=peers,
            bytes=4 * 4 * tokens * TOP_K,
            suite=suite,
            devices=devices,
        )
