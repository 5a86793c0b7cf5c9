"""Log-probabilities of targets from logits that exist already."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse
from tilefuse.testing.inputs.loss.logprobs import naive

from ..harness import Case, compiled, normal
from .linear_logprobs import kept_of, statistics, targets


def eager(logits, target):
    return statistics(logits.float(), target)


def logits_of(tokens, vocabulary):
    """Logits of about the spread of a trained model's, and targets."""

    def inputs(device, generator):
        logits = normal((tokens, vocabulary), torch.bfloat16, device, generator)
        return logits, targets(tokens, vocabulary, device, generator)

    return inputs


def least_bytes(tokens, vocabulary, mode):
    """Kept rows read once in each direction, every row's gradient written."""
    read = 2 * vocabulary * kept_of(tokens)
    backward = read + 2 * vocabulary * tokens
    return {"forward": read, "backward": backward, "forward+backward": read + backward}[mode]


# (tokens, vocabulary, mode, suite, devices)
SHAPES = (
    (512, 32000, "forward", "quick", ("cpu", "cuda")),
    (512, 32000, "forward+backward", "full", ("cpu", "cuda")),
    (8, 151936, "forward", "full", ("cpu", "cuda")),
    (4096, 129280, "forward", "full", ("cuda",)),
)


def cases() -> Iterator[Case]:
    for tokens, vocabulary, mode, suite, devices in SHAPES:
        yield Case(
            op="logprobs",
            name=f"{tokens} tokens, vocabulary {vocabulary}",
            dtype="bfloat16",
            mode=mode,
            inputs=logits_of(tokens, vocabulary),
            oracle_inputs=logits_of(64, 5000),
            run=tilefuse.logprobs,
            naive=naive,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            grads=(0,),
            bytes=least_bytes(tokens, vocabulary, mode),
            reads=mode == "forward",
            suite=suite,
            devices=devices,
            memory=True,
        )
