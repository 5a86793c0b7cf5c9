"""A linear layer whose three matrix products run in FP8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import DEEPSEEK_V3 as M
from .matmul import expanded
from .quantize import rows, tiles


def fake(x):
    """Quantised 1 x 128 and back."""
    return expanded(*rows(x), torch.bfloat16)


class Emulated(torch.autograd.Function):
    """The same quantisations in eager PyTorch, the products in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(fake(x), expanded(*tiles(weight), torch.bfloat16))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        # the gradient of the weight runs along the tokens
        return fake(grad) @ expanded(*tiles(weight), torch.bfloat16), fake(grad.t()) @ fake(x.t()).mT


def eager(x, weight):
    return Emulated.apply(x, weight)


def inputs_of(tokens: int, n: int, k: int):
    def inputs(device, generator):
        x = normal((tokens, k), torch.bfloat16, device, generator)
        return x, normal((n, k), torch.bfloat16, device, generator, k**-0.5)

    return inputs


def cases() -> Iterator[Case]:
    for tokens, n, k, mode, suite, devices in (
        (256, 2048, 2048, "forward", "quick", ("cpu", "cuda")),
        (256, 2048, 2048, "backward", "full", ("cpu", "cuda")),
        (8192, 4096, 7168, "forward", "full", ("cuda",)),
        (8192, 4096, 7168, "forward+backward", "full", ("cuda",)),
        (8192, 7168, 2048, "forward+backward", "full", ("cuda",)),
    ):
        products = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
        forward = 2 * (tokens * (n + k) + n * k)
        # the saved activation has one byte per element; reads the output gradient, writes both gradients
        backward = tokens * k + 2 * (tokens * (n + k) + 2 * n * k)
        yield Case(
            op="fp8_linear",
            name=f"{M.name}, {tokens} x {n} x {k}",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens, n, k),
            oracle_inputs=inputs_of(128, 256, 512),
            run=tilefuse.fp8_linear,
            peers={
                "eager": eager,
                # without quantisation: another result, and the time to beat
                "bfloat16 linear": Peer(F.linear, yardstick=True),
            },
            grads=(0, 1),
            bytes={"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode],
            flops=products * 2 * tokens * n * k,
            suite=suite,
            devices=devices,
        )
