"""Norm, rotary embedding, quantisation and the write into the paged latent cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3 as M
from .mla_compress_kv import EPS, WIDTH, norm, rotate_reals, rows

PAGE = 64
FP8_WIDTH = M.kv_lora_rank + M.kv_lora_rank // 32 + 2 * M.rope_dim
F8 = torch.float8_e4m3fn


def append(layout: str):
    """The op returns nothing: the cache is what is checked."""

    def run(kv_a, weight, cos, sin, positions, cache, slots):
        tilefuse.mla_append_kv(kv_a, weight, cos, sin, positions, cache, slots, eps=EPS, layout=layout)
        return cache

    return run


def eager(kv_a, weight, cos, sin, positions, cache, slots):
    cache[slots // PAGE, slots % PAGE] = rows(kv_a, weight, cos[positions], sin[positions]).to(cache.dtype)
    return cache


def eager_reals(kv_a, weight, cos, sin, positions, cache, slots):
    new = rows(kv_a, weight, cos[positions], sin[positions], rotate_reals)
    cache[slots // PAGE, slots % PAGE] = new.to(cache.dtype)
    return cache


def eager_fp8(kv_a, weight, cos, sin, positions, cache, slots):
    """FlashMLA's way to quantise a row, with power-of-two scales."""
    latent, pe = kv_a.split((M.kv_lora_rank, M.rope_dim), -1)
    groups = norm(latent, weight).float().unflatten(-1, (-1, 128))
    scale = torch.exp2((groups.abs().amax(-1).clamp(min=1e-4) / 448).log2().ceil())
    codes = (groups / scale[..., None]).flatten(-2).to(F8)
    pe = rotate_reals(pe, cos[positions], sin[positions])
    row = torch.cat((codes.view(torch.uint8), scale.view(torch.uint8), pe.contiguous().view(torch.uint8)), -1)
    cache[slots // PAGE, slots % PAGE] = row
    return cache


def separate(kv_a, weight, cos, sin, positions, cache, slots):
    """mla_compress_kv, then the store: what the fusion saves."""
    new = tilefuse.mla_compress_kv(kv_a, weight, cos, sin, positions, eps=EPS)
    cache[slots // PAGE, slots % PAGE] = new.to(cache.dtype)
    return cache


def cases() -> Iterator[Case]:
    for tokens in (1, 4096, 32768):
        for layout in ("bf16", "fp8"):
            fp8 = layout == "fp8"

            def inputs(device, generator, tokens=tokens, fp8=fp8):
                kv_a = normal((tokens, WIDTH), torch.bfloat16, device, generator)
                weight = normal((M.kv_lora_rank,), torch.bfloat16, device, generator, 0.1) + 1
                tables = tilefuse.rope_tables(M.rope_dim, tokens, device=device)
                pages = -(-tokens // PAGE)
                kind = {"dtype": torch.uint8 if fp8 else torch.bfloat16, "device": device}
                cache = torch.zeros(pages, PAGE, FP8_WIDTH if fp8 else WIDTH, **kind)
                positions = torch.arange(tokens, device=device)
                slots = torch.randperm(pages * PAGE, generator=generator, device=device)[:tokens]
                return kv_a, weight, *tables, positions, cache, slots

            written = FP8_WIDTH if fp8 else 2 * WIDTH
            plain = eager_fp8 if fp8 else eager
            peers = {"eager": plain, "torch.compile": compiled(eager_fp8 if fp8 else eager_reals)}
            if not fp8:
                peers["mla_compress_kv, then store"] = Peer(separate)
                peers["vLLM"] = vllm.concat_and_cache_mla_cpu(EPS)
            yield Case(
                op="mla_append_kv",
                name=f"{M.name}, {tokens} tokens, {layout} cache",
                dtype="bfloat16",
                inputs=inputs,
                run=append(layout),
                # bytes of an FP8 row are compared one by one
                exact=fp8,
                upcast=None if fp8 else (0, 1, 5),
                peers=peers,
                bytes=tokens * (2 * WIDTH + written + 4 * M.rope_dim),
                call_cost=tokens == 1,
                suite="quick" if tokens == 4096 and not fp8 else "full",
                devices=("cuda",) if tokens == 32768 else ("cpu", "cuda"),
            )
