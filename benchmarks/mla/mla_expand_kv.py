"""Keys and values of all heads from latent rows: training and prefill."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import DEEPSEEK_V3 as M
from .mla_compress_kv import WIDTH


def eager(latent, w_ukv):
    """Hugging Face's DeepseekV3Attention: project, view, split, concatenate with the shared part."""
    compressed, pe = latent.split((M.kv_lora_rank, M.rope_dim), -1)
    kv = F.linear(compressed, w_ukv).unflatten(-1, (-1, M.nope_dim + M.v_dim))
    nope, v = kv.split((M.nope_dim, M.v_dim), -1)
    return torch.cat((nope, pe[:, None].expand(-1, nope.shape[1], -1)), -1), v


def run(latent, w_ukv):
    return tilefuse.mla_expand_kv(latent, w_ukv, kv_lora_rank=M.kv_lora_rank, nope_dim=M.nope_dim, v_dim=M.v_dim)


def inputs_of(tokens: int, heads: int):
    def inputs(device, generator):
        latent = normal((tokens, WIDTH), torch.bfloat16, device, generator)
        shape = (heads * (M.nope_dim + M.v_dim), M.kv_lora_rank)
        return latent, normal(shape, torch.bfloat16, device, generator, 0.05)

    return inputs


def cases() -> Iterator[Case]:
    for tokens, heads, mode, suite, devices in (
        (256, 16, "forward", "quick", ("cpu", "cuda")),
        (256, 16, "backward", "full", ("cpu", "cuda")),
        (4096, 128, "forward", "full", ("cuda",)),
        (4096, 128, "backward", "full", ("cuda",)),
    ):
        weight = heads * (M.nope_dim + M.v_dim) * M.kv_lora_rank
        outputs = tokens * heads * (M.nope_dim + M.rope_dim + M.v_dim)
        forward = mode == "forward"
        yield Case(
            op="mla_expand_kv",
            name=f"{M.name}, {tokens} tokens, {heads} heads",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens, heads),
            oracle_inputs=inputs_of(128, 4),
            run=run,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            grads=(0, 1),
            bytes=2 * (outputs + (tokens * WIDTH + weight) * (1 if forward else 2)),
            flops=(2 if forward else 4) * tokens * weight,
            suite=suite,
            devices=devices,
        )
