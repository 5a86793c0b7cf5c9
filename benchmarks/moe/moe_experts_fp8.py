"""The expert layer in FP8, against the bf16 layer on dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..peers import kt, vllm
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B
from .moe_experts import DISTINCT


def dequantised(w, scale):
    """bf16 weights of an expert, block by block."""
    rows, cols = w.shape[1:]
    wide = scale.repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)[:, :, :cols]
    return (w.float() * wide).bfloat16()


def eager(x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, weights, ids):
    """Dequantises each expert's weights, then the loop over experts in bf16."""
    out = torch.zeros_like(x)
    for e in range(w_gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        if token.numel():
            here = slice(e, e + 1)
            gate, up = (x[token] @ dequantised(w_gate_up[here], w_gate_up_scale[here])[0].T).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ dequantised(w_down[here], w_down_scale[here])[0].T
            out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def bf16_layer(x, w_gate_up, w_down, weights, ids):
    return tilefuse.moe_experts(x, w_gate_up, w_down, weights, ids)


def widened(x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, weights, ids):
    return x, dequantised(w_gate_up, w_gate_up_scale), dequantised(w_down, w_down_scale), weights, ids


def scaled_copies(experts: int, n: int, k: int, device, generator):
    """Codes [E, n, k] and scales: a few experts of their own, the others with their codes and other scales."""
    count = min(experts, DISTINCT)
    parts = [
        tilefuse.fp8_quantize(normal((n, k), torch.bfloat16, device, generator, k**-0.5), block=(128, 128))
        for _ in range(count)
    ]
    codes = torch.empty(experts, n, k, dtype=torch.uint8, device=device)
    scales = torch.stack([parts[e % count][1] * (0.5 + (e + 1) / experts) for e in range(experts)])
    for e in range(experts):
        codes[e] = parts[e % count][0].view(torch.uint8)
    return codes.view(torch.float8_e4m3fn), scales


def inputs_of(tokens: int, experts: int, hidden: int, inner: int, top_k: int):
    def inputs(device, generator):
        x = normal((tokens, hidden), torch.bfloat16, device, generator)
        if tokens * top_k <= experts:
            # few tokens: every slot another expert, so that it is known how many weights are read
            ids = torch.randperm(experts, generator=generator, device=device)[: tokens * top_k].view(tokens, top_k)
        else:
            ids = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k, -1).indices
        weights = normal((tokens, top_k), torch.float32, device, generator).softmax(-1)
        gate_up = scaled_copies(experts, 2 * inner, hidden, device, generator)
        return x, *gate_up, *scaled_copies(experts, hidden, inner, device, generator), weights, ids.int()

    return inputs


def cases() -> Iterator[Case]:
    for m, tokens, experts, suite, devices in (
        (QWEN3_30B_A3B, 1, 128, "quick", ("cpu", "cuda")),
        (QWEN3_30B_A3B, 16, 128, "quick", ("cpu", "cuda")),
        (QWEN3_30B_A3B, 128, 128, "full", ("cpu", "cuda")),
        (QWEN3_30B_A3B, 512, 128, "full", ("cpu", "cuda")),
        (QWEN3_30B_A3B, 4096, 128, "full", ("cuda",)),
        # as many experts as a token takes
        (DEEPSEEK_V3, 1, 8, "full", ("cpu", "cuda")),
        (DEEPSEEK_V3, 16, 8, "full", ("cpu", "cuda")),
        (DEEPSEEK_V3, 128, 8, "full", ("cpu", "cuda")),
    ):
        per_expert = 3 * m.hidden * m.moe_intermediate
        slots = tokens * m.top_k
        part = " layer" if experts == m.experts else f", {experts} of {m.experts} experts"
        yield Case(
            op="moe_experts_fp8",
            name=f"{m.name}{part}, {tokens} tokens",
            dtype="float8_e4m3fn",
            inputs=inputs_of(tokens, experts, m.hidden, m.moe_intermediate, m.top_k),
            run=tilefuse.moe_experts_fp8,
            # activations are quantised here and not there: by that they are off from ours
            peers={
                "eager": Peer(eager, error=0.06),
                "bf16 layer": Peer(bf16_layer, prepare=widened, error=0.06),
                "SGLang": vllm.fused_experts_cpu(fp8=True, error=0.06),
                "kt-kernel": kt.moe_experts(fp8=True, error=0.06),
            },
            oracle_inputs=inputs_of(16, 8, 256, 128, min(m.top_k, 4)),
            upcast=(),
            oracle=reference,
            naive=reference_naive,
            bytes=per_expert * min(slots, m.top_k if slots > experts else slots) + 4 * tokens * m.hidden,
            flops=2 * slots * per_expert,
            reads=tokens <= 16,
            suite=suite,
            devices=devices,
        )


def reference(*args):
    """The layer on the reference backend, with float32 rows."""
    with tilefuse.backend("reference"):
        return tilefuse.moe_experts_fp8(args[0].float(), *args[1:]).double()


def reference_naive(*args):
    with tilefuse.backend("reference"):
        return tilefuse.moe_experts_fp8(*args)
