"""Grouped matmul, against torch's and a loop over experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import QWEN3_30B_A3B as M


def eager(a, b, offsets):
    """A loop over experts, which has to know the offsets on the host."""
    bounds = offsets.tolist()
    return torch.cat([a[s:e] @ w.T for s, e, w in zip(bounds, bounds[1:], b)])


def grouped_mm():
    def run(a, b, offsets):
        return torch._grouped_mm(a, b.transpose(1, 2), offs=offsets[1:])

    return run


def cases() -> Iterator[Case]:
    for tokens in (16, 512, 4096, 32768):

        def inputs(device, generator, tokens=tokens):
            a = normal((tokens * M.top_k, M.hidden), torch.bfloat16, device, generator)
            b = normal((M.experts, 2 * M.moe_intermediate, M.hidden), torch.bfloat16, device, generator, M.hidden**-0.5)
            cuts = torch.randint(0, a.shape[0] + 1, (M.experts - 1,), device=device, generator=generator).sort().values
            offsets = torch.cat((cuts.new_zeros(1), cuts, cuts.new_full((1,), a.shape[0]))).int()
            return a, b, offsets

        rows, n, k = tokens * M.top_k, 2 * M.moe_intermediate, M.hidden
        for mode in ("forward", "backward"):
            times = 1 if mode == "forward" else 2
            yield Case(
                op="grouped_matmul",
                name=f"{M.name} up-projection, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs,
                run=tilefuse.grouped_matmul,
                peers={"eager": eager, "torch._grouped_mm": Peer(load=grouped_mm)},
                oracle_inputs=inputs_small,
                grads=(0, 1),
                bytes=2 * rows * (n + k),  # random cuts leave experts empty, whose weights nobody reads
                flops=2 * rows * n * k * times,
                suite="quick" if tokens == 512 and mode == "forward" else "full",
                devices=("cpu", "cuda") if tokens <= 512 else ("cuda",),
            )


def inputs_small(device, generator):
    a = normal((96, 256), torch.bfloat16, device, generator)
    b = normal((4, 192, 256), torch.bfloat16, device, generator, 1 / 16)
    return a, b, torch.tensor([0, 30, 30, 77, 96], dtype=torch.int32, device=device)
