"""The exact rule of integer codes, for Triton kernels: a program has whole groups, and walks along them in tiles.

The same rule as ``tilefuse/reference/lowbit/quantize.py``, to the bit: divisions are correctly rounded, and adding
1.5 * 2^23 rounds to the nearest integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..common import fp8
from .host import groups_of


@triton.jit
def places(total, groups, size, BLOCK_T: tl.constexpr):
    """Of BLOCK_T groups, counted over all rows: whether they exist, rows, numbers in the row, first columns."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = t % groups
    return t < total, t // groups, group, group * size


@triton.jit
def load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K: tl.constexpr):
    """Columns [start, start + BLOCK_K) of groups in float32, 0 outside of them; and where they are, [T, BLOCK_K]."""
    col = start + tl.arange(0, BLOCK_K)
    mask = there[:, None] & (col < size)[None, :] & (first[:, None] + col[None, :] < k)
    return tl.load(x_ptr + (row * x_row + first)[:, None] + col[None, :], mask, 0.0).to(tl.float32), mask


@triton.jit
def extremes(
    x_ptr, x_row, row, first, there, size, k, SYMMETRIC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The ends of the groups' finite values and 0, ``[T]``; of magnitudes, -high and high."""
    low = tl.zeros([BLOCK_T], tl.float32)
    high = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, size, BLOCK_K):
        # [T, BLOCK_K]
        x, _ = load_tile(x_ptr, x_row, row, first, there, start, size, k, BLOCK_K)
        magnitude = fp8.finite_magnitude(x)
        if SYMMETRIC:
            high = tl.maximum(high, tl.max(magnitude.to(tl.float32, bitcast=True), 1))
        else:
            x = tl.where(magnitude == 0, 0.0, x)
            low = tl.minimum(low, tl.min(x, 1))
            high = tl.maximum(high, tl.max(x, 1))
    if SYMMETRIC:
        low = -high
    return low, high


@triton.jit
def group_scale(low, high, eps, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scales and zeros (int32) of groups with these ends."""
    if SYMMETRIC:
        scale = tl.where(high == 0.0, 1.0, tl.div_rn(tl.maximum(high, eps), (2 ** (BITS - 1) - 1) * 1.0))
        zero = tl.full(high.shape, 0 if BITS == 8 else 2 ** (BITS - 1), tl.int32)
    else:
        spread = tl.minimum(high - low, 3.4028234663852886e38)
        scale = tl.where(spread == 0.0, 1.0, tl.div_rn(tl.maximum(spread, eps), (2**BITS - 1) * 1.0))
        zero = tl.minimum(nearest(tl.div_rn(-low, scale)), 2**BITS - 1)
    return scale, zero


@triton.jit
def nearest(y):
    """The nearest integer to |y| < 2^22, ties to even."""
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def quotient(x, scale):
    """``x / scale``, 0 for NaN."""
    y = tl.div_rn(x, scale)
    return tl.where(y == y, y, 0.0)


@triton.jit
def level(y, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """``code - zero`` of quotients, int32, and whether it is what they round to, not a clamp's."""
    if SYMMETRIC:
        end: tl.constexpr = (2 ** (BITS - 1) - 1) * 1.0
        found = nearest(tl.minimum(tl.maximum(y, -end), end))
        inside = tl.abs(y) <= end
    else:
        # past any code all quotients are alike
        code = nearest(tl.minimum(tl.maximum(y, -1024.0), 1024.0)) + zero
        found = tl.minimum(tl.maximum(code, 0), 2**BITS - 1) - zero
        inside = (code >= 0) & (code <= 2**BITS - 1)
    return found, inside


@triton.jit
def load_codes(q_rows, col, columns, mask, BITS: tl.constexpr):
    """Codes (int32) of columns [N] of rows of bytes [M, 1], which hold ``columns``, filling included."""
    if BITS == 8:
        code = tl.load(q_rows + col[None, :], mask, 0).to(tl.int32)
    elif BITS == 4:
        byte = tl.load(q_rows + (col // 2)[None, :], mask, 0).to(tl.int32)
        code = (byte >> (col % 2 * 4)[None, :]) & 15
    else:
        # blocks of 32: low nibbles, then pairs; both are shorter in the last one
        block = col // 32
        nibbles = block * 24 + col % 32 // 2
        pairs = block * 24 + tl.minimum(columns - block * 32, 32) // 2 + col % 32 // 4
        low = tl.load(q_rows + nibbles[None, :], mask, 0).to(tl.int32)
        high = tl.load(q_rows + pairs[None, :], mask, 0).to(tl.int32)
        code = ((low >> (col % 2 * 4)[None, :]) & 15) | (((high >> (col % 4 * 2)[None, :]) & 3) << 4)
    return code


@dataclass(frozen=True)
class Config:
    """Groups of a program and columns of a tile of them."""

    block_t: int
    block_k: int
    num_warps: int


def config(size: int) -> Config:
    """About 16 elements for each of 128 threads."""
    block_k = min(max(16, triton.next_power_of_2(size)), 2048)
    return Config(2048 // block_k, block_k, 4)


def launch_of(x, group_size):
    """Programs with whole groups of x [rows, k]: the grid, (all groups, those of a row, their size, k) and the tile."""
    rows, k = x.shape
    groups, size = groups_of(k, group_size), group_size or max(k, 1)
    tile = config(min(size, max(k, 1)))
    return (triton.cdiv(rows * groups, tile.block_t),), (rows * groups, groups, size, k), tile
