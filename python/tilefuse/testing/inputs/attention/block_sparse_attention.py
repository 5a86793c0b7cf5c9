"""Inputs of ``block_sparse_attention``: shared and per-head lists, repeats, empty rows, ragged blocks, padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .window_attention import qkv


def lists(
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype=torch.int32,
) -> tuple[Tensor, Tensor]:
    """Random lists: unsorted, with repeats, empty rows and a few blocks that do not exist."""
    draw = random.Random(seed)
    index: list[int] = []
    offsets = []
    for _ in range(batch * heads):
        offsets.append(len(index))
        for _ in range(rows):
            index += [draw.randrange(-1, columns + 1) for _ in range(draw.randrange(0, 4))]
            offsets.append(len(index))
    shape = (batch, heads, rows + 1)
    row_offsets, col_index = (torch.tensor(x, dtype=dtype, device=device) for x in (offsets, index))
    return row_offsets.view(shape), col_index


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]]:
    """name, (q, k, v), (row_offsets, col_index, key_mask), the options."""

    def make(batch, sq, sk, heads, kv_heads, dim, dim_v, block, list_batch, list_heads, masked=False, **options):
        tensors = qkv(batch, sq, sk, heads, kv_heads, dim, dim_v, device=device, dtype=dtype)
        index = lists(list_batch, list_heads, -(-sq // block), -(-sk // block), device=device)
        mask = None
        if masked:
            generator = torch.Generator().manual_seed(3)
            mask = (torch.rand(batch, sk, generator=generator) > 0.3).to(device)
            tensors[1][~mask], tensors[2][~mask] = float("nan"), float("inf")
        return tensors, (*index, mask), {"block_size": block, **options}

    yield "shared", *make(2, 50, 50, 2, 1, 16, 16, 16, 1, 1)
    yield "per_head", *make(2, 50, 70, 4, 2, 24, 16, 16, 2, 4)
    yield "per_batch_masked", *make(2, 50, 50, 2, 2, 16, 16, 16, 2, 1, True)
    yield "causal", *make(1, 50, 70, 2, 1, 16, 40, 16, 1, 2, causal=True)
    yield "causal_fewer_keys", *make(1, 70, 50, 4, 2, 16, 16, 24, 1, 4, True, causal=True, scale=0.4)
    yield "tiny_blocks", *make(1, 20, 31, 2, 1, 16, 16, 3, 1, 1)
    yield "wide_blocks", *make(1, 260, 300, 2, 1, 16, 16, 100, 1, 1)
    yield "blocks_of_64", *make(1, 200, 200, 2, 1, 64, 64, 64, 1, 2)
    yield "no_queries", *make(1, 0, 20, 2, 1, 16, 16, 16, 1, 1)
    yield "no_keys", *make(1, 20, 0, 2, 1, 16, 16, 16, 1, 1)


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, index, options in cases(device, torch.float32):
        yield Sample((*tensors, *index), options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"block_sparse_attention": _samples}
