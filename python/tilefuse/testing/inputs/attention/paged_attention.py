"""Inputs of ``paged_attention``: page sizes, ragged lengths, float8 caches, several queries; NaN wherever no key is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .window_attention import normal

FP8 = torch.float8_e4m3fn


def paged(
    lengths: Sequence[int],
    sq: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int,
    page_size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k_cache, v_cache, block_table, seq_lens. Unused slots hold NaN, unused table entries point nowhere."""
    batch = len(lengths)
    columns = max([1, *(-(-n // page_size) for n in lengths)]) + 1
    pages = batch * columns + 2
    generator = torch.Generator().manual_seed(pages + sq)
    table = torch.randperm(pages, generator=generator)[: batch * columns].view(batch, columns).to(torch.int32)
    q = normal(batch, sq, heads, dim, device=device, dtype=dtype)
    caches = []
    for seed, width in ((1, dim), (2, dim_v)):
        wide = normal(pages, page_size, kv_heads, width, seed=seed)
        used = torch.zeros(pages, page_size, dtype=torch.bool)
        for b, n in enumerate(lengths):
            t = torch.arange(n)
            used[table[b].long()[t // page_size], t % page_size] = True
        wide[~used] = float("nan")
        caches.append(wide.to(cache_dtype or dtype).to(device))
    for b, n in enumerate(lengths):
        table[b, -(-n // page_size) :] = 2**31 - 1
    return q, *caches, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Tensor], dict[str, Any]]]:
    """name, (q, k_cache, v_cache, block_table, seq_lens), the other tensors by name, the options."""

    def make(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return paged(*args, device=device, dtype=dtype, **kwargs)

    def heads(count: int) -> Tensor:
        return normal(count, device=device, seed=5).abs()

    yield "decode", make([70, 3, 33], 1, 4, 2, 16, 16, 16), {}, {}
    yield "page_of_one", make([19, 7], 1, 2, 1, 16, 24, 1), {}, {}
    yield "odd_pages", make([70, 33], 1, 8, 1, 32, 24, 7), {}, {"window": (20, 0)}
    yield "sinks", make([70, 0, 5], 1, 4, 2, 16, 16, 16), {"sinks": heads(4)}, {"window": (15, 0)}
    yield "alibi", make([40, 41], 2, 4, 2, 16, 16, 16), {"alibi_slopes": heads(4)}, {"softcap": 3.0}
    yield "several_queries", make([50, 9, 3], 5, 6, 2, 16, 16, 16), {}, {"window": (10, 0)}
    yield "many_queries", make([100, 64], 20, 8, 2, 16, 16, 16), {}, {"window": (30, 2), "scale": 0.3}
    yield "both_sides", make([30], 4, 2, 2, 16, 16, 8), {}, {"window": (-1, -1)}
    yield "fp8", make([60, 33], 3, 4, 2, 32, 16, 16, cache_dtype=FP8), {}, {"k_scale": 0.5, "v_scale": 2.0}
    yield "group_of_7", make([40], 1, 7, 1, 40, 40, 16), {}, {}
    yield "no_queries", make([5], 0, 2, 1, 16, 16, 16), {}, {}
    yield "empty_batch", make([], 1, 2, 1, 16, 16, 16), {}, {}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, others, options in cases(device, torch.float32):
        yield Sample((*tensors, others.get("sinks"), others.get("alibi_slopes")), options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"paged_attention": _samples}
