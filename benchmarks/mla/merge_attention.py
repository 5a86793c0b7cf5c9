"""Two partial results of attention into one: chunked prefill, context parallelism."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import DEEPSEEK_V3 as M


def eager(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - lse).exp().mT[..., None] for x in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def flashinfer():
    from flashinfer import merge_state

    return merge_state


def flashinfer_inputs(out_a, lse_a, out_b, lse_b):
    # tokens first, logarithms of base 2
    lse_a, lse_b = (x.mT.contiguous() * 1.4426950408889634 for x in (lse_a, lse_b))
    return out_a, lse_a, out_b, lse_b


def flashinfer_outputs(result):
    out, lse = result
    return out, lse.mT * 0.6931471805599453


def inputs_of(tokens: int, heads: int):
    def inputs(device, generator):
        sides = []
        for _ in range(2):
            sides.append(normal((tokens, heads, M.v_dim), torch.bfloat16, device, generator))
            sides.append(normal((heads, tokens), torch.float32, device, generator))
        return tuple(sides)

    return inputs


def cases() -> Iterator[Case]:
    for tokens, heads, mode, suite, devices in (
        (1024, 16, "forward", "quick", ("cpu", "cuda")),
        (1024, 16, "backward", "full", ("cpu", "cuda")),
        (4096, 128, "forward", "full", ("cuda",)),
        (4096, 128, "backward", "full", ("cuda",)),
    ):
        forward = mode == "forward"
        peers = {"eager": eager, "torch.compile": compiled(eager)}
        if forward:
            peers["FlashInfer"] = Peer(
                load=flashinfer,
                prepare=flashinfer_inputs,
                post=flashinfer_outputs,
                devices=("cuda",),
                package="flashinfer-python",
            )
        size, lse = 2 * tokens * heads * M.v_dim, 4 * tokens * heads
        yield Case(
            op="merge_attention",
            name=f"{M.name}, {tokens} tokens, {heads} heads",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens, heads),
            oracle_inputs=inputs_of(256, 16),
            run=tilefuse.merge_attention,
            peers=peers,
            grads=(0, 1, 2, 3),
            bytes=3 * (size + lse) if forward else 5 * size,
            suite=suite,
            devices=devices,
        )
