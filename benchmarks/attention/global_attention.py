"""Longformer's attention: window and scattered global tokens, against FlexAttention and Hugging Face's chunked code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import LONGFORMER_BASE

# FlexAttention has no projections of their own for global rows: the comparison shares one set


def is_global(q, index):
    return torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device).scatter_(1, index, True)


def masked_sdpa(side):
    def prepare(q, k, v, index):
        i = torch.arange(q.shape[1], device=q.device)
        chosen = is_global(q, index)
        mask = ((i[:, None] - i[None, :]).abs() <= side) | chosen[:, None, :] | chosen[:, :, None]
        return *(x.transpose(1, 2) for x in (q, k, v)), mask[:, None]

    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Peer(run, prepare=prepare, post=lambda out: out.transpose(1, 2))


def flex(side):
    def load():
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v, mask: compiled(q, k, v, block_mask=mask)

    def prepare(q, k, v, index):
        from torch.nn.attention.flex_attention import create_block_mask

        chosen = is_global(q, index)

        def rule(b, h, i, j):
            return ((i - j).abs() <= side) | chosen[b, i] | chosen[b, j]

        mask = create_block_mask(rule, q.shape[0], None, q.shape[1], k.shape[1], device=q.device)
        return *(x.transpose(1, 2) for x in (q, k, v)), mask

    return Peer(load=load, prepare=prepare, post=lambda out: out.transpose(1, 2))


def dense(side):
    def run(q, k, v, index):
        i = torch.arange(q.shape[1], device=q.device)
        chosen = is_global(q, index)
        mask = ((i[:, None] - i[None, :]).abs() <= side) | chosen[:, None, :] | chosen[:, :, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).masked_fill(~mask[:, None], float("-inf"))
        return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)

    return run


def case(length, count, mode, *, suite="full", devices=("cpu", "cuda")):
    m = LONGFORMER_BASE
    side = m.window // 2

    def make(length):
        def inputs(device, generator):
            q, k, v = (normal((1, length, m.heads, m.head_dim), torch.bfloat16, device, generator) for _ in range(3))
            return q, k, v, torch.randperm(length, device=device, generator=generator)[None, : min(count, length // 8)]

        return inputs

    def run(q, k, v, index):
        return tilefuse.global_attention(q, k, v, index, window=(side, side))[0]

    pairs = m.heads * (length * (2 * side + 1) - side * (side + 1) + 2 * count * length)
    size = 2 * length * m.heads * m.head_dim
    traffic, products = (4 * size, 2) if mode == "forward" else (8 * size, 5)
    return Case(
        op="global_attention",
        name=f"{m.name}, {length} tokens, {count} scattered globals",
        dtype="bfloat16",
        mode=mode,
        inputs=make(length),
        oracle_inputs=make(min(length, 1024)),
        upcast=(0, 1, 2),
        run=run,
        naive=dense(side),
        peers={"masked SDPA": masked_sdpa(side), "FlexAttention": flex(side)},
        grads=(0, 1, 2),
        bytes=traffic,
        # what band and globals share is at most all globals twice over
        flops=2
        * products
        * max(0, pairs - 3 * m.heads * count * (2 * side + 1) - m.heads * count * count)
        * m.head_dim,
        suite=suite,
        devices=devices,
    )


def cases() -> Iterator[Case]:
    for mode in ("forward", "backward"):
        yield case(4096, 16, mode, suite="quick" if mode == "forward" else "full")
        for count in (1, 128):
            yield case(16384, count, mode, devices=("cuda",))
