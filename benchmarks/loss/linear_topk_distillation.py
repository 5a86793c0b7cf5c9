"""Distillation of a head from 64 log-probabilities of its teacher: forward and backward, time and peak memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse
from tilefuse.testing.inputs.loss.linear_topk_distillation import naive

from ..harness import Case, compiled, normal
from .linear_logprobs import head, work

LISTED = 64


def eager(x, weight, teacher_logp, teacher_ids, target):
    """As trainers write it: logits in float32, the rest of the student's mass as 1 - P, ignored tokens times 0."""
    logp = (x @ weight.t()).float().log_softmax(-1).gather(-1, teacher_ids)
    rest = torch.log1p(-logp.exp().sum(-1).clamp(max=1 - 1e-7))
    teacher_rest = torch.log1p(-teacher_logp.exp().sum(-1))
    losses = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1) + teacher_rest.exp() * (teacher_rest - rest)
    kept = target != -100
    return (losses * kept).sum() / kept.sum()


def inputs(tokens, vocabulary, hidden):
    """Those of a head, whose teacher is not far from it."""
    of_head = head(tokens, vocabulary, hidden)

    def make(device, generator):
        x, weight, target = of_head(device, generator)
        logp, ids = [], []
        # in parts: all logits would be the largest tensor by far
        for part in x.split(256):
            noise = normal((part.shape[0], vocabulary), torch.float32, device, generator, 0.5)
            listed = ((part @ weight.t()).float() + noise).log_softmax(-1).topk(LISTED)
            logp.append(listed.values)
            ids.append(listed.indices)
        return x, weight, torch.cat(logp), torch.cat(ids), target

    return make


# (tokens, vocabulary, hidden, mode, suite, devices)
SHAPES = (
    (256, 8192, 512, "forward", "full", ("cpu", "cuda")),
    (256, 8192, 512, "forward+backward", "quick", ("cpu", "cuda")),
    (512, 32000, 1024, "forward+backward", "full", ("cpu", "cuda")),
    (4096, 129280, 7168, "forward+backward", "full", ("cuda",)),
)


def cases() -> Iterator[Case]:
    for tokens, vocabulary, hidden, mode, suite, devices in SHAPES:
        least, flops = work(tokens, vocabulary, hidden, mode)
        yield Case(
            op="linear_topk_distillation",
            name=f"{tokens} tokens, {LISTED} of vocabulary {vocabulary}, hidden {hidden}",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs(tokens, vocabulary, hidden),
            oracle_inputs=inputs(64, 5000, 256),
            run=tilefuse.linear_topk_distillation,
            naive=naive,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            grads=(0, 1),
            bytes=least,
            flops=flops,
            suite=suite,
            devices=devices,
            memory=True,
        )
