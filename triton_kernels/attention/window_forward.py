"""Forward kernel of window attention: one tile of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.flash import (
    head_of,
    kept,
    load_head,
    softmax_end,
    softmax_start,
    softmax_step,
    store_head,
    values_of,
    zeros,
)
from .window_tiles import (
    COUNTS,
    NONE,
    band_tile,
    bias_of,
    find_runs,
    find_sequence,
    find_tile,
    prefix_run,
    prefix_tile,
    run_of,
    tokens,
)


@triton.jit(do_not_specialize=COUNTS)
def window_attention_fwd_kernel(
    q_rows,
    k_rows,
    v_rows,
    out_rows,
    lse_ptr,
    bounds,
    prefix_keys,
    scores,
    rows_q,
    rows_k,
    n_seq,
    heads,
    group,
    left,
    right,
    reach,
    dilation,
    prefix,
    C,
):
    # heads run fastest: neighbours share keys and values in L2
    h = tl.program_id(0) % heads
    kv = (h // group).to(tl.int64)
    h = h.to(tl.int64)
    s, local = find_sequence(
        tl.program_id(0) // heads, bounds, rows_q, rows_k, n_seq, dilation, False, C.BLOCK_M, C.PACKED
    )
    tile = find_tile(local, s, dilation, False, C.BLOCK_M, C.DILATED)
    if tile.start >= tile.rows:
        return
    m = tile.start + tl.arange(0, C.BLOCK_M)
    token = tokens(tile.first, m, dilation, C.DILATED)
    exists = m < tile.rows
    k_head = head_of(k_rows, s.batch, s.first_k, kv)
    v_head = head_of(v_rows, s.batch, s.first_k, kv)
    bias = bias_of(scores, h, C)
    sink = tl.load(scores.sinks + h).to(tl.float32) if C.SINK else 0.0
    q = load_head(head_of(q_rows, s.batch, s.first_q, h), token, exists, C.QK, True)  # [BLOCK_M, D]
    top, total = softmax_start(sink, C.BLOCK_M, C.SINK)
    acc = zeros(C.BLOCK_M, C.V)

    # the prefix: its keys have tokens of their own
    begin = 0
    if C.PREFIX != NONE:
        pk, pv, stop, begin = prefix_run(k_head, v_head, prefix_keys, s, tile, kv, reach, dilation, prefix, C)
        for p0 in tl.range(0, stop, C.BLOCK_N):
            _, v, x, _ = prefix_tile(q, token, p0, pk, pv, prefix_keys, s, reach, prefix, bias, scores, C)
            acc, top, total = softmax_step(acc, top, total, x, v)

    # the band: left edge, full middle, right edge
    runs = find_runs(
        tile.start, tl.minimum(tile.start + C.BLOCK_M, tile.rows), tile.shift, tile.keys, left, right, begin, C.BLOCK_N
    )
    for run in tl.static_range(3):
        start, stop = run_of(runs, run)
        for n0 in tl.range(start, stop, C.BLOCK_N):
            _, v, x, _ = band_tile(
                q, m, n0, k_head, v_head, s, tile, rows_k, left, right, dilation, bias, scores, run != 1, C
            )
            acc, top, total = softmax_step(acc, top, total, x, v)

    out, lse = softmax_end(acc, top, total)
    if C.SKIP:
        shown = tl.load(scores.hidden + s.batch * rows_k + token, mask=exists, other=1) == 0
        out = kept(out, shown)
        lse = tl.where(shown, lse, float("-inf"))
    store_head(head_of(out_rows, s.batch, s.first_q, h), token, exists, out, C.V)
    tl.store(values_of(lse_ptr, s.batch, s.first_q, h, heads, rows_q) + token, lse, mask=exists)
