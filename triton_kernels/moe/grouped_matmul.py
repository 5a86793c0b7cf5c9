"""grouped_matmul: persistent kernels over row tiles of groups, and over the output tiles of the weight gradient.

The rows of a are read through pointers when they are gathered; otherwise, on GPUs with TMA, a and b come in through
tensor descriptors. Large gathered inputs may be gathered first, when a measured configuration says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import triton
import triton.language as tl

from ... import arch
from ...backends import interpreting
from ..common import tuned
from ..common.grouped import find_tile, group_rows, max_tiles, tile_order
from ..common.launch import constants, on_device, scratch
from ..common.rows import Experts, Matrix


@triton.jit
def source_rows(index_ptr, row, valid, count, index_div):
    """Rows of a that output rows read (int64), and whether they exist; no index: the rows themselves."""
    if index_ptr is None:
        at = row.to(tl.int64)
    else:
        at = tl.load(index_ptr + row, mask=valid, other=0).to(tl.int64)
        valid = valid & (at >= 0)
        at = at // index_div
        valid = valid & (at < count)
    return tl.where(valid, at, 0), valid


@triton.jit(do_not_specialize=["rows", "a_rows", "tiles_m", "index_div"])
def grouped_matmul_fwd_kernel(
    a: Matrix,
    b: Experts,
    bias_ptr,
    out_ptr,
    offsets_ptr,
    index_ptr,
    rows,
    a_rows,
    n,
    k,
    tiles_m,
    index_div,
    GROUPS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles program_id, program_id + programs, .. of out [rows, N]."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    if TMA:
        a_blocks = tl.make_tensor_descriptor(a.ptr, [a_rows, k], [a.row, 1], [BLOCK_M, BLOCK_K])
        b_blocks = tl.make_tensor_descriptor(b.ptr, [GROUPS * n, k], [b.row, 1], [BLOCK_N, BLOCK_K])
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        group, row_begin, row_end = find_tile(tile_m, offsets_ptr, rows, GROUPS, BLOCK_M)
        if row_begin < row_end:
            row = row_begin + tl.arange(0, BLOCK_M)
            inside = row < row_end
            col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            # a group without a matrix has no reduction: its rows become zero
            depth = tl.where(group < GROUPS, k, 0)
            if TMA:
                for start in range(0, depth, BLOCK_K):
                    x = a_blocks.load([row_begin, start])  # [BLOCK_M, BLOCK_K]
                    w = b_blocks.load([group * n + tile_n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
                    acc = tl.dot(x, w.T, acc, input_precision="ieee")
            else:
                source, exists = source_rows(index_ptr, row, inside & (group < GROUPS), a_rows, index_div)
                inner = tl.arange(0, BLOCK_K)
                a_at = a.ptr + source[:, None] * a.row
                b_at = b.ptr + group.to(tl.int64) * b.expert + col.to(tl.int64)[None, :] * b.row
                for start in range(0, depth, BLOCK_K):
                    step = start + inner
                    # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
                    x = tl.load(a_at + step[None, :], mask=exists[:, None] & (step < k)[None, :], other=0.0)
                    w_mask = (step < k)[:, None] & (col < n)[None, :]
                    w = tl.load(b_at + step.to(tl.int64)[:, None] * b.column, mask=w_mask, other=0.0)
                    acc = tl.dot(x, w, acc, input_precision="ieee")
            if bias_ptr is not None:
                bias_at = bias_ptr + group.to(tl.int64) * n + col
                acc += tl.load(bias_at, mask=(col < n) & (group < GROUPS), other=0.0).to(tl.float32)[None, :]
            out_at = out_ptr + row.to(tl.int64)[:, None] * n + col[None, :]
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (col < n)[None, :])


@triton.jit(do_not_specialize=["rows", "a_rows", "dout_rows", "index_div"])
def grouped_matmul_wgrad_kernel(
    a: Matrix,
    dout: Matrix,
    out_ptr,
    offsets_ptr,
    a_index_ptr,
    dout_index_ptr,
    rows,
    a_rows,
    dout_rows,
    n,
    k,
    index_div,
    GROUPS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles program_id, program_id + programs, .. of out [GROUPS, N, K]; those of one group are neighbours."""
    tiles_k = tl.cdiv(k, BLOCK_K)
    tiles = tl.cdiv(n, BLOCK_N) * tiles_k
    if TMA:
        a_blocks = tl.make_tensor_descriptor(a.ptr, [a_rows, k], [a.row, 1], [BLOCK_M, BLOCK_K])
        dout_blocks = tl.make_tensor_descriptor(dout.ptr, [dout_rows, n], [dout.row, 1], [BLOCK_M, BLOCK_N])
    for tile in range(tl.program_id(0), GROUPS * tiles, tl.num_programs(0)):
        group = tile // tiles
        tile_n = tile % tiles // tiles_k
        tile_k = tile % tiles_k
        row_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        col_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        begin, end = group_rows(group, offsets_ptr, rows)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        start = begin
        if TMA:
            # whole blocks of rows; what is left must be masked
            start = begin + tl.maximum(end - begin, 0) // BLOCK_M * BLOCK_M
            for whole in range(begin, start, BLOCK_M):
                x = a_blocks.load([whole, tile_k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
                g = dout_blocks.load([whole, tile_n * BLOCK_N])  # [BLOCK_M, BLOCK_N]
                acc = tl.dot(g.T, x, acc, input_precision="ieee")
        for block in range(start, end, BLOCK_M):
            row = block + tl.arange(0, BLOCK_M)
            a_at, a_exists = source_rows(a_index_ptr, row, row < end, a_rows, index_div)
            g_at, g_exists = source_rows(dout_index_ptr, row, row < end, dout_rows, index_div)
            # rows past the end must not enter the sum, not even as 0 * NaN: both sides are masked
            x_at = a.ptr + a_at[:, None] * a.row + col_k[None, :]
            x = tl.load(x_at, mask=a_exists[:, None] & (col_k < k)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            g_at = dout.ptr + g_at[None, :] * dout.row + row_n[:, None]
            g = tl.load(g_at, mask=g_exists[None, :] & (row_n < n)[:, None], other=0.0)  # [BLOCK_N, BLOCK_M]
            acc = tl.dot(g, x, acc, input_precision="ieee")
        out_at = out_ptr + group.to(tl.int64) * n * k + row_n.to(tl.int64)[:, None] * k + col_k[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(row_n < n)[:, None] & (col_k < k)[None, :])


@triton.jit(do_not_specialize=["rows", "a_rows", "index_div"])
def grouped_matmul_gather_kernel(
    a: Matrix,
    index_ptr,
    out_ptr,
    offsets_ptr,
    rows,
    a_rows,
    k,
    index_div,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [rows, K]: the rows that the groups read, the others zero."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    used = (row < rows) & (row >= tl.load(offsets_ptr)) & (row < tl.load(offsets_ptr + GROUPS))
    at, exists = source_rows(index_ptr, row, used, a_rows, index_div)
    # [BLOCK_M, BLOCK_K]
    x = tl.load(a.ptr + at[:, None] * a.row + col[None, :], mask=exists[:, None] & (col < k)[None, :], other=0.0)
    out_at = out_ptr + row.to(tl.int64)[:, None] * k + col[None, :]
    tl.store(out_at, x, mask=(row < rows)[:, None] & (col < k)[None, :])


@dataclass(frozen=True)
class Config:
    """Tile of a grouped matmul; gather_first: copy gathered rows together before the matmul reads them."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    gather_first: bool = False


def bucket(rows_per_group: float) -> int:
    """Shape class of the rows: a power of two from 16 to 4096."""
    return min(4096, max(16, triton.next_power_of_2(max(1, round(rows_per_group)))))


def heuristic(rows: int, groups: int, n: int, k: int, itemsize: int) -> Config:
    """Rows per group choose the tile's height; few rows stream the weights through small tiles."""
    m = bucket(rows / max(1, groups))
    if itemsize == 4:
        return Config(min(m, 64), 64, 32, 8, 4, 2)
    if m <= 16:
        return Config(16, 128, 128, 1, 4, 4)
    if m <= 32:
        return Config(32, 128, 128, 1, 4, 3)
    if m <= 64:
        return Config(64, 128, 64, 2, 4, 4)
    return Config(128, 128 if n <= 1024 else 256, 64, 8, 4 if n <= 1024 else 8, 3)


# bytes of shared memory for a tile's stages: sm_90 and sm_100, sm_80, sm_89 and sm_120, gfx942
BUDGETS = (225 * 1024, 160 * 1024, 96 * 1024, 62 * 1024)


def budget_of(device: torch.device) -> int:
    if device.type != "cuda":
        return max(BUDGETS)
    there = arch.shared_memory(device)
    return max((budget for budget in BUDGETS if budget < there), default=min(BUDGETS))


def fitted(tile: Config, matrices: int, itemsize: int, budget: int) -> Config:
    """The tile with as many stages of its rows and `matrices` column blocks as the budget holds.

    A small budget also means matrix instructions that read registers: 256 columns of sums beside them would spill.
    """
    if budget <= 96 * 1024:
        tile = replace(tile, block_n=min(tile.block_n, 128))

    def stage(t: Config) -> int:
        return (t.block_m + matrices * t.block_n) * t.block_k * itemsize

    while stage(tile) * min(2, tile.num_stages) > budget and tile.block_k > 32:
        tile = replace(tile, block_k=tile.block_k // 2)
    return replace(tile, num_stages=max(1, min(tile.num_stages, budget // stage(tile))))


def shape_key(rows: int, groups: int, n: int, k: int, dtype: torch.dtype) -> str:
    return f"n={n},k={k},m<={bucket(rows / max(1, groups))},bytes={dtype.itemsize}"


# what `python -m tilefuse tune` tries: block_m, block_n, block_k, group_m, warps, stages
TILES = (
    (16, 128, 128, 1, 4, 4),
    (16, 64, 256, 1, 4, 4),
    (32, 128, 128, 1, 4, 4),
    (32, 256, 64, 1, 8, 4),
    (64, 128, 64, 2, 4, 4),
    (64, 256, 64, 2, 8, 4),
    (128, 128, 64, 4, 8, 3),
    (128, 128, 64, 8, 4, 4),
    (128, 256, 64, 8, 8, 3),
    (128, 256, 64, 8, 8, 4),
    (256, 128, 64, 8, 8, 3),
)
TRIED = tuple({**asdict(Config(*tile)), "gather_first": first} for tile in TILES for first in (False, True))
CONFIGS = {"grouped_matmul_fwd": TRIED}


def config(rows: int, groups: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The measured tile, else the heuristic's."""
    tile = fitted(heuristic(rows, groups, n, k, dtype.itemsize), 1, dtype.itemsize, budget_of(device))
    return tuned.choose("grouped_matmul_fwd", shape_key(rows, groups, n, k, dtype), device, tile)


def wgrad_config(n: int, k: int, itemsize: int) -> Config:
    """Tile of the weight gradient; its tiles need no order."""
    if itemsize == 4:
        return Config(32, 64, 64, 1, 4, 2)
    block_n = 128 if n >= 128 else 64 if n > 16 else 16
    block_k = 128 if k >= 128 else 64 if k > 16 else 16
    return Config(64, block_n, block_k, 1, 4, 3)


def programs_of(tiles: int, device: torch.device) -> int:
    """A persistent grid: two programs per multiprocessor, or every tile its own in the interpreter."""
    if device.type != "cuda":
        return min(tiles, 4)
    return min(tiles, 2 * arch.multiprocessors(device))


def fit_tma(*tensors: torch.Tensor) -> bool:
    """Hopper and newer, two bytes an element, and not empty; bases and rows at multiples of 16 bytes."""
    device = tensors[0].device
    if device.type == "cuda":
        if arch.capability(arch.of(device)) < 90:
            return False
    elif not interpreting():
        return False
    return all(
        t.element_size() == 2
        and t.numel() > 0
        and t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and t.stride(-2) > 0
        and t.stride(-2) * t.element_size() % 16 == 0
        for t in tensors
    )


def can_use_tma(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether descriptors reach all of a and b: b's experts lie one after another, since coordinates are 32-bit."""
    experts, n, _ = b.shape
    return fit_tma(a, b) and b.stride(0) == n * b.stride(1) and experts * n < 2**31


def gathered(a, index, offsets, index_div):
    """A copy of the gathered rows, side by side."""
    rows, k = index.shape[0], a.shape[1]
    out = a.new_empty((rows, k))
    if rows and k:
        block_k = min(1024, triton.next_power_of_2(k))
        with on_device(a):
            grouped_matmul_gather_kernel[(triton.cdiv(rows, 4), triton.cdiv(k, block_k))](
                Matrix.of(a),
                index,
                out,
                offsets,
                rows,
                a.shape[0],
                k,
                index_div,
                GROUPS=offsets.shape[0] - 1,
                BLOCK_M=4,
                BLOCK_K=block_k,
                num_warps=4,
            )
    return out


def grouped_matmul_fwd(a, b, offsets, a_index, bias, index_div, out_dtype, _b_scale=None):
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    groups, n, k = b.shape
    out = a.new_empty((rows, n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    tile = config(rows, groups, n, k, a.dtype, a.device)
    if a_index is not None and tile.gather_first:
        a, a_index = gathered(a, a_index, offsets, index_div), None
    tma = a_index is None and can_use_tma(a, b)
    tiles_m = max_tiles(rows, groups, tile.block_m)
    programs = programs_of(tiles_m * triton.cdiv(n, tile.block_n), a.device)
    with on_device(a), scratch(a.device, needed=tma):
        grouped_matmul_fwd_kernel[(programs,)](
            Matrix.of(a),
            Experts.of(b),
            bias,
            out,
            offsets,
            a_index,
            rows,
            a.shape[0],
            n,
            k,
            tiles_m,
            index_div,
            GROUPS=groups,
            TMA=tma,
            **constants(tile),
        )
    return out


def grouped_matmul_wgrad(a, dout, offsets, a_index, dout_index, index_div, out_dtype):
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    groups, n, k = offsets.shape[0] - 1, dout.shape[1], a.shape[1]
    out = a.new_empty((groups, n, k), dtype=out_dtype)
    if out.numel() == 0:
        return out
    tile = wgrad_config(n, k, a.element_size())
    tma = a_index is None and dout_index is None and fit_tma(a, dout)
    programs = programs_of(groups * triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k), a.device)
    with on_device(a), scratch(a.device, needed=tma):
        grouped_matmul_wgrad_kernel[(programs,)](
            Matrix.of(a),
            Matrix.of(dout),
            out,
            offsets,
            a_index,
            dout_index,
            rows,
            a.shape[0],
            dout.shape[0],
            n,
            k,
            index_div,
            GROUPS=groups,
            TMA=tma,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def aot_cases():
    from ...testing.aot import AotCase, launch, tensor, train

    offsets, groups, n, k = tensor("i32", 129), 128, 2048, 768
    spill = "addresses, of a transposed b most, make room for 128 x 256 sums once per tile, outside of the inner loop"
    for dtype in ("bf16", "fp16", "fp32"):
        products = ("MMA",) if dtype != "fp32" else ()
        b = tensor(dtype, groups, n, k)
        for rows in (512, 8, 32, 64) if dtype == "bf16" else (512,):
            slots = rows * groups
            a, index = tensor(dtype, slots // 8, k), tensor("i32", slots)
            gate = {"expect": products, "allow_spill": spill if rows == 512 else None}
            yield AotCase(f"{dtype}_m{rows}_gathered", train("grouped_matmul", a, b, offsets, index), **gate)
            a = tensor(dtype, slots, k)
            yield AotCase(f"{dtype}_m{rows}", train("grouped_matmul", a, b, offsets), **gate)
    # only a measured configuration gathers first
    slots, index = tensor("bf16", 8192, k), tensor("i32", 65536)
    yield AotCase("gather_bf16", launch(gathered, slots, index, offsets, 8))
