"""Inputs of ``mla_decode`` and ``mla_sparse_decode``: every option, unused rows NaN, table tails wild."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .common import latent_cache, normal, paged

SCALE_V3 = 0.1352338


def case(
    device: torch.device | str,
    dtype: torch.dtype,
    lengths: list[int],
    *,
    queries: int = 1,
    heads: int = 3,
    rank: int = 128,
    rope: int = 64,
    page_size: int = 16,
    layout: str = "bf16",
    sinks: bool = False,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(q, cache, block_table, seq_lens, sinks) and options of one call."""
    table, lens, pages = paged(lengths, page_size, 2, device)
    cache = latent_cache(lengths, table, pages, page_size, rank, rope, layout, dtype, device)
    # another layout in memory than the shape's
    q = normal(len(lengths), heads, queries, rank + rope, device=device, dtype=dtype).transpose(1, 2)
    sink = normal(heads, device=device, dtype=torch.float32, seed=5) if sinks else None
    options = {"softmax_scale": SCALE_V3, "kv_lora_rank": rank, "layout": layout} | options
    return (q, cache, table, lens, sink), options


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    def one(name: str, *args: Any, **kwargs: Any):
        return name, *case(device, dtype, *args, **kwargs)

    for layout in ("bf16", "fp8"):
        yield one(f"deepseek_{layout}", [70, 5], heads=16, rank=512, page_size=64, layout=layout)
        yield one(f"some_empty_{layout}", [0, 33, 0, 1], layout=layout, num_splits=2)
        yield one(f"queries_{layout}", [40, 3, 2], queries=4, layout=layout, sinks=True)
        yield one(f"window_{layout}", [90, 12], queries=2, window=17, page_size=5, layout=layout)
    yield one("not_causal", [40, 3, 2], queries=4, causal=False, window=9)
    yield one("many_splits", [200, 1, 77], num_splits=7, sinks=True)
    yield one("device_splits", [300, 0, 40, 290])
    yield one("one_head", [37], heads=1)
    yield one("heads63", [21, 20], heads=63, queries=2)
    yield one("no_rope", [37, 40], rope=0, heads=9)
    yield one("rank256", [37, 40], rank=256, heads=9)
    yield one("window0", [37, 40], window=0, queries=3)
    yield one("all_empty", [0, 0], sinks=True)
    yield one("no_batch", [])
    if dtype != torch.uint8:
        yield one("odd_rank", [37, 40], rank=90, rope=6, heads=5)


def sparse_cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (q, cache, indices, sinks) and options."""
    for layout in ("bf16", "fp8"):
        for name, length, topk, queries, heads, page_size in (
            ("sparse", 70, 24, 2, 16, 64),
            ("longer_than_keys", 9, 40, 1, 3, 2),
            ("repeats", 5, 700, 3, 1, 61),
            ("none", 8, 0, 1, 3, 64),
        ):
            (q, cache, table, _, sinks), options = case(
                device,
                dtype,
                [length, length],
                queries=queries,
                heads=heads,
                page_size=page_size,
                layout=layout,
                sinks=name == "sparse",
            )
            generator = torch.Generator().manual_seed(topk)
            key = torch.randint(0, length, (2, queries, topk), generator=generator).to(device)
            page = table.long()[torch.arange(2, device=device)[:, None, None], key // page_size]
            indices = page * page_size + key % page_size
            # invalid in every way, whole stretches of it, and one list that is all invalid
            bad = torch.tensor([-1, -123456, -(2**31), cache.shape[0] * page_size, 2**31 - 1], device=device)
            where = torch.rand(2, queries, topk, generator=generator).to(device) < 0.2
            indices = torch.where(where, bad[key % 5], indices)
            indices[..., 64:192] = -1
            indices[0, 0] = -1
            yield f"{name}_{layout}", (q, cache, indices.int() if layout == "bf16" else indices, sinks), options


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


def _sparse_samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in sparse_cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {
    "mla_decode": _samples,
    "mla_sparse_decode": _sparse_samples,
}
