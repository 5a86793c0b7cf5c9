"""Inputs of ``rope_append_kv``: cache dtypes, odd page sizes, skipped slots, strided caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .rope import normal, tables


def cases(
    device: torch.device | str, dtype: torch.dtype, cache_dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    """name, all tensors of one call in order, its options. The caches hold something before."""

    def cache(pages: int, page_size: int, heads: int, dim: int) -> Tensor:
        return normal(pages, page_size, heads, dim, device=device, dtype=torch.float32, seed=5).to(cache_dtype)

    def index(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    def call(tokens, heads_q, heads_k, dim, dim_v, rotary, page_size, slots, positions, **options):
        x = [
            normal(*tokens, h, d, device=device, dtype=dtype, seed=h)
            for h, d in ((heads_q, dim), (heads_k, dim), (heads_k, dim_v))
        ]
        caches = cache(4, page_size, heads_k, dim), cache(4, page_size, heads_k, dim_v)
        return (*x, *tables(rotary, 64, device), positions, *caches, slots), options

    scales = {"k_scale": 0.031, "v_scale": 0.25} if cache_dtype == torch.float8_e4m3fn else {}
    slots = index([17, 3, -1, 63, 0])
    positions = index([63, 3, 5, 5, 0], torch.int64)
    yield "plain", *call((5,), 4, 2, 64, 64, 64, 16, slots, positions)
    yield "interleaved", *call((5,), 4, 2, 64, 64, 64, 16, slots.long(), positions.int(), interleaved=True, **scales)
    yield "tail", *call((5,), 3, 1, 96, 40, 30, 17, slots, positions, rotary_offset=66, **scales)
    yield "wide_v", *call((5,), 2, 2, 32, 160, 16, 20, slots, positions, **scales)
    yield "all_skipped", *call((5,), 2, 2, 64, 64, 64, 16, index([-1, -7, -(2**31), -1, -1]), positions)
    yield (
        "batched",
        *call((2, 3), 4, 2, 64, 64, 64, 16, index([[1, 2, 3], [40, -1, 41]]), index([[0, 1, 2], [9, 8, 7]])),
    )
    yield "no_tokens", *call((0,), 4, 2, 64, 64, 64, 16, slots[:0], positions[:0])
    # keys and values in one allocation, as vLLM lays them out, and tokens as views into a packed projection
    both = cache(4, 2 * 16, 2, 64).view(4, 2, 16, 2, 64)
    qkv = normal(5, 8, 64, device=device, dtype=dtype)
    yield (
        "views",
        (qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], *tables(64, 64, device), positions, both[:, 0], both[:, 1], slots),
        dict(scales),
    )


def _samples(device: torch.device) -> Iterator[Sample]:
    for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for name, args, options in cases(device, torch.bfloat16, cache_dtype):
            yield Sample(args, options, f"{name}_{str(cache_dtype).removeprefix('torch.')}")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"rope_append_kv": _samples}
