"""Losses over pairs, and the log-probability of packed answers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, compiled, integers, normal


def dpo(dtype):
    """TRL's sigmoid loss and rewards."""

    def run(chosen, rejected, ref_chosen, ref_rejected):
        chosen, rejected, ref_chosen, ref_rejected = (x.to(dtype) for x in (chosen, rejected, ref_chosen, ref_rejected))
        logits = (chosen - rejected) - (ref_chosen - ref_rejected)
        return (
            -F.logsigmoid(0.1 * logits),
            0.1 * (chosen - ref_chosen).detach(),
            0.1 * (rejected - ref_rejected).detach(),
        )

    return run


def padded(dtype):
    """The sum of each row, as trainers take it from padded batches."""

    def run(logp, target):
        keep = target != -100
        return (logp.to(dtype) * keep).sum(-1)

    return run


def cases() -> Iterator[Case]:
    def pairs(device, generator):
        return tuple(-normal((256,), torch.float32, device, generator, 20.0).abs() for _ in range(4))

    eager = dpo(torch.float32)
    yield Case(
        op="preference_loss",
        name="DPO, 256 pairs",
        dtype="float32",
        inputs=pairs,
        run=tilefuse.preference_loss,
        naive=dpo(torch.bfloat16),
        peers={"eager": eager, "torch.compile": compiled(eager)},
        bytes=7 * 4 * 256,
        call_cost=True,
        suite="quick",
    )
    for batch, length in ((64, 2048),):

        def rows(device, generator, batch=batch, length=length):
            target = integers(0, 32000, (batch, length), device, generator)
            return -normal((batch, length), torch.float32, device, generator).abs(), target

        eager = padded(torch.float32)
        yield Case(
            op="sequence_logp",
            name=f"{batch} answers of {length} tokens",
            dtype="float32",
            inputs=rows,
            run=tilefuse.sequence_logp,
            naive=padded(torch.bfloat16),
            peers={"eager": eager, "torch.compile": compiled(eager)},
            bytes=8 * batch * length,
            reads=True,
            suite="quick",
        )
