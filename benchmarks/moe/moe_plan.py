"""Slots sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import DEEPSEEK_V3, MIXTRAL_8X7B
from .moe_route import sort_slots


def cases() -> Iterator[Case]:
    for m, tokens, suite, devices in (
        (DEEPSEEK_V3, 4096, "quick", ("cpu", "cuda")),
        (DEEPSEEK_V3, 1, "full", ("cpu", "cuda")),
        (MIXTRAL_8X7B, 4096, "full", ("cpu", "cuda")),
        (DEEPSEEK_V3, 32768, "full", ("cuda",)),
    ):

        def inputs(device, generator, m=m, tokens=tokens):
            logits = normal((tokens, m.experts), torch.float32, device, generator)
            return (logits.topk(m.top_k, -1).indices.int(),)

        def eager(ids, m=m):
            return sort_slots(ids, m.experts)

        slots = tokens * m.top_k
        yield Case(
            op="moe_plan",
            name=f"{m.name}, {tokens} tokens",
            dtype="int32",
            inputs=inputs,
            run=lambda ids, m=m: tilefuse.moe_plan(ids, m.experts),
            exact=True,
            peers={"eager": eager, "torch.compile": Peer(eager, compile=True)},
            bytes=4 * (3 * slots + m.experts),
            call_cost=tokens == 1,
            suite=suite,
            devices=devices,
        )
