"""Pieces that every flash-attention kernel shares: tiles of a head, scores, the online softmax, its two gradients.

A head of D columns is a tuple of one or two tiles (`Width`): 192 is read as 128 + 64 instead of padded to 256.
Logits live in base 2 (scaled by log2(e)) so that the exponential is one instruction. Rows without a visible key
keep a maximum of -inf: every subtraction goes through a finite stand-in, never through a sentinel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
Constants = TypeVar("Constants")


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, and how it is launched."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Width(NamedTuple):
    """Columns of a head, of its first tile and of the rest (0: no second tile), each with the power of two for it."""

    D: Any
    PAD: Any
    FIRST: Any
    FIRST_PAD: Any
    REST: Any
    REST_PAD: Any


class Head(NamedTuple):
    """Rows of one head: a pointer to its first one, and the stride between two."""

    ptr: Any
    token: Any


class Results(NamedTuple):
    """What a backward knows of the forward's results: themselves, their gradients, and delta."""

    out: Rows
    dout: Rows
    lse: Any  # [B, H, S] or packed [H, T], as the next two
    dlse: Any
    delta: Any

    @classmethod
    def of(cls, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, delta: Tensor | None) -> Results:
        dlse = dlse if dlse is None else dlse.float().contiguous()
        return cls(Rows.of(out), Rows.of(dout), lse.contiguous(), dlse, delta)


@functools.lru_cache
def width(head_dim: int, one_tile: int = 128) -> Width:
    """The tiles of a head: two where that pads less and the second is worth a product of its own.

    Up to ``one_tile`` columns there is one: on GPUs whose matrix unit reads registers, two small ones spill.
    """
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    whole, second = (max(16, triton.next_power_of_2(n)) for n in (head_dim, rest))
    if head_dim <= one_tile or rest < 16 or first + second == whole:
        return Width(*map(tl.constexpr, (head_dim, whole, head_dim, whole, 0, 0)))
    return Width(*map(tl.constexpr, (head_dim, whole, first, first, rest, second)))


@functools.lru_cache
def constants_of(kind: type[Constants], d: int, dv: int, *values: int | bool, one_tile: int = 128) -> Constants:
    """The constants of a kernel: the two widths come first, then ``values`` in the order of its fields."""
    return kind(width(d, one_tile), width(dv, one_tile), *map(tl.constexpr, values))


def padded(head_dim: int) -> int:
    """Columns of a head's tiles together."""
    tiles = width(head_dim)
    return tiles.FIRST_PAD.value + tiles.REST_PAD.value


@triton.jit
def head_of(x, batch, first, head):
    """One head's rows of one batch from token ``first`` on; the indices are 64-bit."""
    return Head(x.ptr + batch * x.batch + first * x.token + head * x.head, x.token)


@triton.jit
def values_of(ptr, batch, first, head, heads, rows):
    """Pointer to one head's values, one per row, of a contiguous [B, H, S] tensor; the indices are 64-bit."""
    return ptr + (batch * heads + head) * rows + first


@triton.jit
def load_rows(base, rows, stride, valid, D: tl.constexpr, PAD: tl.constexpr, MASK: tl.constexpr):
    """[len(rows), PAD] from a row-major matrix; columns past D, and invalid rows if MASK, are 0."""
    columns = tl.arange(0, PAD)
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    if MASK:
        if D == PAD:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
    if D == PAD:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, valid, tile, D: tl.constexpr, PAD: tl.constexpr):
    """Stores the first D columns of the valid rows, rounded once to the destination's dtype."""
    columns = tl.arange(0, PAD)
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None] & (columns < D)[None, :])


@triton.jit
def load_head(x, at, valid, W, MASK: tl.constexpr):
    """Tiles [len(at), W] of a `Head`; invalid rows are 0 if MASK."""
    first = load_rows(x.ptr, at, x.token, valid, W.FIRST, W.FIRST_PAD, MASK)
    if W.REST > 0:
        return first, load_rows(x.ptr + W.FIRST, at, x.token, valid, W.REST, W.REST_PAD, MASK)
    else:
        return (first,)


@triton.jit
def store_head(x, at, valid, tiles, W):
    """Stores the tiles of the valid rows of a `Head`."""
    store_rows(x.ptr, at, x.token, valid, tiles[0], W.FIRST, W.FIRST_PAD)
    if W.REST > 0:
        store_rows(x.ptr + W.FIRST, at, x.token, valid, tiles[1], W.REST, W.REST_PAD)


@triton.jit
def zeros(rows: tl.constexpr, W):
    """float32 accumulators of a head."""
    if W.REST > 0:
        return tl.zeros([rows, W.FIRST_PAD], tl.float32), tl.zeros([rows, W.REST_PAD], tl.float32)
    else:
        return (tl.zeros([rows, W.FIRST_PAD], tl.float32),)


@triton.jit
def scaled(tiles, factor):
    if len(tiles) == 2:
        return tiles[0] * factor, tiles[1] * factor
    else:
        return (tiles[0] * factor,)


@triton.jit
def added(a, b):
    if len(a) == 2:
        return a[0] + b[0], a[1] + b[1]
    else:
        return (a[0] + b[0],)


@triton.jit
def kept(tiles, rows):
    """The tiles with zeros outside of the given rows."""
    if len(tiles) == 2:
        return tl.where(rows[:, None], tiles[0], 0.0), tl.where(rows[:, None], tiles[1], 0.0)
    else:
        return (tl.where(rows[:, None], tiles[0], 0.0),)


@triton.jit
def dots(a, b):
    """a @ b^T over the columns of a head."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
def accumulate(p, x, acc):
    """acc + p @ x, p rounded to x's dtype."""
    p = p.to(x[0].dtype)
    first = tl.dot(p, x[0], acc[0], input_precision="ieee")
    if len(x) == 2:
        return first, tl.dot(p, x[1], acc[1], input_precision="ieee")
    else:
        return (first,)


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
    """One tile of the online softmax: s [BLOCK_M, BLOCK_N] base-2 logits, -inf where masked, v of BLOCK_N keys."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - safe[:, None])
    alpha = tl.exp2(top - safe)
    total = total * alpha + tl.sum(p, 1)
    acc = accumulate(p, v, scaled(acc, alpha[:, None]))
    return acc, new_top, total


@triton.jit
def softmax_end(acc, top, total):
    """Output rows and natural-log lse; a row without keys gives 0 and -inf."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(divisor))
    if len(acc) == 2:
        return (acc[0] / divisor[:, None], acc[1] / divisor[:, None]), lse
    else:
        return (acc[0] / divisor[:, None],), lse


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


@triton.jit
def row_gradients(results, batch, first, head, heads, rows, at, live, W, DLSE: tl.constexpr):
    """dout, delta (gradient of the softmax's normalisation) and base-2 lse of the rows ``at`` of one head."""
    do = load_head(head_of(results.dout, batch, first, head), at, live, W, True)
    out = load_head(head_of(results.out, batch, first, head), at, live, W, True)
    delta = tl.sum(do[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if len(do) == 2:
        delta += tl.sum(do[1].to(tl.float32) * out[1].to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(values_of(results.dlse, batch, first, head, heads, rows) + at, mask=live, other=0.0)
    lse = tl.load(values_of(results.lse, batch, first, head, heads, rows) + at, mask=live, other=float("-inf"))
    return do, delta, lse * LOG2E


@triton.jit
def dq_step(dq, k, v, do, s, capped, lse2, delta, SOFTCAP: tl.constexpr):
    """Adds one tile of keys to dq, still without the scale; s [BLOCK_M, BLOCK_N] base-2 logits."""
    p = probabilities(s, lse2[:, None])
    ds = logit_gradient(p, dots(do, v), delta[:, None], capped, SOFTCAP)
    return accumulate(ds, k, dq)


@triton.jit
def dkdv_step(dk, dv, q, v, do, s, capped, lse2, delta, SOFTCAP: tl.constexpr):
    """Adds one tile of queries to dk, still without the scale, and dv; s [BLOCK_N, BLOCK_M], keys down."""
    p = probabilities(s, lse2[None, :])
    dv = accumulate(p, do, dv)
    ds = logit_gradient(p, dots(v, do), delta[None, :], capped, SOFTCAP)
    return accumulate(ds, q, dk), dv
