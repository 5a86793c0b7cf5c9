"""Reference of grouped_matmul: one matmul per expert."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...packing import plain
from ..fp8.quantize import expand_scale


def computed(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Expert and rows of every expert that has rows."""
    bounds = offsets.clamp(0, rows).tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            yield e, slice(start, end)


def gather(a: Tensor, index: Tensor | None, index_div: int, here: slice) -> Tensor:
    """Rows of a; an index outside of it counts as a row of zeros."""
    if index is None:
        return computed(a[here])
    at = index[here].long().div(index_div, rounding_mode="floor")
    outside = (at < 0) | (at >= a.shape[0])
    if a.shape[0] == 0:
        return computed(a.new_zeros(at.shape[0], a.shape[1]))
    return computed(a[at.masked_fill(outside, 0)]).masked_fill(outside[:, None], 0)


def matmul_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` in tiles of a fixed number of rows.

    PyTorch's float32 matmul picks its summation by the number of rows: a row's bits would depend on its neighbours.
    """
    tile = 32
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % tile))
    return torch.cat([part @ weight.T for part in padded.split(tile)])[: rows.shape[0]]


def grouped_matmul_fwd(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_index: Tensor | None,
    bias: Tensor | None,
    index_div: int,
    out_dtype: torch.dtype,
    b_scale: Tensor | None = None,
) -> Tensor:
    b = plain(b, 3, a.shape[1])
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    out = computed(a).new_zeros(rows, b.shape[1])
    for e, here in groups(offsets, rows):
        weight = computed(b[e])
        if b_scale is not None:
            scale_rows = 1 if b_scale.shape[1] == b.shape[1] else 128
            weight = weight * expand_scale(b_scale[e], tuple(weight.shape), scale_rows)
        out[here] = matmul_rows(gather(a, a_index, index_div, here), weight)
        if bias is not None:
            out[here] += computed(bias[e])
    return out.to(out_dtype)


def grouped_matmul_wgrad(
    a: Tensor,
    dout: Tensor,
    offsets: Tensor,
    a_index: Tensor | None,
    dout_index: Tensor | None,
    index_div: int,
    out_dtype: torch.dtype,
) -> Tensor:
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    out = computed(a).new_zeros(offsets.shape[0] - 1, dout.shape[1], a.shape[1])
    for e, here in groups(offsets, rows):
        out[e] = gather(dout, dout_index, index_div, here).T @ gather(a, a_index, index_div, here)
    return out.to(out_dtype)
