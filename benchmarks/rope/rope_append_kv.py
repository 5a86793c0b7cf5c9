"""Rotary embedding and the write into a paged cache: prefill by bandwidth, one decode token by call cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import LLAMA3_8B
from .rope import eager_qk

PAGE = 16


def run(*args):
    """All that the op writes, so that the caches are checked too."""
    return tilefuse.rope_append_kv(*args), args[6], args[7]


def eager(q, k, v, cos, sin, positions, k_cache, v_cache, slots):
    q, k = eager_qk(q, k, cos[positions], sin[positions])
    page, place = slots // PAGE, slots % PAGE
    k_cache[page, place] = k.to(k_cache.dtype)
    v_cache[page, place] = v.to(v_cache.dtype)
    return q, k_cache, v_cache


def eager_query(q, k, v, cos, sin, positions, *caches):
    return eager_qk(q, k, cos[positions], sin[positions])[0]


def cases() -> Iterator[Case]:
    m = LLAMA3_8B
    for tokens in (1, 4096):
        for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            fp8 = cache_dtype == torch.float8_e4m3fn

            def inputs(device, generator, tokens=tokens, cache_dtype=cache_dtype):
                q, k, v = (
                    normal((tokens, h, m.head_dim), torch.bfloat16, device, generator)
                    for h in (m.heads, m.kv_heads, m.kv_heads)
                )
                cos, sin = tilefuse.rope_tables(m.head_dim, tokens, base=m.rope_theta, device=device)
                shape = (-(-tokens // PAGE), PAGE, m.kv_heads, m.head_dim)
                caches = [torch.zeros(shape, device=device).to(cache_dtype) for _ in range(2)]
                positions = torch.arange(tokens, device=device)
                slots = torch.randperm(tokens, generator=generator, device=device)
                return q, k, v, cos, sin, positions, *caches, slots

            rows = tokens * m.head_dim
            written = 1 if fp8 else 2
            yield Case(
                op="rope_append_kv",
                name=f"{m.name}, {tokens} tokens, {'fp8' if fp8 else 'bf16'} cache",
                dtype="bfloat16",
                inputs=inputs,
                # tests compare the codes of an FP8 cache; widening one is not part of the op
                run=tilefuse.rope_append_kv if fp8 else run,
                upcast=(0, 1, 2) if fp8 else (0, 1, 2, 6, 7),
                naive=eager_query if fp8 else None,
                peers={"eager": eager, "torch.compile": compiled(eager)},
                bytes=rows * (2 * 2 * m.heads + 2 * (2 + written) * m.kv_heads) + rows * 4,
                call_cost=tokens == 1,
                suite="quick" if tokens == 4096 and not fp8 else "full",
            )
