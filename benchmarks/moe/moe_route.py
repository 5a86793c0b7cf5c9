"""Routing: DeepSeek-V3's groups and bias, alone and with the plan after it; Qwen3's and Mixtral's softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3, MIXTRAL_8X7B, QWEN3_30B_A3B, Model


def options(m: Model) -> dict:
    return {
        "top_k": m.top_k,
        "score": m.score,
        "n_group": m.n_group,
        "topk_group": m.topk_group,
        "scale": m.routed_scale,
    }


def grouped(m: Model):
    """Hugging Face's DeepseekV3TopkRouter after its matmul: weights, ids, and the scores that ordered them."""

    def run(logits, bias):
        scores = logits.float().sigmoid()
        choice = scores + bias
        per_group = m.experts // m.n_group
        groups = choice.view(-1, m.n_group, per_group).topk(2, dim=-1)[0].sum(dim=-1)
        best = torch.topk(groups, k=m.topk_group, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(groups).scatter_(1, best, 1)
        mask = mask.unsqueeze(-1).expand(-1, m.n_group, per_group).reshape(-1, m.experts)
        choice = choice.masked_fill(~mask.bool(), float("-inf"))
        ids = torch.topk(choice, k=m.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * m.routed_scale
        return weights, ids, choice

    return run


def ungrouped(logits, bias):
    """The same without groups."""
    m = DEEPSEEK_V3
    scores = logits.float().sigmoid()
    choice = scores + bias
    ids = torch.topk(choice, k=m.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * m.routed_scale, ids, choice


def in_order(out):
    """Its choices in the order of ours, largest first: the router leaves them unsorted."""
    weights, ids, choice, *_ = out
    return weights.gather(1, choice.gather(1, ids).argsort(dim=-1, descending=True, stable=True))


def softmaxed(m: Model):
    """Qwen3MoeTopKRouter and Mixtral's after their matmul."""

    def run(logits):
        values, ids = torch.topk(logits.softmax(-1, dtype=torch.float32), m.top_k, dim=-1)
        return values / values.sum(-1, keepdim=True), ids

    return run


def sort_slots(ids, experts: int):
    """What Hugging Face's grouped experts do with ids, and the inverse: order, inverse, offsets."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=ids.device)
    # as Hugging Face counts: bincount would wait for the device
    values = flat.float() if flat.device.type == "cpu" else flat.int()
    counts = torch.histc(values, bins=experts, min=0, max=experts - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    return order, inverse, torch.nn.functional.pad(offsets, (1, 0))


def cases() -> Iterator[Case]:
    d = DEEPSEEK_V3
    for tokens, plan in ((1, True), (4096, True), (32768, True), (32768, False)):

        def inputs(device, generator, tokens=tokens):
            logits = normal((tokens, d.experts), torch.float32, device, generator)
            return logits, normal((d.experts,), torch.float32, device, generator, 0.05)

        route = grouped(d)

        def run(logits, bias, plan=plan):
            weights, ids = tilefuse.moe_route(logits, bias, **options(d))
            return (weights, ids, *tilefuse.moe_plan(ids, d.experts)) if plan else (weights, ids)

        def eager(logits, bias, plan=plan, route=route):
            out = route(logits, bias)
            return (*out, *sort_slots(out[1], d.experts)) if plan else out

        slots = tokens * d.top_k
        yield Case(
            op="moe_route",
            name=f"{d.name}, {tokens} tokens" + (", with moe_plan" if plan else ""),
            dtype="float32",
            inputs=inputs,
            run=run,
            # the reference on the same float32 logits: wider ones would break ties that float32 scores have
            upcast=(),
            naive=lambda *args, route=route: (in_order(route(*args)),),
            peers={
                "eager": Peer(eager, post=in_order),
                "torch.compile": Peer(eager, post=in_order, compile=True),
            },
            # logits in, weights and ids out; the plan: ids in, order, inverse and offsets out
            bytes=4 * (tokens * d.experts + 2 * slots) + (4 * (3 * slots + d.experts) if plan else 0),
            call_cost=tokens == 1,
            suite="quick" if tokens == 4096 else "full",
            devices=("cpu", "cuda") if tokens <= 4096 else ("cuda",),
        )

    # DeepSeek-V3's widths without its groups, as Kimi-K2 and GLM-4.5 route
    flat = {"top_k": d.top_k, "score": d.score, "scale": d.routed_scale}
    for tokens in (1, 4096):

        def inputs(device, generator, tokens=tokens):
            logits = normal((tokens, d.experts), torch.float32, device, generator)
            return logits, normal((d.experts,), torch.float32, device, generator, 0.05)

        yield Case(
            op="moe_route",
            name=f"sigmoid and bias, 256 experts, top 8, {tokens} tokens",
            dtype="float32",
            inputs=inputs,
            run=lambda logits, bias: tilefuse.moe_route(logits, bias, **flat),
            upcast=(),
            naive=lambda *args: (in_order(ungrouped(*args)),),
            peers={
                "eager": Peer(ungrouped, post=in_order),
                "torch.compile": Peer(ungrouped, post=in_order, compile=True),
                "SGLang": vllm.biased_topk_cpu(d.top_k, d.routed_scale),
            },
            bytes=4 * tokens * (d.experts + 2 * d.top_k),
            call_cost=tokens == 1,
            suite="quick",
        )

    for m, tokens, mode in (
        (QWEN3_30B_A3B, 4096, "forward"),
        (QWEN3_30B_A3B, 4096, "backward"),
        (MIXTRAL_8X7B, 4096, "forward"),
    ):

        def inputs(device, generator, m=m, tokens=tokens):
            return (normal((tokens, m.experts), torch.float32, device, generator),)

        plain = softmaxed(m)
        slots = tokens * m.top_k
        logits = tokens * m.experts
        yield Case(
            op="moe_route",
            name=f"{m.name}, {tokens} tokens",
            dtype="float32",
            mode=mode,
            inputs=inputs,
            run=lambda logits, m=m: tilefuse.moe_route(logits, **options(m)),
            upcast=(),
            peers={"eager": plain, "torch.compile": Peer(plain, compile=True)},
            grads=(0,),
            bytes=4 * (logits + 2 * slots) if mode == "forward" else 4 * (2 * logits + 2 * slots),
        )
