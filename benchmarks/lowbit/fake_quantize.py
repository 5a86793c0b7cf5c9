"""Fake quantisation of weights (own scales, learnt scales) and of activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import LLAMA3_8B as M

EPS = 1e-12


def through(rounded, x):
    """The value of one and the gradient of the other."""
    return x + (rounded - x).detach()


def own(x):
    """4 bits in groups of 128, detached scales: as quantisation-aware training of weights writes it."""
    groups = x.float().unflatten(-1, (-1, 128))
    amax = groups.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax.clamp(min=EPS) / torch.full_like(amax, 7))
    return through((groups / scale).clamp(-7, 7).round() * scale, groups).flatten(-2).to(x.dtype)


def given(x, scale):
    """4 bits in groups of 128 with scales that learn (LSQ)."""
    groups = x.float().unflatten(-1, (-1, 128))
    y = (groups / scale[..., None]).clamp(-7, 7)
    return (through(y.round(), y) * scale[..., None]).flatten(-2).to(x.dtype)


def tokens(x):
    """8 bits with a zero, one scale per row."""
    wide = x.float()
    low, high = wide.detach().aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(high == low, 1.0, (high - low).clamp(min=EPS) / torch.full_like(high, 255))
    zero = (-low / scale).round().clamp(0, 255)
    code = through((wide / scale).round(), wide / scale) + zero
    return ((code.clamp(0, 255) - zero) * scale).to(x.dtype)


def matrix(rows: int, columns: int, scaled: bool = False):
    def inputs(device, generator):
        x = normal((rows, columns), torch.bfloat16, device, generator)
        if not scaled:
            return (x,)
        return x, torch.rand((rows, columns // 128), device=device, generator=generator) * 0.1 + 0.3

    return inputs


def cases() -> Iterator[Case]:
    k = M.hidden
    size = 2 * k * k
    yield Case(
        op="fake_quantize",
        name=f"{M.name} projection, {k} x {k}, 4 bits, groups of 128",
        dtype="bfloat16",
        inputs=matrix(k, k),
        oracle_inputs=matrix(256, k),
        run=tilefuse.fake_quantize,
        peers={"eager": own, "torch.compile": compiled(own)},
        bytes=2 * size,
        suite="quick",
    )
    for mode, times in (("forward", 2), ("forward+backward", 5)):
        yield Case(
            op="fake_quantize",
            name=f"{M.name} projection, {k} x {k}, 4 bits, groups of 128, scales that learn",
            dtype="bfloat16",
            mode=mode,
            inputs=matrix(k, k, scaled=True),
            oracle_inputs=matrix(256, k, scaled=True),
            run=tilefuse.fake_quantize,
            peers={"eager": given, "torch.compile": compiled(given)},
            grads=(0, 1),
            bytes=times * size,
        )
        yield Case(
            op="fake_quantize",
            name=f"{M.name} hidden, 1024 x {k}, 8 bits per token, asymmetric",
            dtype="bfloat16",
            mode=mode,
            inputs=matrix(1024, k),
            oracle_inputs=matrix(256, k),
            run=lambda x: tilefuse.fake_quantize(x, bits=8, group_size=0, symmetric=False),
            peers={"eager": tokens, "torch.compile": compiled(tokens)},
            grads=(0,),
            bytes=(times - times // 5) * 2 * 1024 * k,
        )
