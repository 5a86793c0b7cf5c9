"""Inputs of ``grouped_matmul``: empty groups, rows outside of every group, gathered rows, transposed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample

# name -> offsets, N, K, rows
SHAPES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "empty_first_and_middle": ((0, 0, 5, 5, 40), 47, 97, 40),
    "empty_last_and_rests": ((2, 10, 13, 13), 20, 33, 17),
    "no_rows_used": ((0, 0, 0), 8, 8, 5),
    "one_group": ((0, 7), 130, 40, 7),
    "several_tiles": ((0, 70, 75, 100), 64, 64, 100),
}


def case(
    name: str, device: Any = "cpu", dtype=torch.float32, *, gather=False, transposed=False, bias=False, seed: int = 0
) -> tuple:
    """(a, b, offsets, a_index or None, bias or None); rows that nothing may read hold NaN."""
    offsets, n, k, rows = SHAPES[name]
    generator = torch.Generator().manual_seed(seed + n + k)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    experts = len(offsets) - 1
    b = (normal(experts, n, k) / k**0.5).to(device, dtype)
    if transposed:
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    a = normal(11 if gather else rows, k)
    index = None
    if gather:
        index = torch.randint(0, 11, (rows,), generator=generator)
        # not read outside of the groups
        index[: offsets[0]] = 10**6
        index[offsets[-1] :] = -(10**6)
        index = index.int().to(device)
    else:
        a[: offsets[0]] = torch.nan
        a[offsets[-1] :] = torch.nan
    column = normal(experts, n).to(device, dtype) if bias else None
    return a.to(device, dtype), b, torch.tensor(offsets, dtype=torch.int32, device=device), index, column


def _samples(device: torch.device) -> Iterator[Sample]:
    for i, name in enumerate(SHAPES):
        yield Sample(case(name, device, gather=i % 2 == 1, bias=i % 2 == 0), name=name)
    yield Sample(case("one_group", device, torch.bfloat16, transposed=True), {"out_dtype": torch.float32}, "transposed")
    a, b, offsets, *_ = case("several_tiles", device)
    yield Sample((a[:, 4:], b[..., 4:], offsets.long()), name="views")
    yield Sample((a[:0], b, torch.zeros_like(offsets)), name="no_rows")
    yield Sample((a, b[:0], offsets[:1]), name="no_groups")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"grouped_matmul": _samples}
