"""Attention whose keys are wider than its values: training and prefill."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..attention.window_attention import heads_first, heads_last, recomputed
from ..harness import Case, Peer, compiled, normal
from ..peers import vllm, zentorch
from ..shapes import DEEPSEEK_V3 as M

QUERY = M.nope_dim + M.rope_dim
# (P + r) ** -0.5 * mscale ** 2 of the released model
SCALE = 0.1352338


def eager(q, k, v):
    """Hugging Face's eager attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * SCALE
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (probs @ v).transpose(1, 2)


def on_operands(q, k, v):
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    return recomputed(q, k, v, visible, SCALE)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)


def padded_inputs(q, k, v):
    # as Hugging Face does for flash kernels, which want one width
    return heads_first(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])))


def unpadded(out):
    return out.transpose(1, 2)[..., : M.v_dim]


def flex():
    from torch.nn.attention.flex_attention import flex_attention

    return lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask, scale=SCALE)


def flex_inputs(q, k, v):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, q.shape[1], k.shape[1], device=q.device)
    return *heads_first(q, k, v), mask


def inputs_of(tokens: int, heads: int):
    def inputs(device, generator):
        widths = (QUERY, QUERY, M.v_dim)
        # about as large as scores are in the model
        return tuple(normal((1, tokens, heads, w), torch.bfloat16, device, generator, 0.7) for w in widths)

    return inputs


def cases() -> Iterator[Case]:
    for tokens, heads, mode, suite, devices in (
        (512, 16, "forward", "quick", ("cpu", "cuda")),
        (512, 16, "backward", "full", ("cpu", "cuda")),
        (2048, 16, "forward", "quick", ("cpu", "cuda")),
        (4096, 128, "forward", "full", ("cuda",)),
        (4096, 128, "backward", "full", ("cuda",)),
        (16384, 16, "forward", "full", ("cuda",)),
        (16384, 16, "backward", "full", ("cuda",)),
    ):
        forward = mode == "forward"
        pairs = heads * tokens * (tokens + 1) // 2
        peers = {
            "eager": eager,
            "torch.compile": compiled(eager),
            "SDPA": Peer(sdpa, prepare=heads_first, post=heads_last),
            "FlexAttention": Peer(load=flex, prepare=flex_inputs, post=heads_last, compile=True, devices=("cuda",)),
        }
        if forward:
            peers["SDPA, v padded"] = Peer(sdpa, prepare=padded_inputs, post=unpadded)
            peers["SGLang"] = vllm.extend_attention_cpu(scale=SCALE)
            peers["zentorch"] = zentorch.zentorch_sdpa(scale=SCALE)
        yield Case(
            op="mla_attention",
            name=f"{M.name}, {tokens} tokens, {heads} heads",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens, heads),
            oracle_inputs=inputs_of(256, 4),
            run=lambda q, k, v: tilefuse.mla_attention(q, k, v, softmax_scale=SCALE)[0],
            naive=eager if forward else on_operands,
            rows=forward,
            oracle=None if forward else on_operands,
            peers=peers,
            grads=(0, 1, 2),
            # backward reads q, k, v, out, dout and writes three gradients
            bytes=2 * tokens * heads * ((2 if forward else 4) * (QUERY + M.v_dim)),
            flops=2 * pairs * (QUERY + M.v_dim if forward else 3 * QUERY + 2 * M.v_dim),
            suite=suite,
            devices=devices,
        )
