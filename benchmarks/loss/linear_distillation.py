"""Distillation of a head, the student half as wide as its teacher: forward and backward, time and peak memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse
from tilefuse.testing.inputs.loss.linear_distillation import naive

from .. import peers
from ..harness import Case, Peer, compiled, normal
from . import distillation
from .linear_logprobs import head, kept_of


def eager(x, weight, teacher_x, teacher_weight, target):
    with torch.no_grad():
        teacher_logits = teacher_x @ teacher_weight.t()
    return distillation.eager(x @ weight.t(), teacher_logits, target)


def liger():
    module = peers.import_module("liger-kernel", "liger_kernel.chunked_loss")

    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=not torch.cuda.is_available(), ignore_index=-100
    )

    def run(x, weight, teacher_x, teacher_weight, target):
        return loss(x, weight, teacher_x, teacher_weight, target)

    return run


def heads(tokens, vocabulary, hidden):
    student = head(tokens, vocabulary, hidden)

    def inputs(device, generator):
        x, weight, target = student(device, generator)
        teacher_x = normal((tokens, 2 * hidden), torch.bfloat16, device, generator)
        teacher_weight = normal((vocabulary, 2 * hidden), torch.bfloat16, device, generator, (2 * hidden) ** -0.5)
        return x, weight, teacher_x, teacher_weight, target

    return inputs


# (tokens, vocabulary, hidden, mode, suite, devices)
SHAPES = (
    (256, 8192, 512, "forward", "full", ("cpu", "cuda")),
    (256, 8192, 512, "forward+backward", "quick", ("cpu", "cuda")),
    (512, 32000, 1024, "forward+backward", "full", ("cpu", "cuda")),
    (4096, 129280, 2048, "forward+backward", "full", ("cuda",)),
)


def cases() -> Iterator[Case]:
    for tokens, vocabulary, hidden, mode, suite, devices in SHAPES:
        kept = kept_of(tokens)
        backward = "backward" in mode
        # both heads once, and two products of the backward; the teacher's head is twice as wide
        products, written = (5, vocabulary + tokens) if backward else (3, 0)
        yield Case(
            op="linear_distillation",
            name=f"{tokens} tokens, vocabulary {vocabulary}, hidden {hidden}",
            dtype="bfloat16",
            mode=mode,
            inputs=heads(tokens, vocabulary, hidden),
            oracle_inputs=heads(64, 5000, 256),
            run=tilefuse.linear_distillation,
            naive=naive,
            peers={
                "eager": eager,
                "torch.compile": compiled(eager),
                # its log-softmaxes are of bfloat16
                "Liger": Peer(load=liger, package="liger-kernel", tolerance=None),
            },
            grads=(0, 1),
            bytes=2 * hidden * (3 * (vocabulary + kept) + written),
            flops=products * 2 * kept * vocabulary * hidden,
            suite=suite,
            devices=devices,
            memory=True,
        )
