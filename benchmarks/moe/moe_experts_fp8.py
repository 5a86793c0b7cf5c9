"""The expert layer in FP8, against the bf16 layer on dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import QWEN3_30B_A3B as M


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


def cases() -> Iterator[Case]:
    for tokens in (16, 128, 4096):

        def inputs(device, generator, tokens=tokens, hidden=M.hidden, inner=M.moe_intermediate, experts=M.experts):
            def weight(n, k):
                parts = [
                    tilefuse.fp8_quantize(normal((n, k), torch.bfloat16, device, generator, k**-0.5), block=(128, 128))
                    for _ in range(experts)
                ]
                codes = torch.stack([q.view(torch.uint8) for q, _ in parts]).view(torch.float8_e4m3fn)
                return codes, torch.stack([s for _, s in parts])

            x = normal((tokens, hidden), torch.bfloat16, device, generator)
            scores = torch.rand(tokens, experts, device=device, generator=generator)
            weights, ids = tilefuse.moe_route(scores, top_k=min(M.top_k, experts))
            return x, *weight(2 * inner, hidden), *weight(hidden, inner), weights, ids

        def small(device, generator, inputs=inputs):
            return inputs(device, generator, tokens=16, hidden=256, inner=128, experts=8)

        per_expert = 3 * M.hidden * M.moe_intermediate
        yield Case(
            op="moe_experts_fp8",
            name=f"{M.name} layer, {tokens} tokens",
            dtype="float8_e4m3fn",
            inputs=inputs,
            run=tilefuse.moe_experts_fp8,
            # activations are quantised here and not there
            peers={
                "eager": Peer(eager, tolerance=None),
                "bf16 layer": Peer(bf16_layer, prepare=widened, tolerance=None),
            },
            oracle_inputs=small,
            upcast=(),
            oracle=reference,
            naive=reference_naive,
            bytes=per_expert * M.top_k + 4 * tokens * M.hidden,
            flops=2 * tokens * M.top_k * per_expert,
            suite="full",
            devices=("cpu", "cuda") if tokens <= 128 else ("cuda",),
        )


def reference(*args):
    """The layer on the reference backend, with float32 rows."""
    with tilefuse.backend("reference"):
        return tilefuse.moe_experts_fp8(args[0].float(), *args[1:]).double()


def reference_naive(*args):
    with tilefuse.backend("reference"):
        return tilefuse.moe_experts_fp8(*args)
