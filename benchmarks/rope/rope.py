"""Rotary embedding of q and k: prefill and training shapes by bandwidth, one decode token by call cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import DEEPSEEK_V3, LLAMA3_8B


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def eager_qk(q, k, cos, sin):
    """Hugging Face's apply_rotary_pos_emb: tables of full width in the model's dtype."""
    cos, sin = (torch.cat((t, t), -1)[: q.shape[0], None].to(q.dtype) for t in (cos, sin))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_x(x, cos, sin):
    """DeepSeek's interleaved form through complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[: x.shape[0], None]).flatten(-2).to(x.dtype)


def copy(q, k, cos, sin):
    return q.clone(), k.clone()


def liger():
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(q, k, cos, sin):
        return LigerRopeFunction.apply(q, k, cos, sin)

    return run


def liger_inputs(q, k, cos, sin):
    # batch first, heads before tokens; it rotates its arguments in place, so they are copies
    cos, sin = (torch.cat((t, t), -1)[None, : q.shape[0]].to(q.dtype) for t in (cos, sin))
    return q.transpose(0, 1)[None].clone(), k.transpose(0, 1)[None].clone(), cos, sin


def liger_outputs(out):
    return tuple(t[0].transpose(0, 1) for t in out)


def cases() -> Iterator[Case]:
    m = LLAMA3_8B
    for tokens in (1, 128, 4096, 16384):

        def inputs(device, generator, tokens=tokens):
            q = normal((tokens, m.heads, m.head_dim), torch.bfloat16, device, generator)
            k = normal((tokens, m.kv_heads, m.head_dim), torch.bfloat16, device, generator)
            return q, k, *tilefuse.rope_tables(m.head_dim, tokens, base=m.rope_theta, device=device)

        size = 2 * tokens * (m.heads + m.kv_heads) * m.head_dim
        for mode in ("forward", "backward"):
            if tokens == 1 and mode == "backward":
                continue
            yield Case(
                op="rope_qk",
                name=f"{m.name}, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs,
                run=tilefuse.rope_qk,
                peers={
                    "eager": eager_qk,
                    "torch.compile": compiled(eager_qk),
                    "copy of q and k": Peer(copy, yardstick=True),
                    "Liger": Peer(load=liger, prepare=liger_inputs, post=liger_outputs, devices=("cuda",)),
                },
                grads=(0, 1),
                upcast=(0, 1),
                bytes=2 * size + tokens * m.head_dim * 4,
                call_cost=tokens == 1,
                suite="quick" if tokens in (1, 4096) else "full",
                devices=("cpu", "cuda") if tokens <= 4096 else ("cuda",),
            )

    d = DEEPSEEK_V3
    for tokens in (1, 4096):

        def inputs(device, generator, tokens=tokens):
            x = normal((tokens, d.heads, d.rope_dim), torch.bfloat16, device, generator)
            return x, *tilefuse.rope_tables(d.rope_dim, tokens, device=device)

        yield Case(
            op="rope",
            name=f"{d.name} query, interleaved, {tokens} tokens",
            dtype="bfloat16",
            inputs=inputs,
            run=lambda x, cos, sin: tilefuse.rope(x, cos, sin, interleaved=True),
            peers={"eager": eager_x, "torch.compile": compiled(eager_x)},
            upcast=(0,),
            bytes=2 * 2 * tokens * d.heads * d.rope_dim + tokens * d.rope_dim * 4,
            call_cost=tokens == 1,
            suite="quick" if tokens == 4096 else "full",
        )
