"""RMSNorm of q and k heads and rotary embedding in one launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..peers import vllm
from ..shapes import QWEN3_30B_A3B
from .rope import eager_qk


def norm(x, weight):
    """Hugging Face's Qwen3RMSNorm."""
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def eager(q, k, q_weight, k_weight, cos, sin):
    return eager_qk(norm(q, q_weight), norm(k, k_weight), cos, sin)


def separate(q, k, q_weight, k_weight, cos, sin):
    """torch's fused norm, then tilefuse.rope_qk: what the fusion saves."""
    q, k = (torch.nn.functional.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    return tilefuse.rope_qk(q, k, cos, sin)


def cases() -> Iterator[Case]:
    m = QWEN3_30B_A3B
    for tokens in (1, 4096):

        def inputs(device, generator, tokens=tokens):
            x = [normal((tokens, h, m.head_dim), torch.bfloat16, device, generator) for h in (m.heads, m.kv_heads)]
            weights = [normal((m.head_dim,), torch.bfloat16, device, generator) for _ in range(2)]
            return *x, *weights, *tilefuse.rope_tables(m.head_dim, tokens, base=m.rope_theta, device=device)

        size = 2 * tokens * (m.heads + m.kv_heads) * m.head_dim
        for mode in ("forward", "backward"):
            if tokens == 1 and mode == "backward":
                continue
            yield Case(
                op="qk_norm_rope",
                name=f"{m.name}, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs,
                run=tilefuse.qk_norm_rope,
                peers={
                    "eager": eager,
                    "torch.compile": compiled(eager),
                    "rms_norm, then rope_qk": separate,
                    **({"vLLM": vllm.qk_norm_rope(1e-6)} if mode == "forward" else {}),
                },
                grads=(0, 1, 2, 3),
                upcast=(0, 1, 2, 3),
                bytes=(2 if mode == "forward" else 3) * size + tokens * m.head_dim * 4,
                call_cost=tokens == 1,
                suite="quick" if tokens == 4096 and mode == "forward" else "full",
            )
