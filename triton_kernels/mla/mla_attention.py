"""Flash attention whose keys and values differ in width, forward and a two-pass backward without atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common.flash import (
    LOG2E,
    Config,
    Results,
    Width,
    constants_of,
    dkdv_step,
    dots,
    dq_step,
    head_of,
    load_head,
    logits,
    row_gradients,
    scaled,
    softmax_end,
    softmax_start,
    softmax_step,
    store_head,
    values_of,
    zeros,
)
from ..common.launch import launch_options, on_device
from ..common.rows import Rows

COUNTS = ("sequences", "rows_q", "rows_k")


class Constants(NamedTuple):
    """Constants of one compiled kernel."""

    QK: Width
    V: Width
    BLOCK_M: Any
    BLOCK_N: Any
    PACKED: Any
    CAUSAL: Any


class Bounds(NamedTuple):
    """Where the sequences of packed queries and keys begin; absent otherwise."""

    cu_q: Any
    cu_k: Any


class Place(NamedTuple):
    """A tile of one sequence's own rows (queries or keys), and where its other rows are; all in 64 bits."""

    batch: Any
    first: Any  # row of the tile in its sequence
    start: Any  # first of the sequence's own rows
    length: Any
    other_start: Any
    other_length: Any


@triton.jit
def _start(cu_ptr, index, sequences, total):
    """First row of pseudo-sequence ``index`` of a packed tensor, which is the end of the one before it.

    0 is what lies before the first bound and ``sequences + 1`` what lies past the last: their rows belong to no
    sequence, and every row belongs to one pseudo-sequence.
    """
    bound = tl.load(cu_ptr + index - 1, mask=(index > 0) & (index <= sequences + 1), other=0).to(tl.int64)
    return tl.where(index > sequences + 1, total, tl.minimum(tl.maximum(bound, 0), total))


@triton.jit
def _place(cu_ptr, other_cu_ptr, sequences, rows, other_rows, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """The tile of this program; one that does not exist begins past its sequence."""
    pid = tl.program_id(0)
    if PACKED:
        # pseudo-sequence i owns the tiles from start // BLOCK + i on: an upper bound that needs no sum
        found = 0
        past = sequences + 2
        while past - found > 1:
            middle = (found + past) // 2
            if _start(cu_ptr, middle, sequences, rows) // BLOCK + middle <= pid:
                found = middle
            else:
                past = middle
        start = _start(cu_ptr, found, sequences, rows)
        length = tl.maximum(_start(cu_ptr, found + 1, sequences, rows) - start, 0)
        other_start = _start(other_cu_ptr, found, sequences, other_rows)
        other_length = tl.maximum(_start(other_cu_ptr, found + 1, sequences, other_rows) - other_start, 0)
        # rows of no sequence see nothing
        other_length = tl.where((found > 0) & (found <= sequences), other_length, 0)
        first = (pid - start // BLOCK - found) * BLOCK
        return Place(start * 0, first, start, length, other_start, other_length)
    else:
        tiles = tl.cdiv(rows, BLOCK)
        batch = (pid // tiles).to(tl.int64)
        none = batch * 0
        return Place(batch, (pid % tiles).to(tl.int64) * BLOCK, none, none + rows, none, none + other_rows)


@triton.jit
def _scores(products, own, key, visible, scale, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Base-2 logits of raw dot products; the keys that queries stand at, the keys and ``visible`` are broadcast."""
    s, _ = logits(products, scale, 0.0, False)
    if MASK:
        if CAUSAL:
            visible = visible & (key <= own)
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def _key_runs(first, queries, keys, C):
    """(middle, end): a tile of queries sees all keys before the middle, and some up to the end."""
    if C.CAUSAL:
        # the first row of the tile sees the fewest keys
        end = tl.minimum(keys, tl.maximum(first + C.BLOCK_M + keys - queries, 0))
        full = tl.minimum(keys // C.BLOCK_N, tl.maximum(first + 1 + keys - queries, 0) // C.BLOCK_N)
        return full * C.BLOCK_N, end
    else:
        return keys // C.BLOCK_N * C.BLOCK_N, keys


@triton.jit(do_not_specialize=COUNTS)
def mla_attention_fwd_kernel(q_rows, k_rows, v_rows, out_rows, lse_ptr, bounds, scale, sequences, rows_q, rows_k, C):
    head = tl.program_id(1).to(tl.int64)
    p = _place(bounds.cu_q, bounds.cu_k, sequences, rows_q, rows_k, C.BLOCK_M, C.PACKED)
    if p.first >= p.length:
        return
    queries, keys = p.length, p.other_length
    row = p.first + tl.arange(0, C.BLOCK_M)
    live = row < queries
    own = row + (keys - queries)
    q = load_head(head_of(q_rows, p.batch, p.start, head), row, live, C.QK, True)  # [BLOCK_M, D]
    k_head = head_of(k_rows, p.batch, p.other_start, head)
    v_head = head_of(v_rows, p.batch, p.other_start, head)
    top, total = softmax_start(0.0, C.BLOCK_M, False)
    acc = zeros(C.BLOCK_M, C.V)
    middle, end = _key_runs(p.first, queries, keys, C)
    # keys that all rows see, then those at the edge
    for run in tl.static_range(2):
        for key_start in tl.range(0 if run == 0 else middle, middle if run == 0 else end, C.BLOCK_N):
            key = key_start + tl.arange(0, C.BLOCK_N)
            exists = key < keys
            k = load_head(k_head, key, exists, C.QK, run == 1)  # [BLOCK_N, D]
            s = _scores(dots(q, k), own[:, None], key[None, :], exists[None, :], scale, run == 1, C.CAUSAL)
            v = load_head(v_head, key, exists, C.V, run == 1)  # [BLOCK_N, V]
            acc, top, total = softmax_step(acc, top, total, s, v)
    out, _ = softmax_end(acc, top, total)
    store_head(head_of(out_rows, p.batch, p.start, head), row, live, out, C.V)
    # as mla_decode computes it, whose results are merged with these
    empty = total == 0.0
    lse = (tl.where(empty, 0.0, top) + tl.log2(tl.where(empty, 1.0, total))) / LOG2E
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(values_of(lse_ptr, p.batch, p.start, head, tl.num_programs(1), rows_q) + row, lse, mask=live)


@triton.jit(do_not_specialize=COUNTS)
def mla_attention_bwd_q_kernel(q_rows, k_rows, v_rows, results, dq_rows, bounds, scale, sequences, rows_q, rows_k, C):
    """dq of one tile of queries; also writes delta, which the pass over keys reads."""
    head = tl.program_id(1).to(tl.int64)
    p = _place(bounds.cu_q, bounds.cu_k, sequences, rows_q, rows_k, C.BLOCK_M, C.PACKED)
    if p.first >= p.length:
        return
    queries, keys = p.length, p.other_length
    row = p.first + tl.arange(0, C.BLOCK_M)
    live = row < queries
    own = row + (keys - queries)
    q = load_head(head_of(q_rows, p.batch, p.start, head), row, live, C.QK, True)  # [BLOCK_M, D]
    heads = tl.num_programs(1)
    do, delta, lse2 = row_gradients(results, p.batch, p.start, head, heads, rows_q, row, live, C.V, True)
    tl.store(values_of(results.delta, p.batch, p.start, head, heads, rows_q) + row, delta, mask=live)
    k_head = head_of(k_rows, p.batch, p.other_start, head)
    v_head = head_of(v_rows, p.batch, p.other_start, head)
    dq = zeros(C.BLOCK_M, C.QK)
    _, end = _key_runs(p.first, queries, keys, C)
    for key_start in tl.range(0, end, C.BLOCK_N):
        key = key_start + tl.arange(0, C.BLOCK_N)
        exists = key < keys
        k = load_head(k_head, key, exists, C.QK, True)  # [BLOCK_N, D]
        visible = live[:, None] & exists[None, :]
        s = _scores(dots(q, k), own[:, None], key[None, :], visible, scale, True, C.CAUSAL)
        v = load_head(v_head, key, exists, C.V, True)  # [BLOCK_N, V]
        dq = dq_step(dq, k, v, do, s, s, lse2, delta, False)
    store_head(head_of(dq_rows, p.batch, p.start, head), row, live, scaled(dq, scale), C.QK)


@triton.jit(do_not_specialize=COUNTS)
def mla_attention_bwd_kv_kernel(
    q_rows, k_rows, v_rows, results, dk_rows, dv_rows, bounds, scale, sequences, rows_q, rows_k, C
):
    """dk and dv of one tile of keys, over the queries that see it."""
    head = tl.program_id(1).to(tl.int64)
    p = _place(bounds.cu_k, bounds.cu_q, sequences, rows_k, rows_q, C.BLOCK_N, C.PACKED)
    if p.first >= p.length:
        return
    keys, queries = p.length, p.other_length
    key = p.first + tl.arange(0, C.BLOCK_N)
    exists = key < keys
    k = load_head(head_of(k_rows, p.batch, p.start, head), key, exists, C.QK, True)  # [BLOCK_N, D]
    v = load_head(head_of(v_rows, p.batch, p.start, head), key, exists, C.V, True)  # [BLOCK_N, V]
    dk = zeros(C.BLOCK_N, C.QK)
    dv = zeros(C.BLOCK_N, C.V)
    begin = queries * 0
    if C.CAUSAL:
        # the first query row that sees the tile's first key
        begin = tl.minimum(tl.maximum(p.first - (keys - queries), 0) // C.BLOCK_M * C.BLOCK_M, queries)
    q_head = head_of(q_rows, p.batch, p.other_start, head)
    do_head = head_of(results.dout, p.batch, p.other_start, head)
    lse_ptr = values_of(results.lse, p.batch, p.other_start, head, tl.num_programs(1), rows_q)
    delta_ptr = values_of(results.delta, p.batch, p.other_start, head, tl.num_programs(1), rows_q)
    for row_start in tl.range(begin, queries, C.BLOCK_M):
        row = row_start + tl.arange(0, C.BLOCK_M)
        live = row < queries
        own = row + (keys - queries)
        q = load_head(q_head, row, live, C.QK, True)  # [BLOCK_M, D]
        lse2 = tl.load(lse_ptr + row, mask=live, other=float("-inf")) * LOG2E
        delta = tl.load(delta_ptr + row, mask=live, other=0.0)
        visible = exists[:, None] & live[None, :]
        s = _scores(dots(k, q), own[None, :], key[:, None], visible, scale, True, C.CAUSAL)  # [BLOCK_N, BLOCK_M]
        do = load_head(do_head, row, live, C.V, True)  # [BLOCK_M, V]
        dk, dv = dkdv_step(dk, dv, q, v, do, s, s, lse2, delta, False)
    store_head(head_of(dk_rows, p.batch, p.start, head), key, exists, scaled(dk, scale), C.QK)
    store_head(head_of(dv_rows, p.batch, p.start, head), key, exists, dv, C.V)


def fwd_config(dim: int, v_dim: int, element_size: int, target: str) -> Config:
    """Wide tiles where the matrix unit reads operands from shared memory (sm_90, sm_100), narrower ones elsewhere.

    sm_120's instructions need a few registers more than sm_80's, which 128 rows of queries do not leave.
    """
    widest, capability = max(dim, v_dim), arch.capability(target)
    if element_size > 2:
        return Config(16, 16, 8, 1)
    if widest > 256:
        return Config(32, 32, 8, 1)
    if capability == 120:
        return Config(64, 32, 4, 2)
    return Config(128, 64 if capability in (90, 100) else 32, 8, 2)


# the side whose gradient accumulates takes the longer tile; where operands of the matrix unit are registers, anything
# larger spills


def dq_config(dim: int, v_dim: int, element_size: int, target: str) -> Config:
    capability = arch.capability(target)
    if element_size > 2 or max(dim, v_dim) > 256:
        return Config(16, 16, 8, 1)
    if capability == 100:
        return Config(64, 64, 8, 1)
    return Config(64, 16, 8, 1) if capability == 90 else Config(32, 32, 4, 2)


def dkdv_config(dim: int, v_dim: int, element_size: int, target: str) -> Config:
    capability = arch.capability(target)
    if element_size > 2 or max(dim, v_dim) > 256:
        return Config(16, 16, 4, 1)
    if capability == 100:
        return Config(64, 64, 8, 1)
    if capability == 90:
        return Config(32, 64, 8, 2)
    return Config(32, 32, 8, 1) if capability == 120 else Config(32, 32, 4, 2)


def tiles(x: Tensor, cu_seqlens: Tensor | None, block: int) -> int:
    """Upper bound on the tiles of all sequences, known without reading their lengths."""
    rows = x.shape[-3]
    if cu_seqlens is None:
        return triton.cdiv(rows, block) * x.shape[0]
    # every pseudo-sequence may end in a ragged tile
    return rows // block + cu_seqlens.shape[0] + 1


def _options(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, softmax_scale: float
) -> tuple[Bounds, float, int, int, int]:
    """What every kernel takes after its tensors."""
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return Bounds(cu_seqlens_q, cu_seqlens_k), softmax_scale, sequences, q.shape[-3], k.shape[-3]


def mla_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    *lead, rows, heads, dim = q.shape
    v_dim = v.shape[-1]
    out = torch.empty(*lead, rows, heads, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(*lead, heads, rows, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tile = fwd_config(dim, v_dim, q.element_size(), arch.of(q.device))
    rows = (Rows.of(q), Rows.of(k), Rows.of(v))
    options = _options(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    flags = (tile.block_m, tile.block_n, cu_seqlens_q is not None, causal)
    compiled = constants_of(Constants, dim, v_dim, *flags, one_tile=0)
    with on_device(q):
        mla_attention_fwd_kernel[(tiles(q, cu_seqlens_q, tile.block_m), heads)](
            *rows, Rows.of(out), lse, *options, compiled, **launch_options(tile)
        )
    return out, lse


def mla_attention_bwd(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, v_dim = *q.shape[-2:], v.shape[-1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if lse.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    rows = (Rows.of(q), Rows.of(k), Rows.of(v), Results.of(out, dout, lse, dlse, delta))
    options = _options(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    sizes, flags = (dim, v_dim, q.element_size(), arch.of(q.device)), (cu_seqlens_q is not None, causal)
    with on_device(q):
        tile = dq_config(*sizes)
        mla_attention_bwd_q_kernel[(tiles(q, cu_seqlens_q, tile.block_m), heads)](
            *rows,
            Rows.of(dq),
            *options,
            constants_of(Constants, dim, v_dim, tile.block_m, tile.block_n, *flags, one_tile=0),
            **launch_options(tile),
        )
        tile = dkdv_config(*sizes)
        outs = (Rows.of(dk), Rows.of(dv))
        if k.numel():
            mla_attention_bwd_kv_kernel[(tiles(k, cu_seqlens_k, tile.block_n), heads)](
                *rows,
                *outs,
                *options,
                constants_of(Constants, dim, v_dim, tile.block_m, tile.block_n, *flags, one_tile=0),
                **launch_options(tile),
            )
    return dq, dk, dv


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype in ("bf16", "fp32"):
        products = ("LDG.128", "STG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        for packed in (False, True):
            size = (8192,) if packed else (2, 4096)
            q, k, v = (tensor(dtype, *size, 128, d) for d in (192, 192, 128))
            bounds = (tensor("i32", 9),) * 2 if packed else ()
            yield AotCase(
                f"{'packed' if packed else 'padded'}_{dtype}",
                train("mla_attention", q, k, v, *bounds, softmax_scale=192**-0.5),
                expect=products,
                allow_spill="dq of float32: sm_120 keeps three values of a loop outside of its 255 registers"
                if dtype == "fp32"
                else None,
            )
