"""The Jensen-Shannon divergence of two models' logits, forward and with the student's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse
from tilefuse.testing.inputs.loss.distillation import naive

from ..harness import Case, compiled, normal
from .linear_logprobs import kept_of, targets


def eager(logits, teacher_logits, target):
    """As trainers write it (TRL's GKD): log-softmaxes in float32, their mixture by logaddexp, ignored tokens masked."""
    log_s, log_t = (z.float().log_softmax(-1) for z in (logits, teacher_logits))
    half = torch.tensor(0.5, device=logits.device).log()
    log_m = torch.logaddexp(log_s + half, log_t + half)
    terms = 0.5 * log_t.exp() * (log_t - log_m) + 0.5 * log_s.exp() * (log_s - log_m)
    keep = target != -100
    return (terms.sum(-1) * keep).sum() / keep.sum()


# (tokens, vocabulary, mode, suite, devices)
SHAPES = (
    (256, 8192, "forward", "full", ("cpu", "cuda")),
    (256, 8192, "forward+backward", "quick", ("cpu", "cuda")),
    (512, 32000, "forward+backward", "full", ("cpu", "cuda")),
    (4096, 129280, "forward+backward", "full", ("cuda",)),
)


def rows(tokens, vocabulary):
    def inputs(device, generator):
        logits = normal((tokens, vocabulary), torch.bfloat16, device, generator, 2.0)
        teacher = logits + normal((tokens, vocabulary), torch.bfloat16, device, generator)
        return logits, teacher, targets(tokens, vocabulary, device, generator)

    return inputs


def cases() -> Iterator[Case]:
    for tokens, vocabulary, mode, suite, devices in SHAPES:
        kept = kept_of(tokens)
        # both sides are read once in each direction, and the gradient is written
        passes, writes = (2, tokens) if "backward" in mode else (1, 0)
        yield Case(
            op="distillation",
            name=f"{tokens} tokens, vocabulary {vocabulary}",
            dtype="bfloat16",
            mode=mode,
            inputs=rows(tokens, vocabulary),
            oracle_inputs=rows(64, 5000),
            run=tilefuse.distillation,
            naive=naive,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            grads=(0,),
            bytes=2 * vocabulary * (passes * 2 * kept + writes),
            suite=suite,
            devices=devices,
            memory=True,
        )
