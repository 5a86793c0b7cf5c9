"""Partial results of chunks of keys, float32, and their merge in the order of the chunks.

Outputs are [B, S, H, chunks, D] and lse [B, H, S, chunks]: those of one chunk are the results themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.flash import LN2, LOG2E


@triton.jit
def merge_chunks(parts_ptr, part_lse_ptr, row, row_lse, count, chunks, sink, W, SINK: tl.constexpr):
    """Output [W.PAD] and natural-log lse of one row from the first ``count`` of its parts.

    The sink is one more key without a value.
    """
    columns = tl.arange(0, W.PAD)
    acc = tl.zeros([W.PAD], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINK:
        top = sink * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for chunk in range(count):
        lse = tl.load(part_lse_ptr + row_lse * chunks + chunk) * LOG2E
        pointers = parts_ptr + (row * chunks + chunk) * W.D + columns
        part = tl.load(pointers, mask=(columns < W.D) & (lse > float("-inf")), other=0.0)  # [D]
        new_top = tl.maximum(top, lse)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        alpha = tl.exp2(top - safe)
        weight = tl.exp2(lse - safe)
        acc = acc * alpha + part * weight
        total = total * alpha + weight
        top = new_top
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    return acc / safe_total, tl.where(empty, float("-inf"), top * LN2 + tl.log(safe_total))


@triton.jit
def store_row(pointer, row, valid, W):
    """Stores the columns of one row."""
    columns = tl.arange(0, W.PAD)
    tl.store(pointer + columns, row.to(pointer.dtype.element_ty), mask=(columns < W.D) & valid)
