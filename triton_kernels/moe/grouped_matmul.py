"""grouped_matmul: persistent kernels over row tiles of groups, and over the output tiles of the weight gradient.

The rows of a are read through pointers when they are gathered; otherwise, on GPUs with TMA, a and b come in through
tensor descriptors. Large gathered inputs may be gathered first, when a measured configuration says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ... import arch
from ...backends import interpreting
from ..common import tuned
from ..common.grouped import find_tile, group_rows, groups_padded, max_tiles, tile_order
from ..common.launch import on_device


@triton.jit
def source_rows(index, row, valid, count, index_div, HAS_INDEX: tl.constexpr):
    """Rows of a that output rows read (int64), and whether they exist."""
    if HAS_INDEX:
        at = tl.load(index + row, mask=valid, other=0).to(tl.int64)
        valid = valid & (at >= 0)
        at = at // index_div
        valid = valid & (at < count)
    else:
        at = row.to(tl.int64)
    return tl.where(valid, at, 0), valid


@triton.jit(do_not_specialize=["rows", "a_rows", "tiles_m", "programs", "index_div"])
def grouped_matmul_kernel(
    a, b, bias, out, offsets, index,
    rows, a_rows, N, K, stride_a, stride_be, stride_bn, stride_bk, tiles_m, programs, index_div,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    if TMA:
        a_blocks = tl.make_tensor_descriptor(a, [a_rows, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        b_blocks = tl.make_tensor_descriptor(b, [GROUPS * N, K], [stride_bn, 1], [BLOCK_N, BLOCK_K])
    for tile in range(tl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        group, row_begin, row_end = find_tile(tile_m, offsets, rows, GROUPS, GROUPS_PADDED, BLOCK_M)
        if row_begin < row_end:
            row = row_begin + tl.arange(0, BLOCK_M)
            inside = row < row_end
            col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            # a group without a matrix has no reduction: its rows become zero
            depth = tl.where(group < GROUPS, K, 0)
            if TMA:
                for start in range(0, depth, BLOCK_K):
                    x = a_blocks.load([row_begin, start])  # [BLOCK_M, BLOCK_K]
                    w = b_blocks.load([group * N + tile_n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
                    acc = tl.dot(x, w.T, acc, input_precision="ieee")
            else:
                source, exists = source_rows(index, row, inside & (group < GROUPS), a_rows, index_div, HAS_INDEX)
                k = tl.arange(0, BLOCK_K)
                a_rows_at = a + source[:, None] * stride_a
                b_cols_at = b + group.to(tl.int64) * stride_be + col.to(tl.int64)[None, :] * stride_bn
                for start in range(0, depth, BLOCK_K):
                    step = start + k
                    x = tl.load(a_rows_at + step[None, :], mask=exists[:, None] & (step < K)[None, :], other=0.0)
                    w = tl.load(
                        b_cols_at + step.to(tl.int64)[:, None] * stride_bk,
                        mask=(step < K)[:, None] & (col < N)[None, :],
                        other=0.0,
                    )  # [BLOCK_K, BLOCK_N]
                    acc = tl.dot(x, w, acc, input_precision="ieee")
            if HAS_BIAS:
                column = tl.load(bias + group.to(tl.int64) * N + col, mask=(col < N) & (group < GROUPS), other=0.0)
                acc += column.to(tl.float32)[None, :]
            tl.store(
                out + row.to(tl.int64)[:, None] * N + col[None, :],
                acc.to(out.dtype.element_ty),
                mask=inside[:, None] & (col < N)[None, :],
            )


@triton.jit(do_not_specialize=["rows", "a_rows", "grad_rows", "programs", "index_div"])
def grouped_matmul_wgrad_kernel(
    a, grad, out, offsets, a_index, grad_index,
    rows, a_rows, grad_rows, N, K, stride_a, stride_g, programs, index_div,
    GROUPS: tl.constexpr, A_INDEX: tl.constexpr, GRAD_INDEX: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + programs, .. of out [GROUPS, N, K]; those of one group are neighbours."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    if TMA:
        a_blocks = tl.make_tensor_descriptor(a, [a_rows, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        grad_blocks = tl.make_tensor_descriptor(grad, [grad_rows, N], [stride_g, 1], [BLOCK_M, BLOCK_N])
    for tile in range(tl.program_id(0), GROUPS * tiles, programs):
        group = tile // tiles
        tile_n = tile % tiles // tiles_k
        tile_k = tile % tiles_k
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        begin, end = group_rows(group, offsets, rows)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        start = begin
        if TMA:
            # whole blocks of rows; what is left must be masked
            start = begin + tl.maximum(end - begin, 0) // BLOCK_M * BLOCK_M
            for whole in range(begin, start, BLOCK_M):
                x = a_blocks.load([whole, tile_k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
                g = grad_blocks.load([whole, tile_n * BLOCK_N])  # [BLOCK_M, BLOCK_N]
                acc = tl.dot(g.T, x, acc, input_precision="ieee")
        for block in range(start, end, BLOCK_M):
            row = block + tl.arange(0, BLOCK_M)
            a_at, a_exists = source_rows(a_index, row, row < end, a_rows, index_div, A_INDEX)
            g_at, g_exists = source_rows(grad_index, row, row < end, grad_rows, index_div, GRAD_INDEX)
            # rows past the end must not enter the sum, not even as 0 * NaN: both sides are masked
            x = tl.load(
                a + a_at[:, None] * stride_a + k[None, :], mask=a_exists[:, None] & (k < K)[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            g = tl.load(
                grad + g_at[None, :] * stride_g + n[:, None], mask=g_exists[None, :] & (n < N)[:, None], other=0.0
            )  # [BLOCK_N, BLOCK_M]
            acc = tl.dot(g, x, acc, input_precision="ieee")
        tl.store(
            out + group.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :],
            acc.to(out.dtype.element_ty),
            mask=(n < N)[:, None] & (k < K)[None, :],
        )


@triton.jit(do_not_specialize=["rows", "a_rows", "index_div"])
def gather_rows_kernel(
    a, index, out, offsets, rows, a_rows, K, stride_a, index_div,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows, K]: the rows that the groups read, the others zero."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = (row < rows) & (row >= tl.load(offsets)) & (row < tl.load(offsets + GROUPS))
    at, exists = source_rows(index, row, used, a_rows, index_div, True)
    x = tl.load(a + at[:, None] * stride_a + k[None, :], mask=exists[:, None] & (k < K)[None, :], other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * K + k[None, :], x, mask=(row < rows)[:, None] & (k < K)[None, :])


@dataclass(frozen=True)
class Config:
    """Tile of a grouped matmul; gather_first: copy gathered rows together before the matmul reads them."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    gather_first: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "gather_first"}

    @property
    def tile(self) -> dict[str, int]:
        return {name: value for name, value in self.options.items() if name.isupper()}


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
        tile = replace(tile, BLOCK_N=min(tile.BLOCK_N, 128))

    def stage(t: Config) -> int:
        return (t.BLOCK_M + matrices * t.BLOCK_N) * t.BLOCK_K * itemsize

    while stage(tile) * min(2, tile.num_stages) > budget and tile.BLOCK_K > 32:
        tile = replace(tile, BLOCK_K=tile.BLOCK_K // 2)
    return replace(tile, num_stages=max(1, min(tile.num_stages, budget // stage(tile))))


def shape_key(rows: int, groups: int, n: int, k: int, dtype: torch.dtype) -> str:
    return f"n={n},k={k},m<={bucket(rows / max(1, groups))},bytes={dtype.itemsize}"


# what `python -m tilefuse tune` tries: (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, warps, stages)
TILES = (
    (16, 128, 128, 1, 4, 4), (16, 64, 256, 1, 4, 4), (32, 128, 128, 1, 4, 4), (32, 256, 64, 1, 8, 4),
    (64, 128, 64, 2, 4, 4), (64, 256, 64, 2, 8, 4), (128, 128, 64, 4, 8, 3), (128, 128, 64, 8, 4, 4),
    (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (256, 128, 64, 8, 8, 3),
)  # fmt: skip
TRIED = tuple({**asdict(Config(*tile)), "gather_first": first} for tile in TILES for first in (False, True))
CONFIGS = {"grouped_matmul_fwd": TRIED}


def config(rows: int, groups: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The measured tile, else the heuristic's."""
    tile = fitted(heuristic(rows, groups, n, k, dtype.itemsize), 1, dtype.itemsize, budget_of(device))
    return tuned.choose("grouped_matmul_fwd", shape_key(rows, groups, n, k, dtype), device, tile)


def wgrad_config(n: int, k: int, itemsize: int) -> dict[str, int]:
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    block_n = 128 if n >= 128 else 64 if n > 16 else 16
    block_k = 128 if k >= 128 else 64 if k > 16 else 16
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}


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


def set_scratch(device: torch.device) -> None:
    """Descriptors made on the device live in memory that the launcher provides."""
    if device.type == "cuda":
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


def gathered(a, index, offsets, index_div):
    """A copy of the gathered rows, side by side."""
    rows, k = index.shape[0], a.shape[1]
    out = a.new_empty((rows, k))
    if rows and k:
        block = min(1024, triton.next_power_of_2(k))
        with on_device(a):
            gather_rows_kernel[(triton.cdiv(rows, 4), triton.cdiv(k, block))](
                a, index, out, offsets, rows, a.shape[0], k, a.stride(0), index_div,
                GROUPS=offsets.shape[0] - 1, ROWS=4, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out


def grouped_matmul_fwd(a, b, offsets, a_index, bias, index_div, out_dtype):
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    groups, n, k = b.shape
    out = a.new_empty((rows, n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    tile = config(rows, groups, n, k, a.dtype, a.device)
    with on_device(a):
        if a_index is not None and tile.gather_first:
            a, a_index = gathered(a, a_index, offsets, index_div), None
        tma = a_index is None and can_use_tma(a, b)
        if tma:
            set_scratch(a.device)
        tiles_m = max_tiles(rows, groups, tile.BLOCK_M)
        programs = programs_of(tiles_m * triton.cdiv(n, tile.BLOCK_N), a.device)
        grouped_matmul_kernel[(programs,)](
            a, b, bias, out, offsets, a_index,
            rows, a.shape[0], n, k, a.stride(0), b.stride(0), b.stride(1), b.stride(2), tiles_m, programs, index_div,
            GROUPS=groups, GROUPS_PADDED=groups_padded(groups), HAS_INDEX=a_index is not None,
            HAS_BIAS=bias is not None, TMA=tma, **tile.options,
        )  # fmt: skip
    return out


def grouped_matmul_wgrad(a, grad, offsets, a_index, grad_index, index_div, out_dtype):
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    groups, n, k = offsets.shape[0] - 1, grad.shape[1], a.shape[1]
    out = a.new_empty((groups, n, k), dtype=out_dtype)
    if out.numel() == 0:
        return out
    tile = wgrad_config(n, k, a.element_size())
    tma = a_index is None and grad_index is None and fit_tma(a, grad)
    programs = programs_of(groups * triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(k, tile["BLOCK_K"]), a.device)
    with on_device(a):
        if tma:
            set_scratch(a.device)
        grouped_matmul_wgrad_kernel[(programs,)](
            a, grad, out, offsets, a_index, grad_index,
            rows, a.shape[0], grad.shape[0], n, k, a.stride(0), grad.stride(0), programs, index_div,
            GROUPS=groups, A_INDEX=a_index is not None, GRAD_INDEX=grad_index is not None, TMA=tma, **tile,
        )  # fmt: skip
    return out


def aot_cases():
    from ...testing.aot import AotCase, launch, tensor, train

    offsets, groups, n, k = tensor("i32", 129), 128, 2048, 768
    for dtype in ("bf16", "fp16", "fp32"):
        products = ("MMA",) if dtype != "fp32" else ()
        b = tensor(dtype, groups, n, k)
        for rows in (512, 8, 32, 64) if dtype == "bf16" else (512,):
            slots = rows * groups
            a, index = tensor(dtype, slots // 8, k), tensor("i32", slots)
            yield AotCase(f"{dtype}_m{rows}_gathered", train("grouped_matmul", a, b, offsets, index), expect=products)
            a = tensor(dtype, slots, k)
            yield AotCase(f"{dtype}_m{rows}", train("grouped_matmul", a, b, offsets), expect=products)
    # only a measured configuration gathers first
    slots, index = tensor("bf16", 8192, k), tensor("i32", 65536)
    yield AotCase("gather_bf16", launch(gathered, slots, index, offsets, 8))
