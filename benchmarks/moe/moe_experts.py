"""The expert layer, against Hugging Face's expert implementations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import QWEN3_30B_A3B as M


def eager(x, w_gate_up, w_down, weights, ids):
    """The loop over experts that models run eagerly."""
    out = torch.zeros_like(x)
    for e in range(w_gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        gate, up = (x[token] @ w_gate_up[e].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ w_down[e].T
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def hugging_face(implementation: str):
    def load():
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

        config = Qwen3MoeConfig(hidden_size=M.hidden, num_experts=M.experts, moe_intermediate_size=M.moe_intermediate)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)

        def run(x, w_gate_up, w_down, weights, ids):
            module._parameters.update(gate_up_proj=w_gate_up, down_proj=w_down)
            module.num_experts = w_gate_up.shape[0]
            return module(x, ids.long(), weights.to(x.dtype))

        return run

    return Peer(load=load)


def cases() -> Iterator[Case]:
    for tokens in (1, 16, 512, 4096, 32768):

        def inputs(device, generator, tokens=tokens, hidden=M.hidden, inner=M.moe_intermediate, experts=M.experts):
            x = normal((tokens, hidden), torch.bfloat16, device, generator)
            w_gate_up = normal((experts, 2 * inner, hidden), torch.bfloat16, device, generator, hidden**-0.5)
            w_down = normal((experts, hidden, inner), torch.bfloat16, device, generator, inner**-0.5)
            scores = torch.rand(tokens, experts, device=device, generator=generator)
            weights, ids = tilefuse.moe_route(scores, top_k=min(M.top_k, experts))
            return x, w_gate_up, w_down, weights, ids

        def small(device, generator, inputs=inputs):
            return inputs(device, generator, tokens=48, hidden=256, inner=96, experts=8)

        rows, per_expert = tokens * M.top_k, 3 * M.hidden * M.moe_intermediate
        for mode in ("forward", "forward+backward") if tokens >= 512 else ("forward",):
            backward = mode != "forward"
            # so many experts are sure to be used: each token's k are distinct
            weight_bytes = 2 * per_expert * M.top_k
            yield Case(
                op="moe_experts",
                name=f"{M.name} layer, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs,
                run=tilefuse.moe_experts,
                peers={
                    "eager": eager,
                    "torch.compile": compiled(eager),
                    "Hugging Face eager": hugging_face("eager"),
                    "Hugging Face grouped_mm": hugging_face("grouped_mm"),
                },
                oracle_inputs=small,
                grads=(0, 1, 2, 3),
                bytes=weight_bytes + 4 * tokens * M.hidden,
                flops=2 * rows * per_expert * (3 if backward else 1),
                suite="quick" if tokens == 512 and not backward else "full",
                devices=("cpu", "cuda") if tokens <= 512 and not backward else ("cuda",),
            )
