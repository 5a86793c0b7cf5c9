"""RMSNorm of hidden states, alone and with the residual sum in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3, LLAMA3_8B

EPS = 1e-6


def eager(x, weight):
    """Hugging Face's LlamaRMSNorm."""
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def add_eager(x, residual, weight):
    h = x + residual
    return eager(h, weight), h


def torchs(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def add_torchs(x, residual, weight):
    h = x + residual
    return torchs(h, weight), h


def inputs_of(tokens: int, hidden: int, tensors: int):
    def inputs(device, generator):
        rows = [normal((tokens, hidden), torch.bfloat16, device, generator) for _ in range(tensors)]
        return *rows, normal((hidden,), torch.bfloat16, device, generator, 0.1) + 1

    return inputs


def cases() -> Iterator[Case]:
    # the sum reads one more, and writes h as well
    ops = (
        ("rms_norm", tilefuse.rms_norm, eager, torchs, vllm.rms_norm(EPS), 1),
        ("add_rms_norm", tilefuse.add_rms_norm, add_eager, add_torchs, vllm.fused_add_rms_norm(EPS), 2),
    )
    for op, run, plain, of_torch, of_vllm, tensors in ops:
        for model, tokens, mode, suite, devices in (
            (LLAMA3_8B, 512, "forward", "quick", ("cpu", "cuda")),
            (LLAMA3_8B, 512, "forward+backward", "quick", ("cpu", "cuda")),
            (LLAMA3_8B, 1, "forward", "full", ("cpu", "cuda")),
            (DEEPSEEK_V3, 64, "forward", "full", ("cpu", "cuda")),
            (DEEPSEEK_V3, 4096, "forward", "full", ("cpu", "cuda")),
            (DEEPSEEK_V3, 4096, "backward", "full", ("cpu", "cuda")),
        ):
            rows = 2 * tokens * model.hidden
            # backward: what is normed and the upstream gradients in, one gradient out (that of x is the residual's)
            least = {"forward": 2 * tensors * rows, "backward": (2 + tensors) * rows}
            least["forward+backward"] = sum(least.values())
            peers: dict = {"eager": plain, "torch.compile": compiled(plain), "torch's rms_norm": of_torch}
            if mode == "forward":
                peers["vLLM"] = of_vllm
            yield Case(
                op=op,
                name=f"{model.name} hidden, {tokens} x {model.hidden}",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs_of(tokens, model.hidden, tensors),
                oracle_inputs=inputs_of(256, model.hidden, tensors) if tokens > 256 else None,
                run=run,
                peers=peers,
                grads=tuple(range(tensors + 1)),
                bytes=least[mode],
                call_cost=tokens == 1,
                suite=suite,
                devices=devices,
            )
