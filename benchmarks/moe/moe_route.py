"""Routing, against Hugging Face's router arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B


def options_of(model):
    options = {"top_k": model.top_k, "score": model.score, "scale": model.routed_scale}
    if model.n_group > 1:
        options |= {"n_group": model.n_group, "topk_group": model.topk_group}
    return options


def eager_sigmoid(logits, bias, m):
    """DeepSeek-V3's router in Hugging Face, after the linear layer."""
    scores = logits.sigmoid()
    biased = scores + bias
    per_group = biased.view(-1, m.n_group, m.experts // m.n_group)
    best = per_group.topk(2, dim=-1)[0].sum(-1).topk(m.topk_group, dim=-1)[1]
    mask = torch.zeros_like(per_group[..., 0]).scatter_(1, best, 1)
    mask = mask[..., None].expand_as(per_group).reshape(-1, m.experts).bool()
    ids = biased.masked_fill(~mask, -torch.inf).topk(m.top_k, dim=-1)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * m.routed_scale


def eager_softmax(logits, bias, m):
    weights = logits.softmax(-1, dtype=torch.float32).topk(m.top_k, dim=-1)[0]
    return weights / weights.sum(-1, keepdim=True)


def cases() -> Iterator[Case]:
    for m, eager in ((DEEPSEEK_V3, eager_sigmoid), (QWEN3_30B_A3B, eager_softmax)):
        for tokens in (1, 128, 4096, 32768):

            def inputs(device, generator, tokens=tokens, m=m):
                # one bias for all: near ties of biased scores are then near ties of weights, so no check is a matter
                # of luck; the work does not depend on the values
                bias = torch.full((m.experts,), 0.25, device=device) if m.score == "sigmoid" else None
                return normal((tokens, m.experts), torch.float32, device, generator), bias

            def run(logits, bias, m=m):
                return tilefuse.moe_route(logits, bias, **options_of(m))[0]

            def peer(logits, bias, m=m, eager=eager):
                return eager(logits, bias, m)

            for mode in ("forward", "backward") if tokens >= 4096 else ("forward",):
                read = tokens * m.experts * 4
                yield Case(
                    op="moe_route",
                    name=f"{m.name}, {tokens} tokens",
                    dtype="float32",
                    mode=mode,
                    inputs=inputs,
                    run=run,
                    peers={"eager": peer, "torch.compile": compiled(peer)},
                    upcast=(0,),
                    grads=(0,),
                    bytes=(read if mode == "forward" else 2 * read) + tokens * m.top_k * 8,
                    call_cost=tokens == 1,
                    suite="quick" if tokens == 4096 and mode == "forward" else "full",
                )
