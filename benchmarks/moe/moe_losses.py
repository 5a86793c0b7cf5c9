"""Balancing losses and the bias step of balancing without a loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B

M = QWEN3_30B_A3B


def switch_loss(dtype):
    """Hugging Face's load_balancing_loss_func without its factor k."""

    def run(logits, ids):
        scores = logits.softmax(-1, dtype=dtype)
        # [T, k, E] -> share of each expert per choice
        chosen = F.one_hot(ids.long(), M.experts).to(scores.dtype).mean(0).sum(0)
        return (chosen * scores.mean(0)).sum() * M.experts / M.top_k

    return run


def z_loss(dtype):
    def run(logits):
        return logits.to(dtype).logsumexp(-1).square().mean()

    return run


def bias_step(bias, counts):
    counts = counts.float()
    return bias + 1e-3 * torch.sign(counts.mean() - counts)


def cases() -> Iterator[Case]:
    for tokens, mode, suite, devices in (
        (4096, "forward", "quick", ("cpu", "cuda")),
        (4096, "forward+backward", "full", ("cpu", "cuda")),
        (32768, "forward+backward", "full", ("cuda",)),
    ):

        def logits_of(device, generator, tokens=tokens):
            return (normal((tokens, M.experts), torch.bfloat16, device, generator),)

        def with_ids(device, generator, logits_of=logits_of):
            (logits,) = logits_of(device, generator)
            return logits, logits.topk(M.top_k, -1).indices.int()

        logits = 2 * tokens * M.experts
        for op, inputs, run, peer, extra in (
            ("moe_balance_loss", with_ids, tilefuse.moe_balance_loss, switch_loss, 4 * tokens * M.top_k),
            ("moe_z_loss", logits_of, tilefuse.moe_z_loss, z_loss, 0),
        ):
            eager = peer(torch.float32)
            yield Case(
                op=op,
                name=f"{M.name}, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs,
                run=run,
                # the losses compute in float32: plain bfloat16 is the lower precision to compare with
                naive=peer(torch.bfloat16),
                peers={"eager": eager, "torch.compile": compiled(eager)},
                grads=(0,),
                bytes=logits * (1 if mode == "forward" else 2) + extra,
                reads=mode == "forward",
                suite=suite,
                devices=devices,
            )

    d = DEEPSEEK_V3

    def counts(device, generator):
        bias = normal((d.experts,), torch.float32, device, generator, 0.1)
        return bias, torch.randint(0, 4096, (d.experts,), generator=generator, device=device, dtype=torch.int32)

    yield Case(
        op="moe_update_bias",
        name=f"{d.name}, one layer",
        dtype="float32",
        inputs=counts,
        run=tilefuse.moe_update_bias,
        exact=True,
        peers={"eager": bias_step, "torch.compile": Peer(bias_step, compile=True)},
        bytes=3 * 4 * d.experts,
        call_cost=True,
        suite="quick",
    )
