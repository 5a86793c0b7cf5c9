"""Attention over a paged cache: chunks of the visible span in parallel, then one merge per row.

Rows of a kv head's group and of the Sq queries share a tile, so that a decode step fills the matrix unit and reads
each key once. Tiles of many queries fill a GPU by themselves: they take longer chunks, in the end the whole span.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common import tuned
from ..common.flash import (
    LOG2E,
    Config,
    Head,
    Width,
    constants_of,
    dots,
    logits,
    padded,
    scaled,
    softmax_end,
    softmax_start,
    softmax_step,
    store_head,
    zeros,
)
from ..common.launch import launch_options, on_device
from ..common.rows import Rows
from .chunks import merge_chunks, store_row
from .window_tiles import UNBOUNDED

# keys of one program for each tile of rows; from shapes alone, so that no other sequence changes a row's result
CHUNK = 512
# programs of one sequence from which on its keys are not split
ENOUGH = 128
COUNTS = (
    "sq",
    "kv_heads",
    "group",
    "pages",
    "page_size",
    "table_width",
    "table_stride",
    "left",
    "right",
    "chunk",
    "chunks",
)


class Constants(NamedTuple):
    """Constants of one compiled kernel."""

    QK: Width
    V: Width
    BLOCK_M: Any
    BLOCK_N: Any
    FP8: Any
    SPLIT: Any  # there are several chunks: their merge adds the sink
    SINK: Any
    ALIBI: Any
    SOFTCAP: Any


class Scores(NamedTuple):
    """What happens to a dot product on its way to a score, and to the values."""

    scale: float
    softcap: float
    v_scale: float
    sinks: Any  # [Hq]
    slopes: Any  # [Hq]


@triton.jit
def _e4m3(bits, dtype: tl.constexpr):
    """float8_e4m3fn bytes, exactly: the fields of a half of 1/256 the value."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(dtype)


@triton.jit
def _load_tile(base, offsets, valid, D: tl.constexpr, PAD: tl.constexpr, FP8: tl.constexpr, dtype: tl.constexpr):
    columns = tl.arange(0, PAD)
    # [len(offsets), PAD]
    tile = tl.load(base + offsets[:, None] + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0)
    if FP8:
        return _e4m3(tile, dtype)
    else:
        return tile


@triton.jit
def _load_cache(base, offsets, valid, W, FP8: tl.constexpr, dtype: tl.constexpr):
    """Tiles of rows at element offsets, FP8 codes widened to ``dtype``; 0 where invalid."""
    first = _load_tile(base, offsets, valid, W.FIRST, W.FIRST_PAD, FP8, dtype)
    if W.REST > 0:
        return first, _load_tile(base + W.FIRST, offsets, valid, W.REST, W.REST_PAD, FP8, dtype)
    else:
        return (first,)


@triton.jit
def _span(lengths_ptr, b, tile, sq, group, page_size, table_width, left, right, BLOCK_M: tl.constexpr):
    """(own keys of a sequence, [start, stop) of those that a tile of rows sees): of the whole tile, not of one row."""
    room = table_width.to(tl.int64) * page_size
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int64), 0), room).to(tl.int32)
    first = length - sq + tile * BLOCK_M // group
    last = length - sq + tl.minimum(tile * BLOCK_M + BLOCK_M - 1, sq * group - 1) // group
    return length, tl.maximum(first - left, 0), tl.minimum(length, last + right + 1)


@triton.jit(do_not_specialize=COUNTS)
def paged_attention_fwd_kernel(
    q_rows,
    k_rows,
    v_rows,
    parts_ptr,
    part_lse_ptr,
    table_ptr,
    lengths_ptr,
    scores,
    sq,
    kv_heads,
    group,
    pages,
    page_size,
    table_width,
    table_stride,
    left,
    right,
    chunk,
    C,
):
    """Normalised output and lse of one chunk of keys for one tile of rows."""
    pid = tl.program_id(0)
    kv = pid % kv_heads
    tiles = tl.cdiv(sq * group, C.BLOCK_M)
    tile = pid // kv_heads % tiles
    b = (pid // kv_heads // tiles).to(tl.int64)
    length, start, stop = _span(lengths_ptr, b, tile, sq, group, page_size, table_width, left, right, C.BLOCK_M)

    row = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    j = row // group
    h = kv * group + row % group
    start += tl.program_id(1) * chunk
    # a chunk past the span loads and stores nothing, and the merge does not read it; a return would cost registers
    live = (row < sq * group) & ((tl.program_id(1) == 0) | (start < stop))
    stop = tl.minimum(stop, start + chunk)

    sink = tl.zeros([C.BLOCK_M], tl.float32)
    if C.SINK and not C.SPLIT:
        sink = tl.load(scores.sinks + h, mask=live, other=0.0).to(tl.float32)
    slope = tl.zeros([C.BLOCK_M], tl.float32)
    if C.ALIBI:
        slope = tl.load(scores.slopes + h, mask=live, other=0.0).to(tl.float32)
    at_q = b * q_rows.batch + j.to(tl.int64) * q_rows.token + h.to(tl.int64) * q_rows.head
    q = _load_cache(q_rows.ptr, at_q, live, C.QK, False, tl.float32)  # [BLOCK_M, D]
    k_ptr = k_rows.ptr + kv.to(tl.int64) * k_rows.head
    v_ptr = v_rows.ptr + kv.to(tl.int64) * v_rows.head
    table_ptr += b * table_stride
    top, total = softmax_start(sink, C.BLOCK_M, C.SINK and not C.SPLIT)
    acc = zeros(C.BLOCK_M, C.V)
    for n0 in tl.range(start, stop, C.BLOCK_N):
        n = n0 + tl.arange(0, C.BLOCK_N)
        page = tl.load(table_ptr + n // page_size, mask=n < stop, other=-1).to(tl.int64)
        valid = (page >= 0) & (page < pages)
        slot = (n % page_size).to(tl.int64)
        at_k = page * k_rows.batch + slot * k_rows.token
        k = _load_cache(k_ptr, at_k, valid, C.QK, C.FP8, q[0].dtype)  # [BLOCK_N, D]
        s, _ = logits(dots(q, k), scores.scale, scores.softcap, C.SOFTCAP)
        offset = n[None, :] - (length - sq + j)[:, None]
        if C.ALIBI:
            s -= (slope * LOG2E)[:, None] * tl.abs(offset).to(tl.float32)
        s = tl.where((offset >= -left) & (offset <= right) & valid[None, :], s, float("-inf"))
        at_v = page * v_rows.batch + slot * v_rows.token
        v = _load_cache(v_ptr, at_v, valid, C.V, C.FP8, q[0].dtype)  # [BLOCK_N, DV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    out, lse = softmax_end(acc, top, total)

    # [B, Sq, Hq, chunks, DV] and [B, Hq, Sq, chunks]
    heads = kv_heads * group
    at = ((b * sq + j) * heads + h) * tl.num_programs(1) + tl.program_id(1)
    parts = Head(parts_ptr, C.V.D)
    store_head(parts, at, live, scaled(out, scores.v_scale), C.V)
    at = ((b * heads + h) * sq + j) * tl.num_programs(1) + tl.program_id(1)
    tl.store(part_lse_ptr + at, lse, mask=live)


@triton.jit(do_not_specialize=COUNTS)
def paged_attention_fwd_merge_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    lengths_ptr,
    scores,
    sq,
    kv_heads,
    group,
    pages,
    page_size,
    table_width,
    table_stride,
    left,
    right,
    chunk,
    chunks,
    C,
):
    """One row: the chunks of its tile's span, in their order."""
    heads = kv_heads * group
    h = tl.program_id(0) % heads
    j = tl.program_id(0) // heads % sq
    b = (tl.program_id(0) // heads // sq).to(tl.int64)
    tile = (j * group + h % group) // C.BLOCK_M
    _, start, stop = _span(lengths_ptr, b, tile, sq, group, page_size, table_width, left, right, C.BLOCK_M)
    sink = tl.load(scores.sinks + h).to(tl.float32) if C.SINK else 0.0
    row, row_lse = (b * sq + j) * heads + h, (b * heads + h) * sq + j
    out, lse = merge_chunks(
        parts_ptr, part_lse_ptr, row, row_lse, tl.cdiv(tl.maximum(stop - start, 0), chunk), chunks, sink, C.V, C.SINK
    )
    store_row(out_ptr + row * C.V.D, out, True, C.V)
    tl.store(lse_ptr + row_lse, lse)


def config(head_dim: int, element_size: int, rows: int, target: str) -> Config:
    """``rows`` = Sq * group; a matrix tile has at least 16. Where so many keys at a time spill, half are read."""
    block_m = min(max(16, triton.next_power_of_2(rows)), 64 if head_dim <= 128 else 32)
    capability = arch.capability(target)
    if element_size > 2:
        narrow = head_dim > 128 or (head_dim > 64 and capability == 120)
        return Config(min(block_m, 32), 16 if narrow else 32, 4, 1)
    short = head_dim > 64 and (capability == 120 or (block_m == 64 and (capability == 100 or target.startswith("gfx"))))
    return Config(block_m, 32 if short or head_dim > 128 else 64, 8 if block_m == 64 else 4, 2)


# what `python -m tilefuse tune` tries
CONFIGS = {
    "paged_attention": tuple(
        asdict(Config(block_m, block_n, num_warps, num_stages))
        for block_m in (16, 32, 64)
        for block_n, num_warps, num_stages in ((32, 4, 2), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2))
    )
}


def chunk_size(tiles: int, kv_heads: int, span: int) -> int:
    """Keys of one program. More tiles need fewer chunks: all parts together are smaller than the keys that they read.

    Never a function of the batch or of lengths: no other sequence changes a row's result.
    """
    return max(1, span) if tiles * kv_heads >= ENOUGH else CHUNK * tiles


def paged_attention_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    k_scale: float,
    v_scale: float,
) -> tuple[Tensor, Tensor]:
    batch, sq, heads, dim = q.shape
    pages, page_size, kv_heads, dim_v = v_cache.shape
    group = heads // kv_heads
    out = torch.empty((batch, sq, heads, dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, sq), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    seq_lens = seq_lens.contiguous()
    left, right = (UNBOUNDED.value if w < 0 else min(w, UNBOUNDED.value) for w in (left, right))
    padded_dim, queries = max(padded(dim), padded(dim_v)), sq * group
    key = f"d={padded_dim},bytes={k_cache.element_size()},rows<={min(64, triton.next_power_of_2(queries))}"
    tile = tuned.choose(
        "paged_attention", key, q.device, config(padded_dim, q.element_size(), queries, arch.of(q.device))
    )
    table_width, tiles = block_table.shape[1], triton.cdiv(queries, tile.block_m)
    span = min(table_width * page_size, left + right + 1 + tile.block_m // group + 1)
    chunk = chunk_size(tiles, kv_heads, span)
    chunks = max(1, triton.cdiv(span, chunk))
    parts = (out, lse)
    if chunks > 1:
        shapes = ((batch, sq, heads, chunks, dim_v), (*lse.shape, chunks))
        parts = tuple(torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes)

    flags = (fp8, chunks > 1, sinks is not None, alibi_slopes is not None, softcap > 0)
    compiled = constants_of(Constants, dim, dim_v, tile.block_m, tile.block_n, *flags)
    rows = (Rows.of(q), Rows.of(k_cache), Rows.of(v_cache))
    counts = (sq, kv_heads, group, pages, page_size, table_width, block_table.stride(0), left, right, chunk)
    scores = Scores(scale * k_scale, softcap, v_scale, sinks, alibi_slopes)
    with on_device(q):
        paged_attention_fwd_kernel[(batch * kv_heads * tiles, chunks)](
            *rows, *parts, block_table, seq_lens, scores, *counts, compiled, **launch_options(tile)
        )
        if chunks > 1:
            paged_attention_fwd_merge_kernel[(batch * sq * heads,)](
                *parts, out, lse, seq_lens, scores, *counts, chunks, compiled, num_warps=1
            )
    return out, lse


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for name, dtype, cache, d, queries, heads, extra in (
        ("bf16_d128", "bf16", "bf16", 128, 1, 32, False),
        ("bf16_d64_extra", "bf16", "bf16", 64, 1, 32, True),
        ("fp16_d128_extra", "fp16", "fp16", 128, 1, 4, True),
        ("bf16_d128_queries", "bf16", "bf16", 128, 8, 32, False),
        ("bf16_d256", "bf16", "bf16", 256, 1, 32, False),
        ("bf16_d128_fp8", "bf16", "fp8", 128, 1, 32, True),
        ("fp32_d64", "fp32", "fp32", 64, 1, 32, False),
        ("fp32_d128", "fp32", "fp32", 128, 1, 32, False),
    ):
        q, pages = tensor(dtype, 8, queries, heads, d), tensor(cache, 4096, 64, 4, d)
        per_head = (tensor("fp32", heads),) * 2 if extra else ()
        yield AotCase(
            name,
            call(
                "paged_attention",
                q,
                pages,
                pages,
                tensor("i32", 8, 128),
                tensor("i32", 8),
                *per_head,
                softcap=30.0 if extra else 0.0,
            ),
            expect={"nvidia": ("MMA",), "paged_attention_fwd_merge_kernel": ()} if dtype != "fp32" else (),
        )
