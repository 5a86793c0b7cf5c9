"""Inputs of ``global_attention``: no, all, last and repeated globals, own projections, padding, causal, dilated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .window_attention import normal, qkv


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, list[Tensor], Tensor, Tensor | None, dict[str, Any]]]:
    """name, [q, k, v(, q_global, k_global, v_global)], global_index, key_mask, the options."""

    def make(batch, length, heads, kv_heads, dim, dim_v, index, own=False, padded=(), **options):
        tensors = list(qkv(batch, length, length, heads, kv_heads, dim, dim_v, device=device, dtype=dtype))
        if own:
            tensors += [normal(*x.shape, device=device, dtype=dtype, seed=21) for x in tensors]
        mask = None
        if padded:
            mask = torch.ones(batch, length, dtype=torch.bool, device=device)
            for b, start in padded:
                mask[b, start:] = False
            for x in tensors:
                x[~mask] = float("nan")
        index = torch.tensor(index, dtype=torch.long, device=device).view(batch, len(index[0]) if index else 0)
        return tensors, index, mask, options

    yield "per_batch", *make(2, 50, 2, 1, 16, 16, [[0, 3], [49, -1]], window=(5, 5))
    yield "own_projections", *make(2, 70, 2, 1, 16, 24, [[0, 3, 3], [49, -1, 20]], True, ((0, 61),), window=(5, 2))
    yield "causal", *make(2, 70, 4, 2, 16, 24, [[0, 3, 69], [49, 20, 1]], window=(9, 4), causal=True)
    yield "dilated", *make(1, 70, 2, 1, 16, 16, [[5, 6, 60]], True, window=(4, 2), dilation=3)
    yield "none", *make(1, 40, 2, 1, 16, 16, [[-1]], True, window=(5, 2))
    yield "no_list", *make(1, 40, 2, 1, 16, 16, [[]], window=(5, 2))
    yield "all", *make(1, 40, 2, 1, 16, 16, [list(range(40))], True, window=(5, 2))
    yield "last", *make(1, 67, 2, 2, 16, 16, [[66]], window=(5, 0))
    yield "neighbours", *make(1, 80, 2, 1, 16, 16, [[30, 31, 32]], window=(10, 10))
    yield "padded_global", *make(2, 50, 2, 1, 16, 16, [[0, 45], [7, 200]], padded=((0, 40), (1, 33)), window=(6, 6))
    tensors, index, _, options = make(1, 10, 2, 1, 16, 16, [[3]], window=(6, 6))
    yield "empty", [x[:0] for x in tensors], index[:0], None, options


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, index, mask, options in cases(device, torch.float32):
        own = tensors[3:] or [None] * 3
        yield Sample((*tensors[:3], index, *own, mask), options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"global_attention": _samples}
