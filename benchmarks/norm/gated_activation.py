"""The activation of a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3, LLAMA3_8B


def eager(gate_up):
    """Hugging Face's MLP between its products, in the dtype of the operands."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def inputs_of(tokens: int, columns: int):
    return lambda device, generator: (normal((tokens, 2 * columns), torch.bfloat16, device, generator),)


def cases() -> Iterator[Case]:
    for model, tokens, mode, suite in (
        (LLAMA3_8B, 256, "forward", "quick"),
        (LLAMA3_8B, 256, "forward+backward", "quick"),
        (LLAMA3_8B, 1, "forward", "full"),
        (DEEPSEEK_V3, 64, "forward", "full"),
        (LLAMA3_8B, 4096, "backward", "full"),
    ):
        size = 2 * tokens * model.intermediate
        least = {"forward": 3 * size, "backward": 5 * size}
        least["forward+backward"] = sum(least.values())
        yield Case(
            op="gated_activation",
            name=f"{model.name} silu, {tokens} x 2 x {model.intermediate}",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens, model.intermediate),
            oracle_inputs=inputs_of(64, model.intermediate) if tokens > 64 else None,
            run=tilefuse.gated_activation,
            peers={
                "eager": eager,
                "torch.compile": compiled(eager),
                **({"vLLM": vllm.silu_and_mul()} if mode == "forward" else {}),
            },
            grads=(0,),
            bytes=least[mode],
            call_cost=tokens == 1,
            suite=suite,
        )
