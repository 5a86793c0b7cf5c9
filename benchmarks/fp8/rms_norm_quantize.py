"""Residual add, RMSNorm and quantisation in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3 as M
from .quantize import rows

EPS = 1e-6


def eager(x, weight, residual):
    wide = x.float() + residual.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()
    return *rows(normed), wide.to(x.dtype)


def separate(x, weight, residual):
    """torch's add and fused norm, then fp8_quantize: what the fusion saves (and two more roundings)."""
    h = x + residual
    return *tilefuse.fp8_quantize(F.rms_norm(h, h.shape[-1:], weight, EPS)), h


def copy(x, weight, residual):
    return x.clone(), residual.clone()


def inputs_of(tokens: int):
    def inputs(device, generator):
        x, residual = (normal((tokens, M.hidden), torch.bfloat16, device, generator) for _ in range(2))
        return x, normal((M.hidden,), torch.bfloat16, device, generator, 0.1) + 1, residual

    return inputs


def cases() -> Iterator[Case]:
    for tokens, suite, devices in (
        (1024, "quick", ("cpu", "cuda")),
        (1, "full", ("cpu", "cuda")),
        (16384, "full", ("cuda",)),
    ):
        yield Case(
            op="rms_norm_quantize",
            name=f"{M.name} hidden with residual, {tokens} x {M.hidden}",
            dtype="bfloat16",
            inputs=inputs_of(tokens),
            oracle_inputs=inputs_of(256) if tokens > 256 else None,
            run=tilefuse.rms_norm_quantize,
            exact=True,
            naive=eager,
            peers={
                "eager": eager,
                "torch.compile": compiled(eager),
                "rms_norm, then fp8_quantize": separate,
                "vLLM, by rows": vllm.fused_add_rms_norm_quantize(EPS),
                "copy": Peer(copy, yardstick=True),
            },
            # x and residual in; codes, scales and the sum out
            bytes=tokens * (7 * M.hidden + M.hidden // 32),
            call_cost=tokens == 1,
            suite=suite,
            devices=devices,
        )
