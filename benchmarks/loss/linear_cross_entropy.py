"""The loss of a language model's head: forward and backward, time and peak memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse
from tilefuse.testing.inputs.loss.linear_cross_entropy import naive

from .. import peers
from ..harness import Case, Peer, compiled
from .linear_logprobs import head, work


def eager(x, weight, target):
    return F.cross_entropy((x @ weight.t()).float(), target)


def naive_kept(x, weight, target):
    """With gradients that the forward made, rounded, before the backward multiplies and rounds them again."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        loss = naive(*leaves, target)
        gradients = torch.autograd.grad(loss, leaves)
    loss = loss.detach()
    for t, gradient in zip((x, weight), gradients):
        loss = loss + ((t - t.detach()).to(loss.dtype) * gradient.to(loss.dtype)).sum()
    return loss


def torch_chunked():
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    return function


def cut_cross_entropy():
    module = peers.import_module("cut-cross-entropy", "cut_cross_entropy")
    return functools.partial(
        module.linear_cross_entropy, impl="torch_compile" if not torch.cuda.is_available() else "cce"
    )


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
        for recompute in (True, False) if mode != "forward" else (True,):
            yield Case(
                op="linear_cross_entropy",
                name=f"{tokens} tokens, vocabulary {vocabulary}, hidden {hidden}"
                + ("" if recompute else ", gradients in the forward"),
                dtype="bfloat16",
                mode=mode,
                inputs=head(tokens, vocabulary, hidden),
                oracle_inputs=head(64, 5000, 256),
                run=functools.partial(tilefuse.linear_cross_entropy, recompute=recompute),
                naive=naive if recompute else naive_kept,
                peers={
                    "eager": eager,
                    "torch.compile": compiled(eager),
                    # its loss is bfloat16
                    "F.linear_cross_entropy": Peer(load=torch_chunked, tolerance=None),
                    "cut-cross-entropy": Peer(load=cut_cross_entropy, package="cut-cross-entropy"),
                },
                grads=(0, 1),
                bytes=least,
                flops=flops,
                suite=suite,
                devices=devices,
                memory=True,
            )
