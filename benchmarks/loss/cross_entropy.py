"""The loss of logits that exist already: forward and backward, time and peak memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

import tilefuse
from tilefuse.testing.inputs.loss.cross_entropy import naive

from .. import peers
from ..harness import Case, Peer, compiled
from .logprobs import least_bytes, logits_of


def eager(logits, target):
    """As Hugging Face's trainers call it."""
    return F.cross_entropy(logits.float(), target)


def liger():
    functional = peers.import_module("liger-kernel", "liger_kernel.transformers.functional")
    # on a copy: it writes the gradient over the logits, which the next round needs
    return lambda logits, target: functional.liger_cross_entropy(logits.clone(), target)


# (tokens, vocabulary, mode, suite, devices)
SHAPES = (
    (512, 32000, "forward", "full", ("cpu", "cuda")),
    (512, 32000, "forward+backward", "quick", ("cpu", "cuda")),
    (4096, 129280, "forward+backward", "full", ("cuda",)),
)


def cases() -> Iterator[Case]:
    for tokens, vocabulary, mode, suite, devices in SHAPES:
        yield Case(
            op="cross_entropy",
            name=f"{tokens} tokens, vocabulary {vocabulary}",
            dtype="bfloat16",
            mode=mode,
            inputs=logits_of(tokens, vocabulary),
            oracle_inputs=logits_of(64, 5000),
            run=tilefuse.cross_entropy,
            naive=naive,
            peers={
                "eager": eager,
                "torch.compile": compiled(eager),
                # its loss is bfloat16
                "F.cross_entropy in bfloat16": Peer(fn=F.cross_entropy, tolerance=None),
                "Liger": Peer(load=liger, devices=("cuda",), package="liger-kernel"),
            },
            grads=(0,),
            bytes=least_bytes(tokens, vocabulary, mode),
            reads=mode == "forward",
            suite=suite,
            devices=devices,
            memory=True,
        )
