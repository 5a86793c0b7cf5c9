"""GRPO's loss on the log-probabilities of sampled answers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal

OPTIONS = {"kl_beta": 0.04, "reduction": "sequence"}


def run(logp, advantages, old_logp, ref_logp, mask):
    return tilefuse.policy_loss(logp, advantages, old_logp, ref_logp, mask, **OPTIONS)[0]


def trl(dtype):
    """The formulas of TRL's GRPOTrainer (loss_type "grpo"), without what it logs."""

    def loss(logp, advantages, old_logp, ref_logp, mask):
        logp, advantages, old_logp, ref_logp = (x.to(dtype) for x in (logp, advantages, old_logp, ref_logp))
        mask = mask.to(dtype)
        advantages = advantages[:, None]
        ratio = torch.exp(logp - old_logp)
        clipped = torch.clamp(ratio, 0.8, 1.2)
        kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
        each = -torch.min(ratio * advantages, clipped * advantages) + 0.04 * kl
        size = mask.sum(-1).clamp(min=1.0)
        return ((each * mask).sum(-1) / size).mean()

    return loss


def cases() -> Iterator[Case]:
    for batch, length, mode, suite, devices in (
        (32, 1024, "forward+backward", "quick", ("cpu", "cuda")),
        (32, 1024, "forward", "full", ("cpu", "cuda")),
        (64, 8192, "forward+backward", "full", ("cpu", "cuda")),
    ):

        def inputs(device, generator, batch=batch, length=length):
            logp = -normal((batch, length), torch.float32, device, generator).abs()
            old, ref = (logp + normal((batch, length), torch.float32, device, generator, 0.1) for _ in range(2))
            advantages = normal((batch,), torch.float32, device, generator)
            lengths = torch.randint(length // 2, length, (batch, 1), generator=generator, device=device)
            return logp, advantages, old, ref, torch.arange(length, device=device) < lengths

        eager = trl(torch.float32)
        tokens = batch * length
        yield Case(
            op="policy_loss",
            name=f"GRPO, {batch} answers of up to {length} tokens",
            dtype="float32",
            mode=mode,
            inputs=inputs,
            run=run,
            naive=trl(torch.bfloat16),
            peers={"eager": eager, "torch.compile": compiled(eager)},
            grads=(0,),
            # three log-probabilities and the mask, twice with the gradient
            bytes=13 * tokens if mode == "forward" else 30 * tokens,
            reads=True,
            suite=suite,
            devices=devices,
        )
