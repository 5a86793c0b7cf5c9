"""Rotary embedding of q and k: prefill and training shapes by bandwidth, one decode token by call cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from .. import peers
from ..harness import Case, Peer, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3, LLAMA3_8B

# position of the first token
FIRST = 7


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


def eager_qk_(q, k, cos, sin):
    for x, rotated in zip((q, k), eager_qk(q, k, cos, sin)):
        x.copy_(rotated)


def in_place(fn):
    """What ``fn`` wrote to, as its outputs: all but the tables."""

    def run(*args):
        fn(*args)
        return args[:-2]

    return run


def tables(dim: int, tokens: int, base: float, device):
    """Not from position 0 on, where nothing turns: a single token would show nothing."""
    return tuple(t[FIRST:] for t in tilefuse.rope_tables(dim, FIRST + tokens, base=base, device=device))


def copy(q, k, cos, sin):
    return q.clone(), k.clone()


def liger():
    LigerRopeFunction = peers.import_module("liger-kernel", "liger_kernel.ops.rope").LigerRopeFunction

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
            return q, k, *tables(m.head_dim, tokens, m.rope_theta, device)

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
                    "Liger": Peer(
                        load=liger, prepare=liger_inputs, post=liger_outputs, devices=("cuda",), package="liger-kernel"
                    ),
                    **({"vLLM": vllm.rotary_embedding(m.head_dim)} if tokens == 1 else {}),
                },
                grads=(0, 1),
                upcast=(0, 1),
                bytes=2 * size + tokens * m.head_dim * 4,
                call_cost=tokens == 1,
                suite="quick" if tokens in (1, 4096) else "full",
                devices=("cpu", "cuda") if tokens <= 4096 else ("cuda",),
            )
        if tokens in (1, 4096):
            yield Case(
                op="rope_qk_",
                name=f"{m.name}, {tokens} tokens, in place",
                dtype="bfloat16",
                inputs=inputs,
                run=in_place(tilefuse.rope_qk_),
                naive=eager_qk,
                peers={
                    "eager": in_place(eager_qk_),
                    "torch.compile": compiled(in_place(eager_qk_)),
                    "vLLM": vllm.rotary_embedding(m.head_dim),
                },
                upcast=(0, 1),
                bytes=2 * size + tokens * m.head_dim * 4,
                call_cost=tokens == 1,
                suite="quick",
            )

    d = DEEPSEEK_V3
    for tokens in (1, 4096):

        def inputs(device, generator, tokens=tokens):
            x = normal((tokens, d.heads, d.rope_dim), torch.bfloat16, device, generator)
            return x, *tables(d.rope_dim, tokens, d.rope_theta, device)

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
        yield Case(
            op="rope_",
            name=f"{d.name} query, interleaved, {tokens} tokens, in place",
            dtype="bfloat16",
            inputs=inputs,
            run=in_place(lambda x, cos, sin: tilefuse.rope_(x, cos, sin, interleaved=True)),
            naive=eager_x,
            peers={
                "eager": in_place(lambda x, *tables: x.copy_(eager_x(x, *tables))),
                "vLLM": vllm.rotary_embedding(d.rope_dim, interleaved=True),
            },
            upcast=(0,),
            bytes=2 * 2 * tokens * d.heads * d.rope_dim + tokens * d.rope_dim * 4,
            call_cost=tokens == 1,
        )
