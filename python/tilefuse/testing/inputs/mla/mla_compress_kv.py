"""Inputs of ``mla_compress_kv``: every width and option, tiny and zero rows, views, empty input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .common import normal, tables


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (kv_a, weight, cos, sin, positions) and options."""

    def x(*shape: int) -> Tensor:
        return normal(*shape, device=device, dtype=dtype)

    def weight(rank: int) -> Tensor:
        return (1 + normal(rank, device=device, dtype=torch.float32, seed=3) / 8).to(dtype)

    order = torch.tensor([31, 0, 5, 5, 7, 1, 2], device=device)
    t64 = tables(64, 32, device)
    yield "deepseek", (x(7, 576), weight(512), *t64, order.int()), {}
    yield "half", (x(7, 576), weight(512), *t64, order), {"interleaved": False}
    yield "counted", (x(19, 576), weight(512), *t64, None), {}
    yield "small", (x(7, 320), weight(256), *t64, order), {"eps": 1e-5}
    yield "no_rope", (x(5, 512), weight(512), *tables(0, 1, device), None), {}
    yield "odd_widths", (x(7, 90 + 6), weight(90), *tables(6, 32, device), order), {}
    yield "odd_widths_half", (x(7, 90 + 6), weight(90), *tables(6, 32, device), order), {"interleaved": False}
    # rows whose mean square is near eps, and a row of zeros
    tiny = x(7, 576) * 1e-3
    tiny[3] = 0
    yield "tiny", (tiny, weight(512), *t64, order), {}
    yield "view", (x(7, 1000)[:, 100:676], weight(512), *t64, order), {}
    yield "unaligned", (x(7 * 577).view(7, 577)[:, 1:], weight(512), *t64, order), {}
    yield "float_weight", (x(7, 576), weight(512).float(), *t64, order), {}
    yield "empty", (x(0, 576), weight(512), *t64, order[:0]), {}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"mla_compress_kv": _samples}
