"""Integer codes of weights and activations, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..fp8.quantize import copy, values
from ..harness import Case, Peer, compiled
from ..shapes import LLAMA3_8B as M

EPS = 1e-12


def scaled(groups, qmax):
    """The exact rule on float32 groups: what codes are above their zero, and scales."""
    amax = torch.where(groups.isfinite(), groups.abs(), 0.0).amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax.clamp(min=EPS) / torch.full_like(amax, qmax))
    return (groups / scale).clamp(-qmax, qmax).round(), scale


def tokens(x):
    """8 bits, one scale per row."""
    level, scale = scaled(x.float(), 127)
    return level.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.uint8)


def nibbles(x):
    """4 bits in groups of 128 of [N, K]."""
    level, scale = scaled(x.float().unflatten(-1, (-1, 128)), 7)
    code = (level + 8).to(torch.uint8).flatten(-2)
    scale = scale[..., 0]
    return code[:, ::2] | code[:, 1::2] << 4, scale, torch.full_like(scale, 8, dtype=torch.uint8)


def widen(q, scale, zero):
    codes = torch.stack((q & 15, q >> 4), -1).flatten(-2).float().unflatten(-1, (-1, 128))
    return ((codes - zero[..., None]) * scale[..., None]).flatten(-2).bfloat16()


def quantised(rows: int, columns: int):
    def inputs(device, generator):
        return tilefuse.int_quantize(*values(rows, columns)(device, generator), bits=4, group_size=128)

    return inputs


def cases() -> Iterator[Case]:
    k = M.hidden
    for rows, suite in ((1024, "quick"), (1, "full")):
        yield Case(
            op="int_quantize",
            name=f"{M.name} hidden, {rows} x {k}, 8 bits per token",
            dtype="bfloat16",
            inputs=values(rows, k),
            oracle_inputs=values(256, k) if rows > 256 else None,
            run=tilefuse.int_quantize,
            exact=True,
            naive=tokens,
            peers={"eager": tokens, "torch.compile": compiled(tokens), "copy": Peer(copy, yardstick=True)},
            bytes=rows * (3 * k + 5),
            call_cost=rows == 1,
            suite=suite,
        )
    groups = k * (k // 128)
    yield Case(
        op="int_quantize",
        name=f"{M.name} projection, {k} x {k}, 4 bits, groups of 128",
        dtype="bfloat16",
        inputs=values(k, k),
        oracle_inputs=values(256, k),
        run=lambda x: tilefuse.int_quantize(x, bits=4, group_size=128),
        exact=True,
        naive=nibbles,
        peers={"eager": nibbles, "torch.compile": compiled(nibbles), "copy": Peer(copy, yardstick=True)},
        bytes=k * k * 5 // 2 + 5 * groups,
        suite="quick",
    )
    yield Case(
        op="int_dequantize",
        name=f"{M.name} projection, {k} x {k}, 4 bits, groups of 128",
        dtype="uint8",
        inputs=quantised(k, k),
        oracle_inputs=quantised(256, k),
        run=lambda q, scale, zero: tilefuse.int_dequantize(q, scale, zero, bits=4, group_size=128),
        exact=True,
        naive=widen,
        peers={"eager": widen, "torch.compile": compiled(widen)},
        bytes=k * k * 5 // 2 + 5 * groups,
        suite="quick",
    )
