"""The expert layer in FP8, against the bf16 layer on dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal
from ..peers import kt, vllm
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B, Model
from .moe_experts import DISTINCT, routed


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
        x, weights, ids = routed(tokens, experts, hidden, top_k, device, generator)
        gate_up = scaled_copies(experts, 2 * inner, hidden, device, generator)
        return x, *gate_up, *scaled_copies(experts, hidden, inner, device, generator), weights, ids

    return inputs


def packed(x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, weights, ids):
    up = tilefuse.pack_weight(w_gate_up, w_gate_up_scale, format="fp8")
    return x, up, None, tilefuse.pack_weight(w_down, w_down_scale, format="fp8"), None, weights, ids


def without_quantising(*args):
    return tilefuse.moe_experts_fp8(*args, quantize_activations=False)


def case(m: Model, tokens: int, experts: int, *, w8a16: bool = False, **options) -> Case:
    """W8A8 on the checkpoint's weights, or W8A16 on packed ones: what the library peers do."""
    per_expert = 3 * m.hidden * m.moe_intermediate
    slots = tokens * m.top_k
    part = " layer" if experts == m.experts else f", {experts} of {m.experts} experts"
    # activations are quantised in W8A8 and not by peers: by that they are off from ours
    other = {} if w8a16 else {"error": 0.06}
    return Case(
        op="moe_experts_fp8",
        name=f"{m.name}{part}, {'W8A16, packed, ' if w8a16 else ''}{tokens} tokens",
        dtype="float8_e4m3fn",
        inputs=inputs_of(tokens, experts, m.hidden, m.moe_intermediate, m.top_k),
        run=without_quantising if w8a16 else tilefuse.moe_experts_fp8,
        prepare=packed if w8a16 else None,
        peers={
            "eager": Peer(eager, **other),
            "bf16 layer": Peer(bf16_layer, prepare=widened, **other),
            "SGLang": vllm.fused_experts_cpu(fp8=True, **other),
            "kt-kernel": kt.moe_experts(fp8=True, **other),
        },
        oracle_inputs=inputs_of(16, 8, 256, 128, min(m.top_k, 4)),
        upcast=(),
        oracle=reference_of(without_quantising if w8a16 else tilefuse.moe_experts_fp8),
        naive=eager if w8a16 else reference_naive,
        bytes=per_expert * min(slots, m.top_k if slots > experts else slots) + 4 * tokens * m.hidden,
        flops=2 * slots * per_expert,
        reads=tokens <= 16,
        **options,
    )


def cases() -> Iterator[Case]:
    m = QWEN3_30B_A3B
    for tokens in (1, 16, 128, 512):
        yield case(m, tokens, m.experts, w8a16=True, suite="quick" if tokens == 1 else "full", devices=("cpu",))
        yield case(m, tokens, m.experts)
    yield case(m, 4096, m.experts, devices=("cuda",))
    # as many experts as a token takes
    for tokens in (1, 16, 128):
        yield case(DEEPSEEK_V3, tokens, 8, w8a16=True, devices=("cpu",))
        yield case(DEEPSEEK_V3, tokens, 8)


def reference_of(run):
    """The layer on the reference backend, with float32 rows."""

    def oracle(*args):
        with tilefuse.backend("reference"):
            return run(args[0].float(), *args[1:]).double()

    return oracle


def reference_naive(*args):
    with tilefuse.backend("reference"):
        return tilefuse.moe_experts_fp8(*args)
