"""Where a tile of window attention lies, which runs of keys it meets, and their scores.

A tile of queries meets at most four runs of keys: a prefix (first tokens, or gathered global keys), the left edge
of the band, its full middle, the right edge. Only the edges compute a mask, each run is a loop of its own, and the
window stays a run-time value. A dilated window is d independent plain windows over the residue classes: class r
addresses token ``r + d * n`` by its stride.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.flash import LOG2E, Width, dots, head_of, load_head, logits
from ..common.rows import Matrix, Rows

# an unbounded window; sums of two stay in int32
UNBOUNDED = tl.constexpr(1 << 29)
# kinds of prefix: none, the first tokens of the sequence, keys gathered from anywhere in it
NONE, FIRST, GATHERED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# no length, batch or window compiles a kernel anew
COUNTS = (
    "rows_q",
    "rows_k",
    "n_seq",
    "heads",
    "kv_heads",
    "group",
    "left",
    "right",
    "reach",
    "dilation",
    "prefix",
    "nearest",
    "first_key",
    "stop_key",
    "tiles",
)


class Constants(NamedTuple):
    """Constants of one compiled kernel."""

    QK: Width
    V: Width
    BLOCK_M: Any
    BLOCK_N: Any
    PACKED: Any
    DILATED: Any
    PREFIX: Any
    SKIP: Any
    SINK: Any
    ALIBI: Any
    BIAS: Any
    SOFTCAP: Any
    DLSE: Any


class Bounds(NamedTuple):
    """Where the sequences of packed queries and keys begin; absent otherwise."""

    cu_q: Any
    cu_k: Any


class PrefixKeys(NamedTuple):
    """Keys and values that rows see beside their band, and the tokens that gathered ones come from."""

    k: Rows
    v: Rows
    at: Any  # [B, G] int32, -1 = none


class Scores(NamedTuple):
    """What happens to a dot product on its way to a score."""

    scale: float
    softcap: float
    sinks: Any  # [Hq]
    slopes: Any  # [Hq]
    hidden: Any  # uint8 [B, S], nonzero = not in the band, neither as key nor as query
    # [Hq, L] contiguous, so that its stride is L; L is odd and not 1, so that the compiler takes all of one kind
    bias: Matrix | None


class HeadBias(NamedTuple):
    """What the distance between a query and a key adds to the scores of one head."""

    slope: Any
    table: Any  # [length]
    length: Any


class Sequence(NamedTuple):
    """One sequence of the batch; all but its lengths in 64 bits."""

    b: Any
    batch: Any  # b, but 0 if packed
    first_q: Any
    sq: Any
    first_k: Any
    sk: Any


class Tile(NamedTuple):
    """A tile of one residue class of one sequence, counted in the class; its query n stands at its key n + shift."""

    start: Any
    first: Any  # token of query 0
    residue: Any  # token of key 0
    rows: Any
    keys: Any
    shift: Any


@triton.jit
def _clamped(cu_ptr, index, total):
    return tl.minimum(tl.maximum(tl.load(cu_ptr + index).to(tl.int64), 0), total)


@triton.jit
def sequence(b, bounds, rows_q, rows_k, PACKED: tl.constexpr):
    wide = b.to(tl.int64)
    if PACKED:
        first_q = _clamped(bounds.cu_q, b, rows_q)
        first_k = _clamped(bounds.cu_k, b, rows_k)
        sq = tl.maximum(_clamped(bounds.cu_q, b + 1, rows_q) - first_q, 0).to(tl.int32)
        sk = tl.maximum(_clamped(bounds.cu_k, b + 1, rows_k) - first_k, 0).to(tl.int32)
        return Sequence(wide, wide * 0, first_q, sq, first_k, sk)
    else:
        return Sequence(wide, wide, wide * 0, rows_q, wide * 0, rows_k)


@triton.jit
def find_sequence(
    tile, bounds, rows_q, rows_k, n_seq, dilation, KEYS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):
    """The sequence that a tile of queries (of keys with KEYS) belongs to, and the tile's number in it.

    Packed sequence b owns the tiles from cu[b] // BLOCK + b * dilation on: an upper bound that needs no sum.
    """
    own = rows_k if KEYS else rows_q
    if PACKED:
        cu_ptr = bounds.cu_k if KEYS else bounds.cu_q
        low = 0
        high = n_seq
        while high - low > 1:
            middle = (low + high) // 2
            if _clamped(cu_ptr, middle, own) // BLOCK + middle * dilation <= tile:
                low = middle
            else:
                high = middle
        local = tile - (_clamped(cu_ptr, low, own) // BLOCK + low * dilation).to(tl.int32)
        return sequence(low, bounds, rows_q, rows_k, PACKED), local
    else:
        per_sequence = dilation * tl.cdiv(tl.cdiv(own, dilation), BLOCK)
        b = tile // per_sequence
        return sequence(b, bounds, rows_q, rows_k, PACKED), tile - b * per_sequence


@triton.jit
def find_tile(local, s, dilation, KEYS: tl.constexpr, BLOCK: tl.constexpr, DILATED: tl.constexpr):
    """Tile number ``local`` of a sequence; one that does not exist starts past all rows and keys."""
    delta = s.sk - s.sq
    own = s.sk if KEYS else s.sq
    per_class = tl.maximum(tl.cdiv(tl.cdiv(own, dilation), BLOCK), 1)
    residue = local // per_class
    exists = (local >= 0) & (residue < dilation)
    start = tl.where(exists, (local - residue * per_class) * BLOCK, UNBOUNDED)
    if DILATED:
        first = ((residue - delta) % dilation + dilation) % dilation
        rows = tl.maximum(s.sq - first + dilation - 1, 0) // dilation
        keys = tl.maximum(s.sk - residue + dilation - 1, 0) // dilation
        return Tile(start, first, residue, rows, keys, (first + delta - residue) // dilation)
    else:
        return Tile(start, residue * 0, residue * 0, s.sq, s.sk, delta)


@triton.jit
def tokens(first, index, dilation, DILATED: tl.constexpr):
    if DILATED:
        return first + index * dilation
    else:
        return index


@triton.jit
def find_runs(m0, m1, shift, keys, left, right, begin, BLOCK: tl.constexpr):
    """(low, edge, middle, high): left edge [low, edge), full tiles [edge, middle), right edge [middle, high)."""
    low = tl.maximum(begin, m0 + shift - left)
    high = tl.maximum(tl.minimum(keys, m1 + shift + right), low)
    full_low = tl.maximum(low, m1 - 1 + shift - left)
    full_high = tl.minimum(keys, m0 + shift + right + 1)
    edge = low + tl.cdiv(full_low - low, BLOCK) * BLOCK
    middle = edge + tl.maximum(full_high - edge, 0) // BLOCK * BLOCK
    return low, edge, middle, high


@triton.jit
def run_of(runs, number: tl.constexpr):
    """[start, stop) of the left edge, the middle or the right edge."""
    low, edge, middle, high = runs
    if number == 0:
        return low, tl.minimum(edge, high)
    elif number == 1:
        return edge, middle
    else:
        return middle, high


@triton.jit
def bias_of(scores, h, C):
    """Of head h, whose index is 64-bit."""
    slope = tl.load(scores.slopes + h).to(tl.float32) if C.ALIBI else 0.0
    if C.BIAS:
        return HeadBias(slope, scores.bias.ptr + h * scores.bias.row, scores.bias.row)
    else:
        return HeadBias(slope, None, None)


@triton.jit
def band_scores(products, offset, bias, step, scores, C):
    """Base-2 logits of raw dot products, and the soft cap's tanh; ``offset`` counts from query to key, in steps."""
    s, capped = logits(products, scores.scale, scores.softcap, C.SOFTCAP)
    if C.ALIBI:
        s -= bias.slope * LOG2E * (tl.abs(offset) * step).to(tl.float32)
    if C.BIAS:
        index = tl.minimum(tl.maximum(bias.length // 2 - offset * step, 0), bias.length - 1)
        s += tl.load(bias.table + index).to(tl.float32) * LOG2E
    return s, capped


@triton.jit
def prefix_positions(prefix_keys, s, p, prefix, PREFIX: tl.constexpr):
    """Tokens of the prefix keys p; -1 is none."""
    if PREFIX == GATHERED:
        return tl.load(prefix_keys.at + s.b * prefix + p, mask=p < prefix, other=-1)
    else:
        return tl.where(p < tl.minimum(prefix, s.sk), p, -1)


@triton.jit
def prefix_run(k, v, prefix_keys, s, tile, kv, reach, dilation, prefix, C):
    """Heads of the prefix keys of a tile of queries, how many it may see, and the first key left to the band."""
    if C.PREFIX == GATHERED:
        return head_of(prefix_keys.k, s.batch, 0, kv), head_of(prefix_keys.v, s.batch, 0, kv), prefix, 0
    else:
        last = tokens(tile.first, tl.minimum(tile.start + C.BLOCK_M, tile.rows) - 1, dilation, C.DILATED) + s.sk - s.sq
        stop = tl.minimum(tl.minimum(prefix, s.sk), last + reach + 1)
        return k, v, stop, tl.cdiv(tl.maximum(prefix - tile.residue, 0), dilation)


@triton.jit
def prefix_tile(q, token, p0, k_head, v_head, prefix_keys, s, reach, prefix, bias, scores, C):
    """Keys, values, base-2 logits and soft cap's tanh of one tile of prefix keys."""
    p = p0 + tl.arange(0, C.BLOCK_N)
    positions = prefix_positions(prefix_keys, s, p, prefix, C.PREFIX)
    k = load_head(k_head, p, positions >= 0, C.QK, True)  # [BLOCK_N, D]
    offset = positions[None, :] - (token + (s.sk - s.sq))[:, None]
    x, capped = band_scores(dots(q, k), offset, bias, 1, scores, C)
    x = tl.where((offset <= reach) & (positions >= 0)[None, :], x, float("-inf"))
    v = load_head(v_head, p, positions >= 0, C.V, True)  # [BLOCK_N, DV]
    return k, v, x, capped


@triton.jit
def band_tile(q, m, n0, k_head, v_head, s, tile, rows_k, left, right, dilation, bias, scores, EDGE: tl.constexpr, C):
    """Keys, values, base-2 logits and soft cap's tanh of one tile of band keys; only at an EDGE the band is masked."""
    n = n0 + tl.arange(0, C.BLOCK_N)
    key = tokens(tile.residue, n, dilation, C.DILATED)
    valid = n < tile.keys
    if C.SKIP:
        valid &= tl.load(scores.hidden + s.batch * rows_k + key, mask=valid, other=1) == 0
    k = load_head(k_head, key, valid, C.QK, EDGE or C.SKIP)  # [BLOCK_N, D]
    offset = n[None, :] - (m + tile.shift)[:, None]
    x, capped = band_scores(dots(q, k), offset, bias, dilation, scores, C)
    if EDGE:
        x = tl.where((offset >= -left) & (offset <= right) & valid[None, :], x, float("-inf"))
    elif C.SKIP:
        x = tl.where(valid[None, :], x, float("-inf"))
    v = load_head(v_head, key, valid, C.V, EDGE or C.SKIP)  # [BLOCK_N, DV]
    return k, v, x, capped
