"""Backward kernels of window attention, without atomics: a pass over queries, one over keys, two for the prefix keys.

Few prefix keys are seen by all queries: partial sums over chunks of queries are added up by a kernel of their own.
Where a bias by distance wants its gradient, one more pass runs along the diagonals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.flash import (
    LOG2E,
    Head,
    added,
    dkdv_step,
    dots,
    dq_step,
    head_of,
    kept,
    load_head,
    logit_gradient,
    probabilities,
    row_gradients,
    scaled,
    store_head,
    values_of,
    zeros,
)
from .window_tiles import (
    COUNTS,
    FIRST,
    NONE,
    UNBOUNDED,
    band_scores,
    band_tile,
    bias_of,
    find_runs,
    find_sequence,
    find_tile,
    prefix_positions,
    prefix_run,
    prefix_tile,
    run_of,
    sequence,
    tokens,
)

# queries per partial sum of the prefix keys' gradients
PREFIX_CHUNK = tl.constexpr(512)


@triton.jit(do_not_specialize=COUNTS)
def window_attention_bwd_q_kernel(
    q_rows,
    k_rows,
    v_rows,
    results,
    dq_rows,
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
    """dq of one tile of queries; also writes delta, which the other passes and the sinks' gradient read."""
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
    live = exists
    if C.SKIP:
        live &= tl.load(scores.hidden + s.batch * rows_k + token, mask=exists, other=1) == 0
    k_head = head_of(k_rows, s.batch, s.first_k, kv)
    v_head = head_of(v_rows, s.batch, s.first_k, kv)
    bias = bias_of(scores, h, C)
    q = load_head(head_of(q_rows, s.batch, s.first_q, h), token, live, C.QK, True)  # [BLOCK_M, D]
    do, delta, lse2 = row_gradients(results, s.batch, s.first_q, h, heads, rows_q, token, live, C.V, C.DLSE)
    tl.store(values_of(results.delta, s.batch, s.first_q, h, heads, rows_q) + token, delta, mask=exists)
    dq = zeros(C.BLOCK_M, C.QK)

    # the prefix: its keys have tokens of their own
    begin = 0
    if C.PREFIX != NONE:
        pk, pv, stop, begin = prefix_run(k_head, v_head, prefix_keys, s, tile, kv, reach, dilation, prefix, C)
        for p0 in tl.range(0, stop, C.BLOCK_N):
            k, v, x, capped = prefix_tile(q, token, p0, pk, pv, prefix_keys, s, reach, prefix, bias, scores, C)
            dq = dq_step(dq, k, v, do, x, capped, lse2, delta, C.SOFTCAP)

    # the band: left edge, full middle, right edge
    runs = find_runs(
        tile.start, tl.minimum(tile.start + C.BLOCK_M, tile.rows), tile.shift, tile.keys, left, right, begin, C.BLOCK_N
    )
    for run in tl.static_range(3):
        start, stop = run_of(runs, run)
        for n0 in tl.range(start, stop, C.BLOCK_N):
            k, v, x, capped = band_tile(
                q, m, n0, k_head, v_head, s, tile, rows_k, left, right, dilation, bias, scores, run != 1, C
            )
            dq = dq_step(dq, k, v, do, x, capped, lse2, delta, C.SOFTCAP)

    dq = kept(scaled(dq, scores.scale), live)
    store_head(head_of(dq_rows, s.batch, s.first_q, h), token, exists, dq, C.QK)


@triton.jit
def _add_queries(
    dk, dv, k, v, heads, token, live, valid, offset, left, right, bias, step, scores, MASK: tl.constexpr, C
):
    """Adds one tile of queries to dk and dv; ``offset`` and the logits are [BLOCK_N, BLOCK_M], keys down."""
    q_head, do_head, lse_ptr, delta_ptr = heads
    q = load_head(q_head, token, live, C.QK, MASK)  # [BLOCK_M, D]
    lse2 = tl.load(lse_ptr + token, mask=live, other=float("-inf")) * LOG2E
    delta = tl.load(delta_ptr + token, mask=live, other=0.0)
    x, capped = band_scores(dots(k, q), offset, bias, step, scores, C)
    if MASK:
        visible = (offset >= -left) & (offset <= right) & valid[:, None] & live[None, :]
        x = tl.where(visible, x, float("-inf"))
    do = load_head(do_head, token, live, C.V, MASK)  # [BLOCK_M, DV]
    return dkdv_step(dk, dv, q, v, do, x, capped, lse2, delta, C.SOFTCAP)


@triton.jit
def _query_heads(q_rows, results, s, h, heads, rows_q):
    """What `_add_queries` reads of one head's queries."""
    return (
        head_of(q_rows, s.batch, s.first_q, h),
        head_of(results.dout, s.batch, s.first_q, h),
        values_of(results.lse, s.batch, s.first_q, h, heads, rows_q),
        values_of(results.delta, s.batch, s.first_q, h, heads, rows_q),
    )


@triton.jit(do_not_specialize=COUNTS)
def window_attention_bwd_kv_kernel(
    q_rows,
    k_rows,
    v_rows,
    results,
    dk_rows,
    dv_rows,
    bounds,
    scores,
    rows_q,
    rows_k,
    n_seq,
    kv_heads,
    group,
    left,
    right,
    dilation,
    prefix,
    C,
):
    """dk and dv of one tile of band keys, over all queries of its group's heads."""
    kv = tl.program_id(0) % kv_heads
    s, local = find_sequence(
        tl.program_id(0) // kv_heads, bounds, rows_q, rows_k, n_seq, dilation, True, C.BLOCK_N, C.PACKED
    )
    tile = find_tile(local, s, dilation, True, C.BLOCK_N, C.DILATED)
    n0 = tile.start
    # the first tokens' own kernel writes their gradients
    if C.PREFIX == FIRST:
        n0 += tl.cdiv(tl.maximum(prefix - tile.residue, 0), dilation)
    if n0 >= tile.keys:
        return
    n = n0 + tl.arange(0, C.BLOCK_N)
    key = tokens(tile.residue, n, dilation, C.DILATED)
    valid = n < tile.keys
    shown = valid
    if C.SKIP:
        shown &= tl.load(scores.hidden + s.batch * rows_k + key, mask=valid, other=1) == 0
    head = kv.to(tl.int64)
    k = load_head(head_of(k_rows, s.batch, s.first_k, head), key, shown, C.QK, True)  # [BLOCK_N, D]
    v = load_head(head_of(v_rows, s.batch, s.first_k, head), key, shown, C.V, True)  # [BLOCK_N, DV]
    dk = zeros(C.BLOCK_N, C.QK)
    dv = zeros(C.BLOCK_N, C.V)

    # seen from a key the window is mirrored
    runs = find_runs(n0, tl.minimum(n0 + C.BLOCK_N, tile.keys), -tile.shift, tile.rows, right, left, 0, C.BLOCK_M)
    for g in range(group):
        h = (kv * group + g).to(tl.int64)
        bias = bias_of(scores, h, C)
        query_heads = _query_heads(q_rows, results, s, h, kv_heads * group, rows_q)
        for run in tl.static_range(3):
            start, stop = run_of(runs, run)
            for m0 in tl.range(start, stop, C.BLOCK_M):
                m = m0 + tl.arange(0, C.BLOCK_M)
                token = tokens(tile.first, m, dilation, C.DILATED)
                live = m < tile.rows
                if C.SKIP:
                    live &= tl.load(scores.hidden + s.batch * rows_k + token, mask=live, other=1) == 0
                offset = n[:, None] - (m + tile.shift)[None, :]
                dk, dv = _add_queries(
                    dk,
                    dv,
                    k,
                    v,
                    query_heads,
                    token,
                    live,
                    valid,
                    offset,
                    left,
                    right,
                    bias,
                    dilation,
                    scores,
                    run != 1 or C.SKIP,
                    C,
                )

    # a hidden key is out of the band: its row is zero here
    dk = kept(scaled(dk, scores.scale), shown)
    store_head(head_of(dk_rows, s.batch, s.first_k, head), key, valid, dk, C.QK)
    store_head(head_of(dv_rows, s.batch, s.first_k, head), key, valid, kept(dv, shown), C.V)


@triton.jit
def _part_heads(dk_parts, dv_parts, chunk, kv, kv_heads, prefix, C):
    """Where the partial gradients [chunk, Hkv, prefix, D] of one chunk and head lie."""
    part = (tl.cast(chunk, tl.int64) * kv_heads + kv) * prefix
    return Head(dk_parts + part * C.QK.D, C.QK.D), Head(dv_parts + part * C.V.D, C.V.D)


@triton.jit(do_not_specialize=COUNTS)
def window_attention_bwd_prefix_kernel(
    q_rows,
    prefix_keys,
    results,
    dk_parts,
    dv_parts,
    bounds,
    scores,
    rows_q,
    rows_k,
    n_seq,
    kv_heads,
    group,
    reach,
    prefix,
    C,
):
    """float32 partial gradients of one tile of prefix keys, from one chunk of queries."""
    kv = tl.program_id(0) % kv_heads
    chunk = tl.program_id(0) // kv_heads
    s, local = find_sequence(chunk, bounds, rows_q, rows_k, n_seq, 1, False, PREFIX_CHUNK, C.PACKED)
    if local < 0 or local * PREFIX_CHUNK >= s.sq:
        return
    head = kv.to(tl.int64)
    p = tl.program_id(1) * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    positions = prefix_positions(prefix_keys, s, p, prefix, C.PREFIX)
    there = positions >= 0
    row = s.first_k if C.PREFIX == FIRST else 0
    k = load_head(head_of(prefix_keys.k, s.batch, row, head), p, there, C.QK, True)  # [BLOCK_N, D]
    v = load_head(head_of(prefix_keys.v, s.batch, row, head), p, there, C.V, True)  # [BLOCK_N, DV]
    dk = zeros(C.BLOCK_N, C.QK)
    dv = zeros(C.BLOCK_N, C.V)
    start = local * PREFIX_CHUNK
    stop = tl.minimum(start + PREFIX_CHUNK, s.sq)
    for g in range(group):
        h = (kv * group + g).to(tl.int64)
        bias = bias_of(scores, h, C)
        query_heads = _query_heads(q_rows, results, s, h, kv_heads * group, rows_q)
        for m0 in tl.range(start, stop, C.BLOCK_M):
            m = m0 + tl.arange(0, C.BLOCK_M)
            live = m < stop
            if C.SKIP:
                live &= tl.load(scores.hidden + s.batch * rows_k + m, mask=live, other=1) == 0
            offset = positions[:, None] - (m + (s.sk - s.sq))[None, :]
            # the left bound never hides a prefix key
            dk, dv = _add_queries(
                dk, dv, k, v, query_heads, m, live, there, offset, UNBOUNDED, reach, bias, 1, scores, True, C
            )
    dk_part, dv_part = _part_heads(dk_parts, dv_parts, chunk, kv, kv_heads, prefix, C)
    store_head(dk_part, p, p < prefix, scaled(dk, scores.scale), C.QK)
    store_head(dv_part, p, p < prefix, dv, C.V)


@triton.jit(do_not_specialize=COUNTS)
def window_attention_bwd_prefix_sum_kernel(
    dk_parts, dv_parts, dk_rows, dv_rows, bounds, rows_q, rows_k, kv_heads, prefix, C
):
    """Sums the partial gradients of one sequence's prefix keys in the order of its chunks."""
    kv = tl.program_id(0) % kv_heads
    b = tl.program_id(0) // kv_heads
    s = sequence(b, bounds, rows_q, rows_k, C.PACKED)
    if C.PACKED:
        first = (s.first_q // PREFIX_CHUNK).to(tl.int32) + b
    else:
        first = b * tl.cdiv(rows_q, PREFIX_CHUNK)
    p = tl.program_id(1) * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    dk = zeros(C.BLOCK_N, C.QK)
    dv = zeros(C.BLOCK_N, C.V)
    for chunk in range(first, first + tl.cdiv(s.sq, PREFIX_CHUNK)):
        dk_part, dv_part = _part_heads(dk_parts, dv_parts, chunk, kv, kv_heads, prefix, C)
        dk = added(dk, load_head(dk_part, p, p < prefix, C.QK, True))
        dv = added(dv, load_head(dv_part, p, p < prefix, C.V, True))
    row = s.first_k if C.PREFIX == FIRST else 0
    stop = tl.minimum(prefix, s.sk) if C.PREFIX == FIRST else prefix
    head = kv.to(tl.int64)
    store_head(head_of(dk_rows, s.batch, row, head), p, p < stop, dk, C.QK)
    store_head(head_of(dv_rows, s.batch, row, head), p, p < stop, dv, C.V)


@triton.jit(do_not_specialize=COUNTS)
def window_attention_bwd_bias_kernel(
    q_rows,
    k_rows,
    v_rows,
    results,
    sums_ptr,
    bounds,
    scores,
    rows_q,
    rows_k,
    n_seq,
    heads,
    group,
    left,
    right,
    dilation,
    nearest,
    first_key,
    stop_key,
    tiles,
    C,
):
    """Sums of the biased scores' gradients along BLOCK_N diagonals of one head, from one part of the queries.

    Diagonal t holds the keys t steps before their query, ``nearest`` is the first that has a sum. The diagonals of a
    tile of queries cross BLOCK_M + BLOCK_N - 1 keys. A query meets BLOCK_N of them in a row, so that no two of these
    share a column if tiles of keys are laid over each other: one matrix holds them all. Those of all tiles of queries
    add up, and the sum's own diagonals are summed at the end. Keys are tokens from ``first_key`` up to ``stop_key``.
    """
    h = tl.program_id(0) % heads
    t0 = nearest + tl.program_id(0) // heads * C.BLOCK_N
    part = tl.program_id(1)
    kv = (h // group).to(tl.int64)
    h = h.to(tl.int64)
    bias = bias_of(scores, h, C)
    folded = tl.zeros([C.BLOCK_M, C.BLOCK_N], tl.float32)
    for number in range(part * tiles, (part + 1) * tiles):
        s, local = find_sequence(number, bounds, rows_q, rows_k, n_seq, dilation, False, C.BLOCK_M, C.PACKED)
        tile = find_tile(local, s, dilation, False, C.BLOCK_M, C.DILATED)
        # keys that the diagonals cross; whole tiles of them that nobody sees are left out
        start = tile.start + tile.shift - t0 - C.BLOCK_N + 1
        begin = tl.cdiv(tl.maximum(first_key - tile.residue, 0), dilation)
        keys = tl.minimum(tile.keys, tl.cdiv(tl.maximum(stop_key - tile.residue, 0), dilation))
        stop = tl.minimum(start + C.BLOCK_M + C.BLOCK_N - 1, tile.start + C.BLOCK_M + tile.shift + right)
        stop = tl.minimum(stop, keys)
        unseen = tl.maximum(begin, tile.start + tile.shift - left) - start
        start += tl.maximum(unseen, 0) // C.BLOCK_N * C.BLOCK_N
        # the last part has numbers past the last tile
        stop = tl.where((s.b < n_seq) & (tile.start < tile.rows), stop, start)
        m = tile.start + tl.arange(0, C.BLOCK_M)
        token = tokens(tile.first, m, dilation, C.DILATED)
        live = (m < tile.rows) & (start < stop)
        q = load_head(head_of(q_rows, s.batch, s.first_q, h), token, live, C.QK, True)  # [BLOCK_M, D]
        do, delta, lse2 = row_gradients(results, s.batch, s.first_q, h, heads, rows_q, token, live, C.V, C.DLSE)
        k_head = head_of(k_rows, s.batch, s.first_k, kv)
        v_head = head_of(v_rows, s.batch, s.first_k, kv)
        for n0 in tl.range(start, stop, C.BLOCK_N):
            n = n0 + tl.arange(0, C.BLOCK_N)
            key = tokens(tile.residue, n, dilation, C.DILATED)
            valid = (n >= begin) & (n < keys)
            k = load_head(k_head, key, valid, C.QK, True)  # [BLOCK_N, D]
            v = load_head(v_head, key, valid, C.V, True)  # [BLOCK_N, DV]
            offset = n[None, :] - (m + tile.shift)[:, None]
            x, capped = band_scores(dots(q, k), offset, bias, dilation, scores, C)
            met = (offset <= -t0) & (offset > -t0 - C.BLOCK_N) & (offset >= -left) & (offset <= right)
            met &= valid[None, :] & live[:, None]
            p = probabilities(tl.where(met, x, float("-inf")), lse2[:, None])
            ds = logit_gradient(p, dots(do, v), delta[:, None], capped, False)
            folded += tl.where(met, ds, 0.0)
    # the key of row m on diagonal u is m - 1 - u, modulo a tile's width
    u = tl.arange(0, C.BLOCK_N)
    column = (tl.arange(0, C.BLOCK_M)[:, None] + C.BLOCK_N - 1 - u[None, :]) % C.BLOCK_N
    sums = tl.sum(tl.gather(folded, column, 1), 0)
    of_part = (tl.cast(part, tl.int64) * heads + h) * (tl.num_programs(0) // heads) * C.BLOCK_N
    tl.store(sums_ptr + of_part + (t0 - nearest) + u, sums)
