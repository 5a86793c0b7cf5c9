"""RMSNorm with a silu gate, of heads (Gated DeltaNet) and of whole rows (Mamba 2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, compiled, normal

EPS = 1e-6


def norm_first(x, gate, weight):
    """Hugging Face's Qwen3NextRMSNormGated."""
    wide = x.float()
    normed = weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)
    return (normed * F.silu(gate.float())).to(x.dtype)


def gate_first(x, gate, weight):
    """Hugging Face's MambaRMSNormGated."""
    wide = x.float() * F.silu(gate.float())
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def inputs_of(rows: int, dim: int):
    def inputs(device, generator):
        x, gate = (normal((rows, dim), torch.bfloat16, device, generator) for _ in range(2))
        return x, gate, normal((dim,), torch.bfloat16, device, generator, 0.1) + 1

    return inputs


def cases() -> Iterator[Case]:
    for name, rows, dim, first, eager in (
        ("Qwen3-Next heads", 512 * 32, 128, True, norm_first),
        ("Mamba 2 rows", 512, 4096, False, gate_first),
    ):
        size = 2 * rows * dim
        least = {"forward": 3 * size, "forward+backward": 8 * size}
        for mode, moved in least.items():
            yield Case(
                op="rms_norm_gated",
                name=f"{name}, {rows} x {dim}",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs_of(rows, dim),
                oracle_inputs=inputs_of(256, dim),
                run=lambda x, gate, weight, first=first: tilefuse.rms_norm_gated(x, gate, weight, norm_first=first),
                peers={"eager": eager, "torch.compile": compiled(eager)},
                grads=(0, 1, 2),
                bytes=moved,
                suite="quick" if first else "full",
            )
