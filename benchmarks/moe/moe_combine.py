"""Expert rows back to their tokens, weighted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import QWEN3_30B_A3B as M


def eager(y, inverse, weights):
    rows = y[inverse.long()].unflatten(0, weights.shape)
    return (rows * weights[..., None]).sum(1).to(y.dtype)


def copy(y, inverse, weights):
    return y.clone()


def cases() -> Iterator[Case]:
    for tokens, mode, suite, devices in (
        (512, "forward", "quick", ("cpu", "cuda")),
        (512, "backward", "full", ("cpu", "cuda")),
        (32768, "forward", "full", ("cuda",)),
        (32768, "backward", "full", ("cuda",)),
    ):

        def inputs_of(tokens):
            def inputs(device, generator):
                y = normal((tokens * M.top_k, M.hidden), torch.bfloat16, device, generator)
                inverse = torch.randperm(tokens * M.top_k, generator=generator, device=device).int()
                logits = normal((tokens, M.top_k), torch.float32, device, generator)
                return y, inverse, logits.softmax(-1)

            return inputs

        rows = 2 * tokens * M.top_k * M.hidden
        slots = 4 * 2 * tokens * M.top_k
        out = 2 * tokens * M.hidden
        yield Case(
            op="moe_combine",
            name=f"{M.name}, {tokens} tokens",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens),
            oracle_inputs=inputs_of(128),
            run=tilefuse.moe_combine,
            peers={
                "eager": eager,
                "torch.compile": compiled(eager),
                **({"copy of y": Peer(copy, yardstick=True)} if mode == "forward" else {}),
            },
            grads=(0, 2),
            bytes=(rows if mode == "forward" else 2 * rows) + out + slots,
            suite=suite,
            devices=devices,
        )
