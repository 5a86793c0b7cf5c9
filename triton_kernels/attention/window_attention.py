"""Sliding-window attention: forward, and a backward of two passes without atomics.

A tile of queries meets at most four runs of keys: a prefix (first tokens, or gathered global keys), the left edge
of the band, its full middle, the right edge. Only the edges compute a mask, each run is a loop of its own, and the
window stays a run-time value. A dilated window is d independent plain windows over the residue classes: class r
addresses token ``r + d * n`` by its stride. ``global_attention`` launches the same kernels with a gathered prefix
and a byte per token that takes it out of the band.
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
    LOG2E,
    load_rows,
    logit_gradient,
    logits,
    probabilities,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from ..common.launch import on_device

# an unbounded window; sums of two stay in int32
UNBOUNDED = tl.constexpr(1 << 29)
# queries per partial sum of the prefix keys' gradients
PREFIX_CHUNK = 512


@triton.jit
def _clamped(CU, index, total):
    return tl.minimum(tl.maximum(tl.load(CU + index).to(tl.int64), 0), total)


@triton.jit
def _find_sequence(CU, total, n_seq, tile, dilation, BLOCK: tl.constexpr):
    """The sequence whose tiles hold `tile`, and its first one: sequence b owns tiles from cu[b] // BLOCK + b * d."""
    low = 0
    high = n_seq
    while high - low > 1:
        middle = (low + high) // 2
        if _clamped(CU, middle, total) // BLOCK + middle * dilation <= tile:
            low = middle
        else:
            high = middle
    return low, (_clamped(CU, low, total) // BLOCK + low * dilation).to(tl.int32)


@triton.jit
def _sequence(
    tile,
    CU,
    CU_Q,
    CU_K,
    own,
    seq_q,
    seq_k,
    total_q,
    total_k,
    n_seq,
    dilation,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """(b, tile within the sequence, first query token, Sq, first key token, Sk)."""
    if VARLEN:
        b, first = _find_sequence(CU, own, n_seq, tile, dilation, BLOCK)
        q0 = _clamped(CU_Q, b, total_q)
        k0 = _clamped(CU_K, b, total_k)
        sq = tl.maximum(_clamped(CU_Q, b + 1, total_q) - q0, 0).to(tl.int32)
        sk = tl.maximum(_clamped(CU_K, b + 1, total_k) - k0, 0).to(tl.int32)
        return b, tile - first, q0, sq, k0, sk
    else:
        per_sequence = dilation * tl.cdiv(tl.cdiv(own, dilation), BLOCK)
        b = tile // per_sequence
        zero = (b * 0).to(tl.int64)
        return b, tile - b * per_sequence, zero, seq_q, zero, seq_k


@triton.jit
def _residue_class(residue, sq, sk, dilation, DILATED: tl.constexpr):
    """(first query, queries, keys, shift) of one class; its query n stands at its key n + shift."""
    delta = sk - sq
    if DILATED:
        first = ((residue - delta) % dilation + dilation) % dilation
        rows = tl.maximum(sq - first + dilation - 1, 0) // dilation
        keys = tl.maximum(sk - residue + dilation - 1, 0) // dilation
        return first, rows, keys, (first + delta - residue) // dilation
    else:
        return 0, sq, sk, delta


@triton.jit
def _tokens(first, index, dilation, DILATED: tl.constexpr):
    if DILATED:
        return first + index * dilation
    else:
        return index


@triton.jit
def _query_runs(m0, m1, shift, keys, left, right, begin, BN: tl.constexpr):
    """(low, edge, middle, high): left edge [low, edge), full tiles [edge, middle), right edge [middle, high)."""
    low = tl.maximum(begin, m0 + shift - left)
    high = tl.maximum(tl.minimum(keys, m1 + shift + right), low)
    full_low = tl.maximum(low, m1 - 1 + shift - left)
    full_high = tl.minimum(keys, m0 + shift + right + 1)
    edge = low + tl.cdiv(full_low - low, BN) * BN
    middle = edge + tl.maximum(full_high - edge, 0) // BN * BN
    return low, edge, middle, high


@triton.jit
def _band_logits(
    q, k, m, n, shift, keys, left, right, hidden, slope, step, scale, softcap,
    MASK: tl.constexpr, SKIP: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [BM, BN] of band keys n, masked at the edges, and the soft cap's tanh."""
    s, capped = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    offset = n[None, :] - (m + shift)[:, None]
    if ALIBI:
        s -= slope * LOG2E * (tl.abs(offset) * step).to(tl.float32)
    if MASK:
        s = tl.where((offset >= -left) & (offset <= right) & (n < keys)[None, :], s, float("-inf"))
    if SKIP:
        s = tl.where((hidden == 0)[None, :], s, float("-inf"))
    return s, capped


@triton.jit
def _prefix_logits(
    q, k, at, positions, reach, slope, scale, softcap, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Base-2 logits of prefix keys at token `positions` (-1: none), visible up to `reach` past the query."""
    s, capped = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    offset = positions[None, :] - at[:, None]
    if ALIBI:
        s -= slope * LOG2E * tl.abs(offset).to(tl.float32)
    return tl.where((offset <= reach) & (positions >= 0)[None, :], s, float("-inf")), capped


@triton.jit
def _prefix_positions(PREFIX_AT, b, p, count, sk, PREFIX: tl.constexpr):
    if PREFIX == 2:
        return tl.load(PREFIX_AT + b.to(tl.int64) * count + p, mask=p < count, other=-1)
    else:
        return tl.where(p < tl.minimum(count, sk), p, -1)


@triton.jit
def _fwd_run(
    acc, top, total, q, K, V, stride_ks, stride_vs, HIDDEN, start, stop, m, shift, keys, left, right, residue, dilation,
    slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    DILATED: tl.constexpr, SKIP: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    for n0 in tl.range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        token = _tokens(residue, n, dilation, DILATED)
        valid = n < keys
        hidden = n * 0
        if SKIP:
            hidden = tl.load(HIDDEN + token, mask=valid, other=1).to(tl.int32)
            valid = valid & (hidden == 0)
        k = load_rows(K, token, stride_ks, valid, D, BD, MASK or SKIP)  # [BN, BD]
        s, _ = _band_logits(
            q, k, m, n, shift, keys, left, right, hidden, slope, dilation, scale, softcap, MASK, SKIP, ALIBI, SOFTCAP
        )
        v = load_rows(V, token, stride_vs, valid, DV, BDV, MASK or SKIP)  # [BN, BDV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    return acc, top, total


@triton.jit
def _fwd_kernel(
    Q, K, V, OUT, LSE, SINKS, SLOPES, CU_Q, CU_K, PK, PV, PREFIX_AT, HIDDEN,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    stride_pkb, stride_pks, stride_pkh, stride_pvb, stride_pvs, stride_pvh,
    seq_q, seq_k, total_q, total_k, n_seq, heads, group, left, right, reach, dilation, prefix, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VARLEN: tl.constexpr, DILATED: tl.constexpr, PREFIX: tl.constexpr, SKIP: tl.constexpr, SINK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # heads run fastest: neighbours share keys and values in L2
    pid = tl.program_id(0)
    h = pid % heads
    b, local, q0, sq, k0, sk = _sequence(
        pid // heads,
        CU_Q,
        CU_Q,
        CU_K,
        total_q if VARLEN else seq_q,
        seq_q,
        seq_k,
        total_q,
        total_k,
        n_seq,
        dilation,
        BM,
        VARLEN,
    )
    per_class = tl.maximum(tl.cdiv(tl.cdiv(sq, dilation), BM), 1)
    residue = local // per_class
    if local < 0 or residue >= dilation:
        return
    first, rows, keys, shift = _residue_class(residue, sq, sk, dilation, DILATED)
    m0 = (local - residue * per_class) * BM
    if m0 >= rows:
        return
    m = m0 + tl.arange(0, BM)
    token = _tokens(first, m, dilation, DILATED)
    batch = b.to(tl.int64) * (0 if VARLEN else 1)
    kv = h // group
    Q += batch * stride_qb + q0 * stride_qs + h.to(tl.int64) * stride_qh
    K += batch * stride_kb + k0 * stride_ks + kv.to(tl.int64) * stride_kh
    V += batch * stride_vb + k0 * stride_vs + kv.to(tl.int64) * stride_vh
    slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
    sink = tl.load(SINKS + h).to(tl.float32) if SINK else 0.0
    live = m < rows
    if SKIP:
        HIDDEN += batch * seq_k
        live = live & (tl.load(HIDDEN + token, mask=live, other=1) == 0)

    q = load_rows(Q, token, stride_qs, m < rows, D, BD, True)  # [BM, BD]
    top, total = softmax_start(sink, BM, SINK)
    acc = tl.zeros([BM, BDV], tl.float32)
    begin = 0
    if PREFIX > 0:
        at = token + (sk - sq)
        if PREFIX == 2:
            PK += batch * stride_pkb + kv.to(tl.int64) * stride_pkh
            PV += batch * stride_pvb + kv.to(tl.int64) * stride_pvh
            stop = prefix
        else:
            PK = K
            PV = V
            last = _tokens(first, tl.minimum(m0 + BM, rows) - 1, dilation, DILATED) + (sk - sq)
            stop = tl.minimum(tl.minimum(prefix, sk), last + reach + 1)
            begin = tl.cdiv(tl.maximum(prefix - residue, 0), dilation)
        for p0 in tl.range(0, stop, BN):
            p = p0 + tl.arange(0, BN)
            positions = _prefix_positions(PREFIX_AT, b, p, prefix, sk, PREFIX)
            k = load_rows(PK, p, stride_pks, positions >= 0, D, BD, True)
            s, _ = _prefix_logits(q, k, at, positions, reach, slope, scale, softcap, ALIBI, SOFTCAP)
            v = load_rows(PV, p, stride_pvs, positions >= 0, DV, BDV, True)
            acc, top, total = softmax_step(acc, top, total, s, v)
    low, edge, middle, high = _query_runs(m0, tl.minimum(m0 + BM, rows), shift, keys, left, right, begin, BN)
    acc, top, total = _fwd_run(
        acc, top, total, q, K, V, stride_ks, stride_vs, HIDDEN, low, tl.minimum(edge, high), m, shift, keys, left,
        right,
        residue, dilation, slope, scale, softcap, D, DV, BD, BDV, BN, True, DILATED, SKIP, ALIBI, SOFTCAP,
    )  # fmt: skip
    acc, top, total = _fwd_run(
        acc, top, total, q, K, V, stride_ks, stride_vs, HIDDEN, edge, middle, m, shift, keys, left, right,
        residue, dilation, slope, scale, softcap, D, DV, BD, BDV, BN, False, DILATED, SKIP, ALIBI, SOFTCAP,
    )  # fmt: skip
    acc, top, total = _fwd_run(
        acc, top, total, q, K, V, stride_ks, stride_vs, HIDDEN, middle, high, m, shift, keys, left, right,
        residue, dilation, slope, scale, softcap, D, DV, BD, BDV, BN, True, DILATED, SKIP, ALIBI, SOFTCAP,
    )  # fmt: skip
    out, lse = softmax_end(acc, top, total)
    if SKIP:
        out = tl.where(live[:, None], out, 0.0)
        lse = tl.where(live, lse, float("-inf"))
    OUT += batch * stride_ob + q0 * stride_os + h.to(tl.int64) * stride_oh
    store_rows(OUT, token, stride_os, m < rows, out, DV, BDV)
    tl.store(LSE + batch * stride_lb + h.to(tl.int64) * stride_lh + q0 + token, lse, mask=m < rows)


@triton.jit
def _dq_run(
    dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, HIDDEN, start, stop, m, shift, keys, left, right, residue,
    dilation,
    slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    DILATED: tl.constexpr, SKIP: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    for n0 in tl.range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        token = _tokens(residue, n, dilation, DILATED)
        valid = n < keys
        hidden = n * 0
        if SKIP:
            hidden = tl.load(HIDDEN + token, mask=valid, other=1).to(tl.int32)
            valid = valid & (hidden == 0)
        k = load_rows(K, token, stride_ks, valid, D, BD, MASK or SKIP)  # [BN, BD]
        s, capped = _band_logits(
            q, k, m, n, shift, keys, left, right, hidden, slope, dilation, scale, softcap, MASK, SKIP, ALIBI, SOFTCAP
        )
        v = load_rows(V, token, stride_vs, valid, DV, BDV, MASK or SKIP)  # [BN, BDV]
        p = probabilities(s, lse2[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = logit_gradient(p, dp, delta[:, None], capped, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    Q, K, V, OUT, DOUT, LSE, DLSE, DELTA, DQ, SLOPES, CU_Q, CU_K, PK, PV, PREFIX_AT, HIDDEN,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh, stride_nb, stride_nh, stride_ns,
    stride_pkb, stride_pks, stride_pkh, stride_pvb, stride_pvs, stride_pvh,
    seq_q, seq_k, total_q, total_k, n_seq, heads, group, left, right, reach, dilation, prefix, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VARLEN: tl.constexpr, DILATED: tl.constexpr, PREFIX: tl.constexpr, SKIP: tl.constexpr, DLSE_GIVEN: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = pid % heads
    b, local, q0, sq, k0, sk = _sequence(
        pid // heads,
        CU_Q,
        CU_Q,
        CU_K,
        total_q if VARLEN else seq_q,
        seq_q,
        seq_k,
        total_q,
        total_k,
        n_seq,
        dilation,
        BM,
        VARLEN,
    )
    per_class = tl.maximum(tl.cdiv(tl.cdiv(sq, dilation), BM), 1)
    residue = local // per_class
    if local < 0 or residue >= dilation:
        return
    first, rows, keys, shift = _residue_class(residue, sq, sk, dilation, DILATED)
    m0 = (local - residue * per_class) * BM
    if m0 >= rows:
        return
    m = m0 + tl.arange(0, BM)
    token = _tokens(first, m, dilation, DILATED)
    batch = b.to(tl.int64) * (0 if VARLEN else 1)
    kv = h // group
    head = h.to(tl.int64)
    Q += batch * stride_qb + q0 * stride_qs + head * stride_qh
    OUT += batch * stride_ob + q0 * stride_os + head * stride_oh
    DOUT += batch * stride_gb + q0 * stride_gs + head * stride_gh
    DQ += batch * stride_db + q0 * stride_ds + head * stride_dh
    K += batch * stride_kb + k0 * stride_ks + kv.to(tl.int64) * stride_kh
    V += batch * stride_vb + k0 * stride_vs + kv.to(tl.int64) * stride_vh
    statistics = batch * stride_lb + head * stride_lh + q0
    slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
    live = m < rows
    if SKIP:
        HIDDEN += batch * seq_k
        live = live & (tl.load(HIDDEN + token, mask=live, other=1) == 0)

    q = load_rows(Q, token, stride_qs, live, D, BD, True)  # [BM, BD]
    do = load_rows(DOUT, token, stride_gs, live, DV, BDV, True)  # [BM, BDV]
    out = load_rows(OUT, token, stride_os, live, DV, BDV, True)  # [BM, BDV]
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE_GIVEN:
        at_dlse = DLSE + batch * stride_nb + head * stride_nh + (q0 + token) * stride_ns
        delta -= tl.load(at_dlse, mask=live, other=0.0).to(tl.float32)
    # the second pass and the sinks' gradient read it
    tl.store(DELTA + statistics + token, delta, mask=m < rows)
    lse2 = tl.load(LSE + statistics + token, mask=live, other=float("-inf")) * LOG2E

    dq = tl.zeros([BM, BD], tl.float32)
    begin = 0
    if PREFIX > 0:
        at = token + (sk - sq)
        if PREFIX == 2:
            PK += batch * stride_pkb + kv.to(tl.int64) * stride_pkh
            PV += batch * stride_pvb + kv.to(tl.int64) * stride_pvh
            stop = prefix
        else:
            PK = K
            PV = V
            last = _tokens(first, tl.minimum(m0 + BM, rows) - 1, dilation, DILATED) + (sk - sq)
            stop = tl.minimum(tl.minimum(prefix, sk), last + reach + 1)
            begin = tl.cdiv(tl.maximum(prefix - residue, 0), dilation)
        for p0 in tl.range(0, stop, BN):
            n = p0 + tl.arange(0, BN)
            positions = _prefix_positions(PREFIX_AT, b, n, prefix, sk, PREFIX)
            k = load_rows(PK, n, stride_pks, positions >= 0, D, BD, True)
            s, capped = _prefix_logits(q, k, at, positions, reach, slope, scale, softcap, ALIBI, SOFTCAP)
            v = load_rows(PV, n, stride_pvs, positions >= 0, DV, BDV, True)
            p = probabilities(s, lse2[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = logit_gradient(p, dp, delta[:, None], capped, SOFTCAP)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    low, edge, middle, high = _query_runs(m0, tl.minimum(m0 + BM, rows), shift, keys, left, right, begin, BN)
    dq = _dq_run(
        dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, HIDDEN, low, tl.minimum(edge, high), m, shift, keys,
        left, right,
        residue, dilation, slope, scale, softcap, D, DV, BD, BDV, BN, True, DILATED, SKIP, ALIBI, SOFTCAP,
    )  # fmt: skip
    dq = _dq_run(
        dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, HIDDEN, edge, middle, m, shift, keys, left, right,
        residue, dilation, slope, scale, softcap, D, DV, BD, BDV, BN, False, DILATED, SKIP, ALIBI, SOFTCAP,
    )  # fmt: skip
    dq = _dq_run(
        dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, HIDDEN, middle, high, m, shift, keys, left, right,
        residue, dilation, slope, scale, softcap, D, DV, BD, BDV, BN, True, DILATED, SKIP, ALIBI, SOFTCAP,
    )  # fmt: skip
    store_rows(DQ, token, stride_ds, m < rows, tl.where(live[:, None], dq * scale, 0.0), D, BD)


@triton.jit
def _transposed_tile(
    k, v, Q, DOUT, LSE, DELTA, stride_qs, stride_gs, m, token, live, shift, keys, n, left, right, slope, step, scale,
    softcap, dk, dv,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Adds one tile of queries to dk and dv; everything is [BN, BM], keys down."""
    q = load_rows(Q, token, stride_qs, live, D, BD, MASK)  # [BM, BD]
    lse2 = tl.load(LSE + token, mask=live, other=float("-inf")) * LOG2E
    delta = tl.load(DELTA + token, mask=live, other=0.0)
    s, capped = logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, SOFTCAP)
    offset = n[:, None] - (m + shift)[None, :]
    if ALIBI:
        s -= slope * LOG2E * (tl.abs(offset) * step).to(tl.float32)
    if MASK:
        visible = (offset >= -left) & (offset <= right) & (n < keys)[:, None] & live[None, :]
        s = tl.where(visible, s, float("-inf"))
    p = probabilities(s, lse2[None, :])
    do = load_rows(DOUT, token, stride_gs, live, DV, BDV, MASK)  # [BM, BDV]
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = logit_gradient(p, dp, delta[None, :], capped, SOFTCAP)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkdv_run(
    dk, dv, k, v, Q, DOUT, LSE, DELTA, HIDDEN, stride_qs, stride_gs, start, stop, rows, first, n, shift, keys, left,
    right,
    dilation, slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr,
    DILATED: tl.constexpr, SKIP: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    for m0 in tl.range(start, stop, BM):
        m = m0 + tl.arange(0, BM)
        token = _tokens(first, m, dilation, DILATED)
        live = m < rows
        if SKIP:
            live = live & (tl.load(HIDDEN + token, mask=live, other=1) == 0)
        dk, dv = _transposed_tile(
            k, v, Q, DOUT, LSE, DELTA, stride_qs, stride_gs, m, token, live, shift, keys, n, left, right, slope,
            dilation,
            scale, softcap, dk, dv, D, DV, BD, BDV, MASK or SKIP, ALIBI, SOFTCAP,
        )  # fmt: skip
    return dk, dv


@triton.jit
def _dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV_OUT, SLOPES, CU_Q, CU_K, HIDDEN,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    stride_lb, stride_lh,
    seq_q, seq_k, total_q, total_k, n_seq, kv_heads, group, left, right, dilation, prefix, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VARLEN: tl.constexpr, DILATED: tl.constexpr, PREFIX: tl.constexpr, SKIP: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv = pid % kv_heads
    b, local, q0, sq, k0, sk = _sequence(
        pid // kv_heads,
        CU_K,
        CU_Q,
        CU_K,
        total_k if VARLEN else seq_k,
        seq_q,
        seq_k,
        total_q,
        total_k,
        n_seq,
        dilation,
        BN,
        VARLEN,
    )
    per_class = tl.maximum(tl.cdiv(tl.cdiv(sk, dilation), BN), 1)
    residue = local // per_class
    if local < 0 or residue >= dilation:
        return
    first, rows, keys, shift = _residue_class(residue, sq, sk, dilation, DILATED)
    n0 = (local - residue * per_class) * BN
    # the first tokens' own kernel writes their gradients
    if PREFIX == 1:
        n0 += tl.cdiv(tl.maximum(prefix - residue, 0), dilation)
    if n0 >= keys:
        return
    n = n0 + tl.arange(0, BN)
    token = _tokens(residue, n, dilation, DILATED)
    batch = b.to(tl.int64) * (0 if VARLEN else 1)
    head = kv.to(tl.int64)
    K += batch * stride_kb + k0 * stride_ks + head * stride_kh
    V += batch * stride_vb + k0 * stride_vs + head * stride_vh
    valid = n < keys
    shown = valid
    if SKIP:
        HIDDEN += batch * seq_k
        shown = valid & (tl.load(HIDDEN + token, mask=valid, other=1) == 0)
    k = load_rows(K, token, stride_ks, shown, D, BD, True)  # [BN, BD]
    v = load_rows(V, token, stride_vs, shown, DV, BDV, True)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)

    # seen from a key the window is mirrored
    n1 = tl.minimum(n0 + BN, keys)
    low, edge, middle, high = _query_runs(n0, n1, -shift, rows, right, left, 0, BM)
    for g in range(group):
        h = (kv * group + g).to(tl.int64)
        slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
        QH = Q + batch * stride_qb + q0 * stride_qs + h * stride_qh
        GH = DOUT + batch * stride_gb + q0 * stride_gs + h * stride_gh
        statistics = batch * stride_lb + h * stride_lh + q0
        dk, dv = _dkdv_run(
            dk, dv, k, v, QH, GH, LSE + statistics, DELTA + statistics, HIDDEN, stride_qs, stride_gs, low,
            tl.minimum(edge, high), rows, first, n, shift, keys, left, right, dilation, slope, scale, softcap,
            D, DV, BD, BDV, BM, True, DILATED, SKIP, ALIBI, SOFTCAP,
        )  # fmt: skip
        dk, dv = _dkdv_run(
            dk, dv, k, v, QH, GH, LSE + statistics, DELTA + statistics, HIDDEN, stride_qs, stride_gs, edge,
            middle, rows, first, n, shift, keys, left, right, dilation, slope, scale, softcap,
            D, DV, BD, BDV, BM, False, DILATED, SKIP, ALIBI, SOFTCAP,
        )  # fmt: skip
        dk, dv = _dkdv_run(
            dk, dv, k, v, QH, GH, LSE + statistics, DELTA + statistics, HIDDEN, stride_qs, stride_gs, middle,
            high, rows, first, n, shift, keys, left, right, dilation, slope, scale, softcap,
            D, DV, BD, BDV, BM, True, DILATED, SKIP, ALIBI, SOFTCAP,
        )  # fmt: skip
    # a hidden key is out of the band: its row is zero here
    dk = tl.where(shown[:, None], dk * scale, 0.0)
    dv = tl.where(shown[:, None], dv, 0.0)
    DK += batch * stride_dkb + k0 * stride_dks + head * stride_dkh
    DV_OUT += batch * stride_dvb + k0 * stride_dvs + head * stride_dvh
    store_rows(DK, token, stride_dks, valid, dk, D, BD)
    store_rows(DV_OUT, token, stride_dvs, valid, dv, DV, BDV)


@triton.jit
def _prefix_dkdv_kernel(
    Q, PK, PV, DOUT, LSE, DELTA, DK_PART, DV_PART, SLOPES, CU_Q, CU_K, PREFIX_AT, HIDDEN,
    stride_qb, stride_qs, stride_qh, stride_pkb, stride_pks, stride_pkh, stride_pvb, stride_pvs, stride_pvh,
    stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    seq_q, seq_k, total_q, total_k, n_seq, kv_heads, group, reach, prefix, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, VARLEN: tl.constexpr, PREFIX: tl.constexpr, SKIP: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Partial gradients of the prefix keys from one chunk of queries: [chunk, Hkv, prefix, D] float32."""
    pid = tl.program_id(0)
    kv = pid % kv_heads
    chunk = pid // kv_heads
    b, local, q0, sq, k0, sk = _sequence(
        chunk, CU_Q, CU_Q, CU_K, total_q if VARLEN else seq_q, seq_q, seq_k, total_q, total_k, n_seq, 1, CHUNK, VARLEN
    )
    if local < 0 or local * CHUNK >= sq:
        return
    batch = b.to(tl.int64) * (0 if VARLEN else 1)
    head = kv.to(tl.int64)
    p = tl.program_id(1) * BN + tl.arange(0, BN)
    positions = _prefix_positions(PREFIX_AT, b, p, prefix, sk, PREFIX)
    row0 = k0 if PREFIX == 1 else k0 * 0
    PK += batch * stride_pkb + row0 * stride_pks + head * stride_pkh
    PV += batch * stride_pvb + row0 * stride_pvs + head * stride_pvh
    if SKIP:
        HIDDEN += batch * seq_k
    k = load_rows(PK, p, stride_pks, positions >= 0, D, BD, True)  # [BN, BD]
    v = load_rows(PV, p, stride_pvs, positions >= 0, DV, BDV, True)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    start = local * CHUNK
    stop = tl.minimum(start + CHUNK, sq)
    for g in range(group):
        h = (kv * group + g).to(tl.int64)
        slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
        QH = Q + batch * stride_qb + q0 * stride_qs + h * stride_qh
        GH = DOUT + batch * stride_gb + q0 * stride_gs + h * stride_gh
        statistics = batch * stride_lb + h * stride_lh + q0
        for m0 in tl.range(start, stop, BM):
            m = m0 + tl.arange(0, BM)
            live = m < stop
            if SKIP:
                live = live & (tl.load(HIDDEN + m, mask=live, other=1) == 0)
            # the left bound never hides a prefix key, and positions of -1 are no keys
            dk, dv = _transposed_tile(
                k, v, QH, GH, LSE + statistics, DELTA + statistics, stride_qs, stride_gs, m, m, live, sk - sq,
                tl.where(positions >= 0, UNBOUNDED, -1), positions, UNBOUNDED, reach, slope, 1, scale, softcap,
                dk, dv, D, DV, BD, BDV, True, ALIBI, SOFTCAP,
            )  # fmt: skip
    part = (chunk.to(tl.int64) * kv_heads + kv) * prefix
    store_rows(DK_PART + part * D, p, D, p < prefix, dk * scale, D, BD)
    store_rows(DV_PART + part * DV, p, DV, p < prefix, dv, DV, BDV)


@triton.jit
def _prefix_reduce_kernel(
    DK_PART, DV_PART, DK, DV_OUT, CU_Q, CU_K, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    seq_q, seq_k, total_q, total_k, kv_heads, prefix,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    VARLEN: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Sums the partial gradients of one sequence in the order of its chunks."""
    pid = tl.program_id(0)
    kv = pid % kv_heads
    b = pid // kv_heads
    if VARLEN:
        q0 = _clamped(CU_Q, b, total_q)
        k0 = _clamped(CU_K, b, total_k)
        sq = tl.maximum(_clamped(CU_Q, b + 1, total_q) - q0, 0).to(tl.int32)
        sk = tl.maximum(_clamped(CU_K, b + 1, total_k) - k0, 0).to(tl.int32)
        first = (q0 // CHUNK).to(tl.int32) + b
        batch = b.to(tl.int64) * 0
    else:
        batch = b.to(tl.int64)
        k0 = batch * 0
        sq = seq_q
        sk = seq_k
        first = b * tl.cdiv(seq_q, CHUNK)
    p = tl.program_id(1) * BN + tl.arange(0, BN)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    for chunk in range(first, first + tl.cdiv(sq, CHUNK)):
        part = (tl.cast(chunk, tl.int64) * kv_heads + kv) * prefix
        dk += load_rows(DK_PART + part * D, p, D, p < prefix, D, BD, True)
        dv += load_rows(DV_PART + part * DV, p, DV, p < prefix, DV, BDV, True)
    stop = tl.minimum(prefix, sk) if PREFIX == 1 else prefix
    DK += batch * stride_dkb + k0 * stride_dks + kv.to(tl.int64) * stride_dkh
    DV_OUT += batch * stride_dvb + k0 * stride_dvs + kv.to(tl.int64) * stride_dvh
    store_rows(DK, p, stride_dks, p < stop, dk, D, BD)
    store_rows(DV_OUT, p, stride_dvs, p < stop, dv, DV, BDV)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    warps: int
    stages: int


def config(kernel: str, head_dim: int, element_size: int, span: int, extras: int, target: str) -> Config:
    """Tile shape of ``fwd``, ``dq``, ``dkdv`` or ``prefix``: the largest that does not spill.

    Args:
        head_dim: the larger padded one of k and v.
        span: keys of a window; a narrow one wastes less of a small tile.
        extras: how many of mask, bias, soft cap, dilation, packing, prefix and ragged head dim cost registers.
        target: the architecture; most share a tile.
    """
    amd, capability = target.startswith("gfx"), arch.capability(target)
    over_keys = kernel in ("dkdv", "prefix")
    if element_size > 2:
        return Config(32 if head_dim <= 64 else 16, 16, 8 if (head_dim <= 64) == over_keys else 4, 1)
    if kernel == "fwd":
        if head_dim <= 64:
            return Config(64, 64, 4, 2) if extras or span <= 256 else Config(128, 64, 8, 3)
        if head_dim <= 128:
            return Config(64, 32, 4, 2) if extras or span <= 256 else Config(128, 64, 8, 2)
        return Config(64, 32, 8, 2)
    if kernel == "dq":
        if head_dim > 128:
            return Config(32, 32, 4, 1)
        narrow = amd if head_dim > 64 else extras and (amd or capability == 120)
        return Config(64, 32 if narrow else 64, 8, 2)
    if head_dim > 128:
        return Config(16 if amd else 32, 32, 8, 1)
    if kernel == "prefix":
        return Config(32, 64 if head_dim <= 64 else 32, 8, 1)
    if head_dim <= 64:
        # with 8 warps the compiler keeps to 128 registers there
        return Config(32, 64, 4 if extras and capability == 100 else 8, 1)
    if extras >= 3:
        return Config(16 if amd else 32, 32, 8, 1)
    if capability == 100:
        return Config(64, 64, 8, 1)
    return Config(32, 64, 8, 1 if extras or amd else 2)


# what `python -m tilefuse tune` tries
TILES = {
    "fwd": ((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 128, 8, 2)),
    "dq": ((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)),
    "dkdv": ((32, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)),
}  # fmt: skip
CONFIGS = {
    f"window_attention_{kernel}": tuple(asdict(Config(*tile)) for tile in tiles) for kernel, tiles in TILES.items()
}


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@dataclass(frozen=True)
class Prefix:
    """Keys that rows see beside their band: the first ``count`` tokens, or gathered ones at ``positions``."""

    count: int
    reach: int  # how far past a query a prefix key may lie
    keys: Tensor | None = None  # [B, G, Hkv, D]
    values: Tensor | None = None
    positions: Tensor | None = None  # [B, G] int32, -1 = none

    @property
    def kind(self) -> int:
        return 0 if self.count == 0 else 1 if self.keys is None else 2


@dataclass(frozen=True)
class Problem:
    """One call's tensors and options, shared by its kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    slopes: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    left: int
    right: int
    dilation: int
    scale: float
    softcap: float
    prefix: Prefix
    hidden: Tensor | None = None  # uint8 [B, S], nonzero = not in the band, neither as key nor as query

    @property
    def packed(self) -> bool:
        return self.q.dim() == 3

    @property
    def window(self) -> tuple[int, int]:
        return tuple(UNBOUNDED.value if w < 0 else min(w, UNBOUNDED.value) for w in (self.left, self.right))

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """seq_q, seq_k, total_q, total_k, number of sequences."""
        if self.packed:
            return 0, 0, self.q.shape[0], self.k.shape[0], self.cu_q.shape[0] - 1
        return self.q.shape[1], self.k.shape[1], 0, 0, self.q.shape[0]

    def tiles(self, queries: bool, block: int, dilation: int) -> int:
        """Upper bound on the tiles of all sequences, known without reading their lengths."""
        seq_q, seq_k, total_q, total_k, n_seq = self.sizes
        if self.packed:
            return (total_q if queries else total_k) // block + n_seq * dilation
        return n_seq * dilation * triton.cdiv(triton.cdiv(seq_q if queries else seq_k, dilation), block)

    def config(self, kernel: str) -> Config:
        left, right = self.window
        d, dv = self.q.shape[-1], self.v.shape[-1]
        extras = (
            (d, dv) != (padded(d), padded(dv)), self.slopes is not None, self.hidden is not None, self.packed,
            self.dilation > 1, self.softcap > 0, self.prefix.kind > 0,
        )  # fmt: skip
        dim, size, span = max(padded(d), padded(dv)), self.q.element_size(), left + right + 1
        tile = config(kernel, dim, size, span, sum(extras), arch.of(self.q.device))
        key = f"d={dim},bytes={size},span<={min(4096, triton.next_power_of_2(span))},extras={sum(extras)}"
        return tuned.choose(f"window_attention_{kernel}", key, self.q.device, tile)

    @property
    def dims(self) -> dict[str, int]:
        d, dv = self.q.shape[-1], self.v.shape[-1]
        return {"D": d, "DV": dv, "BD": padded(d), "BDV": padded(dv)}

    @property
    def prefix_strides(self) -> tuple[int, ...]:
        keys, values = (self.k, self.v) if self.prefix.kind < 2 else (self.prefix.keys, self.prefix.values)
        return *strides(keys), *strides(values)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and head; a packed tensor has no batch."""
    return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else x.stride()[:3]


def statistics_strides(x: Tensor) -> tuple[int, int]:
    return (0, x.stride(0)) if x.dim() == 2 else x.stride()[:2]


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, prefix = problem.q, problem.k, problem.v, problem.prefix
    seq_q, seq_k, total_q, total_k, n_seq = problem.sizes
    # a packed batch may leave tokens to no sequence
    new = torch.zeros if problem.packed else torch.empty
    out = new((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if problem.packed:
        lse.fill_(float("-inf"))
    tile = problem.config("fwd")
    heads = q.shape[-2]
    grid = (problem.tiles(True, tile.block_m, problem.dilation) * heads,)
    if grid[0] == 0 or n_seq == 0:
        return out, lse
    with on_device(q):
        _fwd_kernel[grid](
            q, k, v, out, lse, problem.sinks, problem.slopes, problem.cu_q, problem.cu_k, prefix.keys, prefix.values,
            prefix.positions, problem.hidden,
            *strides(q), *strides(k), *strides(v), *strides(out), *statistics_strides(lse), *problem.prefix_strides,
            seq_q, seq_k, total_q, total_k, n_seq, heads, heads // k.shape[-2], *problem.window, prefix.reach,
            problem.dilation, prefix.count, problem.scale, problem.softcap, **problem.dims, BM=tile.block_m,
            BN=tile.block_n,
            VARLEN=problem.packed, DILATED=problem.dilation > 1, PREFIX=prefix.kind, SKIP=problem.hidden is not None,
            SINK=problem.sinks is not None, ALIBI=problem.slopes is not None, SOFTCAP=problem.softcap > 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def backward(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    key_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv (in ``key_dtype``), delta (float32, as lse), float32 gradients of gathered prefix keys and values."""
    q, k, v, prefix = problem.q, problem.k, problem.v, problem.prefix
    seq_q, seq_k, total_q, total_k, n_seq = problem.sizes
    new = torch.zeros if problem.packed else torch.empty
    dq = new(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (new(x.shape, dtype=key_dtype or x.dtype, device=x.device) for x in (k, v))
    delta = new(lse.shape, dtype=torch.float32, device=q.device)
    dpk = dpv = None
    if prefix.kind == 2:
        dpk, dpv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (prefix.keys, prefix.values))
    heads, kv_heads = q.shape[-2], k.shape[-2]
    group = heads // kv_heads
    dlse_strides = (0, 0, 0)
    if dlse is not None:
        dlse_strides = (0, *dlse.stride()) if dlse.dim() == 2 else dlse.stride()
    flags = {
        "VARLEN": problem.packed, "PREFIX": prefix.kind, "SKIP": problem.hidden is not None,
        "ALIBI": problem.slopes is not None, "SOFTCAP": problem.softcap > 0,
    }  # fmt: skip
    sizes = (seq_q, seq_k, total_q, total_k, n_seq)

    tile = problem.config("dq")
    grid = (problem.tiles(True, tile.block_m, problem.dilation) * heads,)
    if grid[0] > 0 and n_seq > 0:
        with on_device(q):
            _dq_kernel[grid](
                q, k, v, out, dout, lse, dlse, delta, dq, problem.slopes, problem.cu_q, problem.cu_k, prefix.keys,
                prefix.values, prefix.positions, problem.hidden,
                *strides(q), *strides(k), *strides(v), *strides(out), *strides(dout), *strides(dq),
                *statistics_strides(lse), *dlse_strides, *problem.prefix_strides,
                *sizes, heads, group, *problem.window, prefix.reach, problem.dilation, prefix.count, problem.scale,
                problem.softcap, **problem.dims, BM=tile.block_m, BN=tile.block_n, DILATED=problem.dilation > 1,
                DLSE_GIVEN=dlse is not None, **flags, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    tile = problem.config("dkdv")
    grid = (problem.tiles(False, tile.block_n, problem.dilation) * kv_heads,)
    if grid[0] > 0 and n_seq > 0:
        with on_device(q):
            _dkdv_kernel[grid](
                q, k, v, dout, lse, delta, dk, dv, problem.slopes, problem.cu_q, problem.cu_k, problem.hidden,
                *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dk), *strides(dv),
                *statistics_strides(lse),
                *sizes, kv_heads, group, *problem.window, problem.dilation, prefix.count, problem.scale,
                problem.softcap,
                **problem.dims, BM=tile.block_m, BN=tile.block_n, DILATED=problem.dilation > 1, **flags,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    if prefix.kind > 0 and n_seq > 0 and k.numel() > 0:
        tile = problem.config("prefix")
        chunks = problem.tiles(True, PREFIX_CHUNK, 1)
        keys, values = (k, v) if prefix.kind == 1 else (prefix.keys, prefix.values)
        dk_part, dv_part = (
            torch.empty((chunks, kv_heads, prefix.count, x.shape[-1]), dtype=torch.float32, device=x.device)
            for x in (k, v)
        )
        columns = triton.cdiv(prefix.count, tile.block_n)
        if chunks > 0:
            with on_device(q):
                _prefix_dkdv_kernel[(chunks * kv_heads, columns)](
                    q, keys, values, dout, lse, delta, dk_part, dv_part, problem.slopes, problem.cu_q, problem.cu_k,
                    prefix.positions, problem.hidden,
                    *strides(q), *problem.prefix_strides, *strides(dout), *statistics_strides(lse), *sizes, kv_heads,
                    group,
                    prefix.reach, prefix.count, problem.scale, problem.softcap, **problem.dims, BM=tile.block_m,
                    BN=tile.block_n, CHUNK=PREFIX_CHUNK, **flags, num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        to_k, to_v = (dk, dv) if prefix.kind == 1 else (dpk, dpv)
        with on_device(q):
            _prefix_reduce_kernel[(n_seq * kv_heads, triton.cdiv(prefix.count, 16))](
                dk_part, dv_part, to_k, to_v, problem.cu_q, problem.cu_k, *strides(to_k), *strides(to_v),
                *sizes[:4], kv_heads, prefix.count, **problem.dims, BN=16, CHUNK=PREFIX_CHUNK, VARLEN=problem.packed,
                PREFIX=prefix.kind, num_warps=4,
            )  # fmt: skip
    return dq, dk, dv, delta, dpk, dpv


def _problem(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, alibi_slopes: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, left: int, right: int, dilation: int, scale: float, softcap: float, sink_tokens: int,
) -> Problem:  # fmt: skip
    reach = UNBOUNDED.value if right < 0 else min(right * dilation, UNBOUNDED.value)
    # no sequence is longer than all keys together
    prefix = Prefix(min(sink_tokens, k.shape[-3]), reach)
    return Problem(q, k, v, sinks, alibi_slopes, cu_q, cu_k, left, right, dilation, scale, softcap, prefix)


def window_attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    return forward(_problem(q, k, v, *options))


def window_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, *options)
    dq, dk, dv, delta, _, _ = backward(problem, dout, dlse, out, lse)
    return dq, dk, dv, q.new_empty(0) if problem.sinks is None else sink_gradient(problem.sinks, lse, delta)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum exp(sink - lse) * delta over batch and rows: a small ordered sum."""
    p = torch.exp(sinks.float()[:, None] - lse).masked_fill_(lse == float("-inf"), 0)
    return -(p * delta).transpose(0, -2).flatten(1).sum(1).to(sinks.dtype)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    packed = (*(tensor("i32", 9) for _ in range(2)),)

    def case(name, dtype, d, dv, window, *, slopes=False, varlen=False, outputs=1, sinks=False, **options):
        size = (8192,) if varlen else (2, 4096)
        q, k, v = tensor(dtype, *size, 16, d), tensor(dtype, *size, 4, d), tensor(dtype, *size, 4, dv)
        heads = (tensor("fp32", 16) if given else None for given in (sinks, slopes))
        bounds = packed if varlen else (None, None)
        return AotCase(
            name,
            train("window_attention", q, k, v, *heads, *bounds, window=window, outputs=outputs, **options),
            expect={"nvidia": ("MMA",), "_prefix_reduce_kernel": ()} if dtype != "fp32" else (),
            allow_spill="192 runs padded to 256: a few values spill outside of the loops" if d == 192 else None,
        )

    wide, narrow = (1023, 0), (127, 0)
    yield case("bf16_d128", "bf16", 128, 128, wide)
    yield case("bf16_d128_prefix", "bf16", 128, 128, wide, sink_tokens=4)
    for d, dv in ((64, 64), (256, 256), (96, 96), (192, 128)):
        yield case(f"bf16_d{d}", "bf16", d, dv, wide, sink_tokens=4)
    yield case("bf16_d64_narrow", "bf16", 64, 64, narrow, sinks=True)
    yield case("bf16_d128_narrow", "bf16", 128, 128, narrow, sinks=True)
    yield case("fp16_d128_packed", "fp16", 128, 128, wide, varlen=True, slopes=True)
    every = {"dilation": 2, "softcap": 30.0, "slopes": True, "varlen": True, "sink_tokens": 4}
    yield case("bf16_d128_all", "bf16", 128, 128, wide, outputs=None, **every)
    for d in (64, 128):
        yield case(f"fp32_d{d}", "fp32", d, d, wide, sink_tokens=4)
