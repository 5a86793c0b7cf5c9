"""Inputs of ``mla_attention``: padded and packed, longer keys, empty sequences, odd widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .common import normal


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (q, k, v, cu_seqlens_q, cu_seqlens_k) and options."""

    def x(*shape: int, seed: int = 0):
        return normal(*shape, device=device, dtype=dtype, seed=seed)

    def bounds(*lengths: int):
        return torch.tensor([0, *lengths], device=device).cumsum(0).int()

    scale = {"softmax_scale": 192**-0.5}
    yield "padded", (x(2, 70, 2, 192), x(2, 70, 2, 192, seed=1), x(2, 70, 2, 128), None, None), scale
    yield "longer_keys", (x(1, 20, 2, 192), x(1, 150, 2, 192, seed=1), x(1, 150, 2, 128), None, None), scale
    yield "fewer_keys", (x(1, 40, 2, 96), x(1, 20, 2, 96, seed=1), x(1, 20, 2, 64), None, None), scale
    yield (
        "not_causal",
        (x(1, 40, 3, 72), x(1, 33, 3, 72, seed=1), x(1, 33, 3, 40), None, None),
        {
            **scale,
            "causal": False,
        },
    )
    yield "no_rope", (x(1, 17, 1, 64), x(1, 17, 1, 64, seed=1), x(1, 17, 1, 64), None, None), scale
    # empty on either side, on both, and rows past the last sequence
    packed = (x(60, 2, 192), x(90, 2, 192, seed=1), x(90, 2, 128), bounds(17, 0, 9, 0, 30), bounds(17, 8, 0, 0, 65))
    yield "packed", packed, scale
    yield "packed_not_causal", packed, {**scale, "causal": False}
    heads_first = (t.transpose(1, 2) for t in (x(1, 2, 33, 48), x(1, 2, 33, 48, seed=1), x(1, 2, 33, 32)))
    yield "heads_first", (*heads_first, None, None), scale
    yield "no_keys", (x(1, 5, 2, 48), x(1, 0, 2, 48), x(1, 0, 2, 32), None, None), scale
    yield "no_queries", (x(1, 0, 2, 48), x(1, 5, 2, 48), x(1, 5, 2, 32), None, None), scale


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"mla_attention": _samples}
