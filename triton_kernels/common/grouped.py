"""Scheduling of grouped matmuls: groups of consecutive rows, their bounds on the device.

A launch covers ``max_tiles(rows, groups, BLOCK_M)`` row tiles, which the host knows without reading the bounds; each
program finds its tile's group from them. Rows that belong to no group, before the first or after the last bound, are
two more groups, whose rows a kernel fills with zeros, so no row is left unwritten.
"""

import triton
import triton.language as tl


def max_tiles(rows: int, groups: int, block_m: int) -> int:
    """Row tiles that any split of `rows` into `groups` groups (and the two rests) can need."""
    return rows // block_m + min(groups + 2, rows)


@triton.jit
def find_tile(tile, offsets_ptr, rows, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group of a row tile, its first row and the end of the group's rows.

    A group >= GROUPS has no matrix: its rows become zero. Past the last tile the first row is past the end.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS + 2)
    g = tl.arange(0, PADDED)
    start = tl.load(offsets_ptr + g, mask=g <= GROUPS, other=0)
    end = tl.load(offsets_ptr + g + 1, mask=g < GROUPS, other=0)
    end = tl.where(g == GROUPS, rows, end)
    end = tl.where(g == GROUPS + 1, tl.load(offsets_ptr), end)
    start = tl.minimum(tl.maximum(start, 0), rows).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), rows).to(tl.int32)
    tiles = tl.where(g < GROUPS + 2, tl.cdiv(tl.maximum(end - start, 0), BLOCK_M), 0)
    group = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(g < group, tiles, 0), axis=0)
    row = tl.sum(tl.where(g == group, start, 0), axis=0) + (tile - before) * BLOCK_M
    row_end = tl.sum(tl.where(g == group, end, 0), axis=0)
    return group, tl.where(group < PADDED, row, rows), tl.where(group < PADDED, row_end, 0)


@triton.jit
def group_rows(group, offsets_ptr, rows):
    """First and past-the-last row of one group."""
    start = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    return tl.minimum(tl.maximum(start, 0), rows).to(tl.int32), tl.minimum(tl.maximum(end, 0), rows).to(tl.int32)


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row tile and column tile of a linear tile: columns inside bands of GROUP_M row tiles, so both stay in L2."""
    band = tile // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile - band * (GROUP_M * tiles_n)
    return first + inside % height, inside // height
