"""Gated activation and quantisation in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled
from ..peers import vllm
from ..shapes import DEEPSEEK_V3 as M
from .quantize import rows, values


def eager(gate_up):
    gate, up = gate_up.float().chunk(2, -1)
    return rows(F.silu(gate) * up)


def separate(gate_up):
    """torch's activation, then fp8_quantize: what the fusion saves (and one more rounding)."""
    gate, up = gate_up.chunk(2, -1)
    return tilefuse.fp8_quantize(F.silu(gate) * up)


def copy(gate_up):
    return gate_up.clone()


def cases() -> Iterator[Case]:
    width = M.moe_intermediate
    for tokens, suite, devices in (
        (2048, "quick", ("cpu", "cuda")),
        (1, "full", ("cpu", "cuda")),
        (32768, "full", ("cuda",)),
    ):
        yield Case(
            op="silu_mul_quantize",
            name=f"{M.name} expert, {tokens} x {2 * width}",
            dtype="bfloat16",
            inputs=values(tokens, 2 * width),
            oracle_inputs=values(256, 2 * width) if tokens > 256 else None,
            run=tilefuse.silu_mul_quantize,
            exact=True,
            naive=eager,
            peers={
                "eager": eager,
                "torch.compile": compiled(eager),
                "silu, then fp8_quantize": separate,
                "vLLM, by rows": vllm.silu_and_mul_quantize(),
                "copy": Peer(copy, yardstick=True),
            },
            bytes=tokens * (5 * width + width // 32),
            call_cost=tokens == 1,
            suite=suite,
            devices=devices,
        )
