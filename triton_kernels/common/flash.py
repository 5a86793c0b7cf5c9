"""Pieces that every flash-attention kernel shares: tile loads, scores, the online softmax, its two gradients.

Logits live in base 2 (scaled by log2(e)) so that the exponential is one instruction. Rows without a visible key
keep a maximum of -inf: every subtraction goes through a finite stand-in, never through a sentinel.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, stride, valid, D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr):
    """[len(rows), BD] from a row-major matrix; columns past D, and invalid rows if MASK, are 0."""
    columns = tl.arange(0, BD)
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    if MASK:
        if D == BD:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
    if D == BD:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, valid, tile, D: tl.constexpr, BD: tl.constexpr):
    """Stores the first D columns of the valid rows, rounded once to the destination's dtype."""
    columns = tl.arange(0, BD)
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None] & (columns < D)[None, :])


@triton.jit
def tanh(x):
    return 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2E))) - 1.0


@triton.jit
def logits(dots, scale, softcap, SOFTCAP: tl.constexpr):
    """Base-2 logits of raw dot products, and the soft cap's tanh (the dots themselves without one)."""
    if SOFTCAP:
        capped = tanh(dots * (scale / softcap))
        return capped * (softcap * LOG2E), capped
    return dots * (scale * LOG2E), dots


@triton.jit
def softmax_start(sink, rows: tl.constexpr, SINK: tl.constexpr):
    """Running maximum and sum of a row before its first key; a sink is a key without a value."""
    if SINK:
        top = tl.zeros([rows], tl.float32) + sink * LOG2E
        return top, tl.where(top == float("-inf"), 0.0, 1.0)
    return tl.full([rows], float("-inf"), tl.float32), tl.zeros([rows], tl.float32)


@triton.jit
def softmax_step(acc, top, total, s, v):
    """One tile of the online softmax: s [BM, BN] base-2 logits, -inf where masked, v [BN, BDV]."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - safe[:, None])
    alpha = tl.exp2(top - safe)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def softmax_end(acc, top, total):
    """Output rows and natural-log lse; a row without keys gives 0 and -inf."""
    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(tl.where(empty, 1.0, total)))
    return acc / tl.where(empty, 1.0, total)[:, None], lse


@triton.jit
def probabilities(s, lse2):
    """exp of base-2 logits against the rows' base-2 lse, which is broadcast already; -inf lse counts as 0."""
    return tl.exp2(s - tl.where(lse2 == float("-inf"), 0.0, lse2))


@triton.jit
def logit_gradient(p, dp, delta, capped, SOFTCAP: tl.constexpr):
    """Gradient of the scaled dot products before the soft cap."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    return ds
