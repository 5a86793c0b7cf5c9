"""Attention over a paged cache: chunks of the visible span in parallel, then one merge per row.

Rows of a kv head's group and of the Sq queries share a tile, so that a decode step fills the matrix unit and reads
each key once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilefuse import arch

from ..common import tuned
from ..common.flash import (
    LN2,
    LOG2E,
    logits,
    softmax_end,
    softmax_start,
    softmax_step,
)
from ..common.launch import on_device
from .window_attention import UNBOUNDED, padded, strides

# keys of one program; fixed, so that a row's result depends on its own sequence alone
CHUNK = 512


@triton.jit
def _e4m3(bits, dtype: tl.constexpr):
    """float8_e4m3fn bytes, exactly: the fields of a half of 1/256 the value."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(dtype)


@triton.jit
def _load_cache(base, offsets, valid, D: tl.constexpr, BD: tl.constexpr, FP8: tl.constexpr, dtype: tl.constexpr):
    """[BN, BD] rows at element offsets; 0 where invalid."""
    columns = tl.arange(0, BD)
    pointers = base + offsets[:, None] + columns[None, :]
    tile = tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0)
    if FP8:
        return _e4m3(tile, dtype)
    else:
        return tile


@triton.jit
def _chunk_kernel(
    Q, K, V, OUT, LSE, TABLE, LENGTHS, SINKS, SLOPES,
    stride_qb, stride_qs, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    stride_ox, stride_ob, stride_os, stride_oh, stride_lx, stride_lb, stride_lh, stride_tb, stride_tp, stride_n,
    sq, heads, kv_heads, group, pages, page_size, max_keys, left, right, scale, softcap, v_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, FP8: tl.constexpr, SINK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One chunk of one row tile: normalised output and lse. SINK only where one chunk is all there is."""
    chunk = tl.program_id(0)
    pid = tl.program_id(1)
    kv = pid % kv_heads
    tiles = tl.cdiv(sq * group, BM)
    tile = pid // kv_heads % tiles
    b = pid // kv_heads // tiles
    row = tile * BM + tl.arange(0, BM)
    j = row // group
    h = kv * group + row % group
    live = row < sq * group
    length = tl.minimum(tl.maximum(tl.load(LENGTHS + b.to(tl.int64) * stride_n).to(tl.int64), 0), max_keys).to(tl.int32)
    at = length - sq + j
    first = length - sq + tile * BM // group
    last = length - sq + tl.minimum(tile * BM + BM - 1, sq * group - 1) // group
    # the span of the whole tile, not of one row
    start = tl.maximum(first - left, 0) + chunk * CHUNK
    stop = tl.minimum(tl.minimum(length, last + right + 1), start + CHUNK)

    batch = b.to(tl.int64)
    sink = tl.zeros([BM], tl.float32)
    if SINK:
        sink = tl.load(SINKS + h, mask=live, other=0.0).to(tl.float32)
    slope = tl.zeros([BM], tl.float32)
    if ALIBI:
        slope = tl.load(SLOPES + h, mask=live, other=0.0).to(tl.float32)
    rows_q = batch * stride_qb + j.to(tl.int64) * stride_qs + h.to(tl.int64) * stride_qh
    columns = tl.arange(0, BD)
    q = tl.load(Q + rows_q[:, None] + columns[None, :], mask=live[:, None] & (columns < D)[None, :], other=0.0)
    K += kv.to(tl.int64) * stride_kh
    V += kv.to(tl.int64) * stride_vh
    TABLE += batch * stride_tb
    top, total = softmax_start(sink, BM, SINK)
    acc = tl.zeros([BM, BDV], tl.float32)
    for n0 in tl.range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        page = tl.load(TABLE + (n // page_size).to(tl.int64) * stride_tp, mask=n < stop, other=-1).to(tl.int64)
        valid = (page >= 0) & (page < pages)
        slot = (n % page_size).to(tl.int64)
        k = _load_cache(K, page * stride_kp + slot * stride_ks, valid, D, BD, FP8, q.dtype)  # [BN, BD]
        s, _ = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        offset = n[None, :] - at[:, None]
        if ALIBI:
            s -= (slope * LOG2E)[:, None] * tl.abs(offset).to(tl.float32)
        s = tl.where((offset >= -left) & (offset <= right) & valid[None, :], s, float("-inf"))
        v = _load_cache(V, page * stride_vp + slot * stride_vs, valid, DV, BDV, FP8, q.dtype)  # [BN, BDV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    out, lse = softmax_end(acc, top, total)
    rows_o = (
        chunk.to(tl.int64) * stride_ox + batch * stride_ob + j.to(tl.int64) * stride_os + h.to(tl.int64) * stride_oh
    )
    value_columns = tl.arange(0, BDV)
    pointers = OUT + rows_o[:, None] + value_columns[None, :]
    result = (out * v_scale).to(OUT.dtype.element_ty)
    tl.store(pointers, result, mask=live[:, None] & (value_columns < DV)[None, :])
    tl.store(LSE + chunk.to(tl.int64) * stride_lx + batch * stride_lb + h.to(tl.int64) * stride_lh + j, lse, mask=live)


@triton.jit
def _merge_kernel(
    PARTS, PART_LSE, OUT, LSE, SINKS, ROWS, stride_px, stride_pb, stride_ps, stride_ph, stride_lx, stride_lb, stride_lh,
    stride_ob, stride_os, stride_oh, stride_tb, stride_th, chunks, sq, heads,
    DV: tl.constexpr, BDV: tl.constexpr, SINK: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Merges the chunks of one row in their order; the sink is one more key without a value.

    With SCATTER the row goes to place ROWS[b, j] of the output, or nowhere if that is negative.
    """
    pid = tl.program_id(0)
    h = pid % heads
    j = pid // heads % sq
    b = (pid // heads // sq).to(tl.int64)
    place = j.to(tl.int64)
    if SCATTER:
        place = tl.load(ROWS + b * sq + j).to(tl.int64)
    row = b * stride_pb + j.to(tl.int64) * stride_ps + h.to(tl.int64) * stride_ph
    row_lse = b * stride_lb + h.to(tl.int64) * stride_lh + j
    columns = tl.arange(0, BDV)
    acc = tl.zeros([BDV], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINK:
        top = tl.load(SINKS + h).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for chunk in range(chunks):
        lse = tl.load(PART_LSE + tl.cast(chunk, tl.int64) * stride_lx + row_lse) * LOG2E
        pointers = PARTS + tl.cast(chunk, tl.int64) * stride_px + row + columns
        part = tl.load(pointers, mask=(columns < DV) & (lse > float("-inf")), other=0.0)
        new_top = tl.maximum(top, lse)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        alpha = tl.exp2(top - safe)
        weight = tl.exp2(lse - safe)
        acc = acc * alpha + part * weight
        total = total * alpha + weight
        top = new_top
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    out = OUT + b * stride_ob + place * stride_os + h.to(tl.int64) * stride_oh + columns
    tl.store(out, (acc / safe_total).to(OUT.dtype.element_ty), mask=(columns < DV) & (place >= 0))
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(safe_total))
    tl.store(LSE + b * stride_tb + h.to(tl.int64) * stride_th + place, lse, mask=place >= 0)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    warps: int
    stages: int


def config(head_dim: int, element_size: int, rows: int, target: str) -> Config:
    """``rows`` = Sq * group; a matrix tile has at least 16. Where 64 keys at a time spill, 32 are read."""
    block_m = min(max(16, triton.next_power_of_2(rows)), 64 if head_dim <= 128 else 32)
    if element_size > 2:
        return Config(min(block_m, 32), 32 if head_dim <= 128 else 16, 4, 1)
    capability = arch.capability(target)
    short = head_dim > 64 and (capability == 120 or (block_m == 64 and (capability == 100 or target.startswith("gfx"))))
    return Config(block_m, 32 if short or head_dim > 128 else 64, 8 if block_m == 64 else 4, 2)


# what `python -m tilefuse tune` tries
CONFIGS = {
    "paged_attention": tuple(
        asdict(Config(block_m, block_n, warps, stages))
        for block_m in (16, 32, 64)
        for block_n, warps, stages in ((32, 4, 2), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2))
    )
}


def paged_attention_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, sinks: Tensor | None,
    alibi_slopes: Tensor | None, left: int, right: int, scale: float, softcap: float, k_scale: float, v_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    left, right = (UNBOUNDED.value if w < 0 else min(w, UNBOUNDED.value) for w in (left, right))
    padded_dim, rows = max(padded(dim), padded(dim_v)), sq * group
    key = f"d={padded_dim},bytes={k_cache.element_size()},rows<={min(64, triton.next_power_of_2(rows))}"
    tile = tuned.choose("paged_attention", key, q.device, config(padded_dim, q.element_size(), rows, arch.of(q.device)))
    max_keys = block_table.shape[1] * page_size
    span = min(max_keys, left + right + 1 + tile.block_m // group + 1)
    chunks = max(1, triton.cdiv(span, CHUNK))
    one = chunks == 1
    parts, part_lse = out[None], lse[None]
    if not one:
        parts = torch.empty((chunks, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((chunks, *lse.shape), dtype=torch.float32, device=q.device)
    with on_device(q):
        _chunk_kernel[(chunks, batch * kv_heads * triton.cdiv(sq * group, tile.block_m))](
            q, k_cache, v_cache, parts, part_lse, block_table, seq_lens, sinks if one else None, alibi_slopes,
            *strides(q), *strides(k_cache), *strides(v_cache), *parts.stride()[:4], *part_lse.stride()[:3],
            *block_table.stride(), seq_lens.stride(0), sq, heads, kv_heads, group, pages, page_size, max_keys, left,
            right,
            scale * k_scale, softcap, v_scale, D=dim, DV=dim_v, BD=padded(dim), BDV=padded(dim_v), BM=tile.block_m,
            BN=tile.block_n, CHUNK=CHUNK, FP8=fp8, SINK=one and sinks is not None, ALIBI=alibi_slopes is not None,
            SOFTCAP=softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if not one:
        with on_device(q):
            _merge_kernel[(batch * sq * heads,)](
                parts, part_lse, out, lse, sinks, None, *parts.stride()[:4], *part_lse.stride()[:3], *strides(out),
                *lse.stride()[:2], chunks, sq, heads, DV=dim_v, BDV=padded(dim_v), SINK=sinks is not None,
                SCATTER=False, num_warps=1,
            )  # fmt: skip
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
            expect={"nvidia": ("MMA",), "_merge_kernel": ()} if dtype != "fp32" else (),
        )
