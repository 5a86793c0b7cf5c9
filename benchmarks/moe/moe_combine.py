"""Expert rows back to their tokens, against a gather and against index_add_ (what eager models do)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import QWEN3_30B_A3B as M


def eager(y, inverse, weights):
    rows = y[inverse.long()].view(*weights.shape, -1)
    return (rows * weights[..., None].to(y.dtype)).sum(1)


def index_add(y, inverse, weights):
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    token = torch.arange(weights.shape[0], device=y.device).repeat_interleave(weights.shape[1])
    return out.index_add(0, token, y[inverse.long()] * weights.flatten()[:, None].to(y.dtype))


def cases() -> Iterator[Case]:
    for tokens in (16, 512, 32768):

        def inputs(device, generator, tokens=tokens):
            slots = tokens * M.top_k
            y = normal((slots, M.hidden), torch.bfloat16, device, generator)
            weights = torch.rand(tokens, M.top_k, device=device, generator=generator)
            return y, torch.randperm(slots, device=device, generator=generator).int(), weights

        for mode in ("forward", "backward"):
            rows = 2 * tokens * M.hidden
            yield Case(
                op="moe_combine",
                name=f"{M.name}, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs,
                run=tilefuse.moe_combine,
                peers={"eager": eager, "index_add": Peer(index_add), "torch.compile": compiled(eager)},
                grads=(0, 2),
                bytes=rows * (1 + M.top_k) if mode == "forward" else rows * (1 + 2 * M.top_k),
                suite="quick" if tokens == 512 else "full",
            )
