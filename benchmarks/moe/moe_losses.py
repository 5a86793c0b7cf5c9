"""The balance loss, against Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import QWEN3_30B_A3B as M


def eager(logits, ids):
    """Hugging Face's formula: one-hot choices, mean scores."""
    hot = torch.nn.functional.one_hot(ids.long(), logits.shape[1]).float()
    share, score = hot.mean(0), logits.softmax(-1, dtype=torch.float32).mean(0)
    return (share * score).sum() * logits.shape[1]


def hugging_face():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    def run(logits, ids):
        return load_balancing_loss_func((logits,), logits.shape[1], ids.shape[1])

    return run


def cases() -> Iterator[Case]:
    for tokens in (4096, 32768):

        def inputs(device, generator, tokens=tokens):
            logits = normal((tokens, M.experts), torch.float32, device, generator)
            return logits, logits.topk(M.top_k, dim=-1)[1].int()

        def run(logits, ids):
            return tilefuse.moe_balance_loss(logits, ids, normalization="topk")

        for mode in ("forward", "backward"):
            yield Case(
                op="moe_balance_loss",
                name=f"{M.name}, {tokens} tokens",
                dtype="float32",
                mode=mode,
                inputs=inputs,
                run=run,
                peers={"eager": eager, "Hugging Face": Peer(load=hugging_face)},
                upcast=(0,),
                grads=(0,),
                bytes=tokens * M.experts * 4,
                suite="quick" if tokens == 4096 and mode == "forward" else "full",
            )
