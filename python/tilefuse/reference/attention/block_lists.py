"""Block lists in CSR form: which blocks of keys each block of queries attends to."""

from __future__ import annotations

import torch
from torch import Tensor


def unexpanded(row_offsets: Tensor) -> Tensor:
    """The lists [B, H, Mb + 1] with 1 for each dim that ``expand`` repeats: every entry belongs to one list again."""
    for dim in (0, 1):
        if row_offsets.stride(dim) == 0:
            row_offsets = row_offsets.narrow(dim, 0, 1)
    return row_offsets


def transpose_lists(row_offsets: Tensor, col_index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Lists of rows per column, repeats kept, rows in ascending order; columns outside of the range are dropped.

    Args:
        row_offsets: ``[B, H, Mb + 1]``, non-decreasing in its flattened order but for dims that ``expand`` repeats.
        col_index: ``[nnz]``.
        columns: Nb.

    Returns:
        int32 offsets ``[B, H, Nb + 1]`` and rows ``[nnz]``. A sort of nnz keys, without a host synchronisation.
    """
    shape = (*row_offsets.shape[:2], columns + 1)
    row_offsets = unexpanded(row_offsets)
    batch, heads, rows = row_offsets.shape[0], row_offsets.shape[1], row_offsets.shape[2] - 1
    lists = batch * heads
    nnz, device = col_index.shape[0], col_index.device
    offsets = row_offsets.reshape(lists, rows + 1).long()
    starts, ends = offsets[:, :-1].reshape(-1).contiguous(), offsets[:, 1:].reshape(-1)
    entry = torch.arange(nnz, device=device)
    if lists * rows == 0 or nnz == 0:
        return torch.zeros(shape, dtype=torch.int32, device=device), entry.int()
    row = torch.searchsorted(starts, entry, right=True) - 1
    clamped = row.clamp(min=0)
    valid = (row >= 0) & (entry < ends[clamped]) & (col_index >= 0) & (col_index < columns)
    key = torch.where(valid, clamped // rows * columns + col_index, lists * columns)
    key, order = torch.sort(key, stable=True)
    bounds = torch.searchsorted(key, torch.arange(lists * columns + 1, device=device))
    at = torch.arange(lists, device=device)[:, None] * columns + torch.arange(columns + 1, device=device)
    return bounds[at].view(batch, heads, columns + 1).int().expand(shape), (clamped % rows)[order].int()
