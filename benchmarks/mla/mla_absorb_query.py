"""Key up-projection folded into the query, and its rotary embedding: before each decode step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import DEEPSEEK_V3 as M
from .mla_compress_kv import WIDTH, rotate, rotate_reals

QUERY = M.nope_dim + M.rope_dim


def absorbed(rotate):
    def run(q, w_uk, cos, sin):
        nope, pe = q.split((M.nope_dim, M.rope_dim), -1)
        cos, sin = cos[: q.shape[0], None], sin[: q.shape[0], None]
        return torch.cat((torch.einsum("thp,hpr->thr", nope, w_uk), rotate(pe, cos, sin)), -1)

    return run


def inputs_of(tokens: int, heads: int):
    def inputs(device, generator):
        q = normal((tokens, heads, QUERY), torch.bfloat16, device, generator)
        # a view of kv_b_proj.weight, as in the model
        w_ukv = normal((heads, M.nope_dim + M.v_dim, M.kv_lora_rank), torch.bfloat16, device, generator, 0.05)
        return q, w_ukv[:, : M.nope_dim], *tilefuse.rope_tables(M.rope_dim, tokens, device=device)

    return inputs


def cases() -> Iterator[Case]:
    for tokens, heads, mode in (
        (64, 128, "forward"),
        (1, 128, "forward"),
        (128, 16, "forward"),
        (2048, 128, "forward"),
        (2048, 128, "backward"),
    ):
        rows = tokens * heads * (QUERY + WIDTH)
        weight = heads * M.nope_dim * M.kv_lora_rank
        forward = mode == "forward"
        yield Case(
            op="mla_absorb_query",
            name=f"{M.name}, {tokens} tokens, {heads} heads",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs_of(tokens, heads),
            oracle_inputs=inputs_of(64, 8),
            run=tilefuse.mla_absorb_query,
            peers={"eager": absorbed(rotate), "torch.compile": compiled(absorbed(rotate_reals))},
            grads=(0, 1),
            # backward: reads q, the weight and the output gradient, writes the gradients of the first two
            bytes=2 * (rows + weight if forward else rows + tokens * heads * QUERY + 2 * weight),
            flops=(2 if forward else 4) * tokens * weight,
            call_cost=tokens == 1,
            suite="quick" if tokens == 64 else "full",
            devices=("cuda",) if tokens == 2048 else ("cpu", "cuda"),
        )
