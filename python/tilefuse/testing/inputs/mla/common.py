"""What the inputs of this family share: dimensions, tables and filled caches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rope.rope import normal, tables

__all__ = ["WILD", "latent_cache", "normal", "paged", "surrounded", "tables"]

# what block tables hold past their sequences: nothing may ever follow it
WILD = 2147480000


def surrounded(x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """The same values as a view into NaN, which a kernel that reads beside its argument shows."""
    box = x.new_full([b + n + a for b, n, a in zip(before, x.shape, after, strict=True)], float("nan"))
    return box[tuple(slice(b, b + n) for b, n in zip(before, x.shape, strict=True))].copy_(x)


def paged(lengths: list[int], page_size: int, spare_columns: int, device, dtype=torch.int32, seed: int = 0):
    """A block table over shuffled pages, its tails wild, the lengths tensor, and the number of pages."""
    need = [-(-n // page_size) for n in lengths]
    columns = max([*need, 0]) + spare_columns
    pages = sum(need) + 2
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[: sum(need)]
    table = torch.full((len(lengths), columns), WILD, dtype=torch.int64)
    start = 0
    for b, n in enumerate(need):
        table[b, :n] = order[start : start + n]
        start += n
    return table.to(device, dtype), torch.tensor(lengths, device=device, dtype=dtype), pages


def latent_cache(
    lengths: list[int], table: Tensor, pages: int, page_size: int, rank: int, rope: int, layout: str, dtype, device
) -> Tensor:
    """A cache whose used rows are random and whose every other byte is NaN (0xFF: NaN in each of the formats)."""
    from tilefuse import mla_append_kv

    width = rank + rank // 32 + 2 * rope if layout == "fp8" else rank + rope
    kind = torch.uint8 if layout == "fp8" else dtype
    cache = torch.empty(pages, page_size, width, device=device, dtype=kind)
    cache.view(torch.uint8).fill_(0xFF)
    slots = [int(table[b, i // page_size]) * page_size + i % page_size for b, n in enumerate(lengths) for i in range(n)]
    rows = normal(len(slots), rank + rope, device=device, dtype=torch.float32, seed=7)
    if layout == "fp8":
        import tilefuse

        cos, sin = tables(rope, 1, device)
        weight = torch.ones(rank, device=device)
        index = torch.tensor(slots, device=device, dtype=torch.int64)
        with tilefuse.backend("reference"):
            mla_append_kv(rows, weight, cos, sin, torch.zeros_like(index), cache, index, layout="fp8")
    else:
        index = torch.tensor(slots, device=device, dtype=torch.int64)
        cache[index // page_size, index % page_size] = rows.to(kind)
    return cache
