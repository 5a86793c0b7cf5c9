"""FP8 linear layers behind an RMSNorm and behind a gated activation, against the ops in a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, normal
from ..shapes import DEEPSEEK_V3 as M
from . import linear


def eager_silu_mul(gate_up, weight):
    gate, up = gate_up.chunk(2, -1)
    return linear.eager(F.silu(gate) * up, weight)


def eager_rms_norm(x, norm_weight, weight):
    return linear.eager(F.rms_norm(x, norm_weight.shape, norm_weight, 1e-6), weight), x


def silu_mul(gate_up, weight):
    return tilefuse.fp8_linear(tilefuse.gated_activation(gate_up), weight)


def rms_norm(x, norm_weight, weight):
    return tilefuse.fp8_linear(tilefuse.rms_norm(x, norm_weight), weight), x


def inputs_of(op: str, tokens: int, n: int, k: int):
    def inputs(device, generator):
        weight = normal((n, k), torch.bfloat16, device, generator, k**-0.5)
        if op == "silu_mul_fp8_linear":
            return normal((tokens, 2 * k), torch.bfloat16, device, generator), weight
        return *(normal(s, torch.bfloat16, device, generator) for s in ((tokens, k), (k,))), weight

    return inputs


def cases() -> Iterator[Case]:
    for op, eager, two_ops in (
        ("silu_mul_fp8_linear", eager_silu_mul, silu_mul),
        ("rms_norm_fp8_linear", eager_rms_norm, rms_norm),
    ):
        for tokens, n, k, mode, suite, devices in (
            (256, 2048, 2048, "forward", "quick", ("cpu", "cuda")),
            (256, 2048, 2048, "forward+backward", "full", ("cpu", "cuda")),
            (8192, 7168, 2048, "forward+backward", "full", ("cuda",)),
        ):
            wide = 2 * k if op == "silu_mul_fp8_linear" else k
            forward = 2 * (tokens * (n + wide) + n * k)
            # reads what is saved and the output gradient, writes both gradients
            backward = 2 * (tokens * (n + 2 * wide) + 2 * n * k)
            yield Case(
                op=op,
                name=f"{M.name}, {tokens} x {n} x {k}",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs_of(op, tokens, n, k),
                oracle_inputs=inputs_of(op, 128, 256, 512),
                run=getattr(tilefuse, op),
                peers={"eager": eager, "two ops": two_ops},
                grads=tuple(range(2 if op == "silu_mul_fp8_linear" else 3)),
                bytes=forward + (backward if mode != "forward" else 0),
                flops=(1 if mode == "forward" else 3) * 2 * tokens * n * k,
                suite=suite,
                devices=devices,
            )
