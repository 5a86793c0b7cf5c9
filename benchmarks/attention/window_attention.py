"""Sliding-window attention against FlexAttention, masked SDPA and, on a GPU, FlashAttention; growth with the length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import GPT_OSS_20B


def visible_pairs(length: int, left: int) -> int:
    """Query-key pairs of a causal window."""
    full = min(left + 1, length)
    return full * (full + 1) // 2 + (length - full) * full


def masked_sdpa(left: int):
    """Scaled dot-product attention with a dense mask, made outside of the timing."""

    def prepare(q, k, v):
        i = torch.arange(q.shape[1], device=q.device)
        offset = i[:, None] - i[None, :]
        return *(x.transpose(1, 2) for x in (q, k, v)), (offset >= 0) & (offset <= left)

    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return Peer(run, prepare=prepare, post=lambda out: out.transpose(1, 2))


def flex(left: int):
    """Compiled FlexAttention with its block mask, made outside of the timing."""

    def load():
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)

        def run(q, k, v, mask):
            return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

        return run

    def prepare(q, k, v):
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b, h, i, j):
            return (i >= j) & (i - j <= left)

        mask = create_block_mask(rule, None, None, q.shape[1], k.shape[1], device=q.device)
        return *(x.transpose(1, 2) for x in (q, k, v)), mask

    return Peer(load=load, prepare=prepare, post=lambda out: out.transpose(1, 2))


def flash(left: int):
    def load():
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(left, 0))

    return Peer(load=load, devices=("cuda",))


def dense(left: int):
    """The plain computation: scores, mask, softmax, product, in the inputs' dtype."""

    def run(q, k, v):
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        i = torch.arange(q.shape[2], device=q.device)
        offset = i[:, None] - i[None, :]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill((offset < 0) | (offset > left), float("-inf"))
        return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)

    return run


def case(name, batch, length, heads, kv_heads, dim, window, mode, *, suite="full", devices=("cpu", "cuda"), peers=True):
    left = window - 1

    def make(length):
        def inputs(device, generator):
            return tuple(
                normal((batch, length, h, dim), torch.bfloat16, device, generator) for h in (heads, kv_heads, kv_heads)
            )

        return inputs

    def run(q, k, v):
        return tilefuse.window_attention(q, k, v, window=(left, 0))[0]

    of_q, of_k = (2 * batch * length * h * dim for h in (heads, kv_heads))
    pairs = batch * heads * visible_pairs(length, left)
    # forward reads q, k, v and writes out; backward reads those and dout, and writes three gradients
    traffic, products = (2 * of_q + 2 * of_k, 2) if mode == "forward" else (4 * of_q + 4 * of_k, 5)
    return Case(
        op="window_attention",
        name=name,
        dtype="bfloat16",
        mode=mode,
        inputs=make(length),
        oracle_inputs=make(min(length, 1024)),
        run=run,
        naive=dense(left),
        peers={"masked SDPA": masked_sdpa(left), "FlexAttention": flex(left), "FlashAttention": flash(left)}
        if peers
        else {},
        grads=(0, 1, 2),
        bytes=traffic,
        flops=2 * products * pairs * dim,
        suite=suite,
        devices=devices,
    )


def cases() -> Iterator[Case]:
    for mode in ("forward", "backward"):
        yield case("8 heads of 64, 4096 tokens, window 512", 1, 4096, 8, 8, 64, 512, mode, suite="quick")
        m = GPT_OSS_20B
        name = f"{m.name}, 4096 tokens, window {m.window}"
        yield case(name, 1, 4096, m.heads, m.kv_heads, m.head_dim, m.window, mode, devices=("cuda",))
        for window in (128, 512, 1024, 4096):
            for dim in (64, 128):
                name = f"16 heads of {dim}, 16384 tokens, window {window}"
                yield case(name, 4, 16384, 16, 16, dim, window, mode, devices=("cuda",))
    # time at a fixed window grows with the length, not with its square
    for length in (4096, 8192, 16384, 32768, 65536):
        yield case(
            f"growth: 2 heads of 64, {length} tokens, window 512", 1, length, 2, 2, 64, 512, "forward", peers=False
        )
