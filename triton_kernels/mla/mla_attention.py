"""Flash attention whose keys and values differ in width, forward and a two-pass backward without atomics.

A head of width D is read in two power-of-two parts (192 = 128 + 64), so no tile is padded to 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilefuse import arch

from ..common.launch import on_device

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bounds_of(cu_seqlens, index, sequences, total):
    """Rows [start, end) of pseudo-sequence ``index`` of a packed tensor.

    0 is what lies before the first bound and ``sequences + 1`` what lies past the last: their rows belong to no
    sequence, and every row belongs to one pseudo-sequence.
    """
    start = tl.load(cu_seqlens + index - 1, mask=(index > 0) & (index <= sequences + 1), other=0).to(tl.int64)
    end = tl.load(cu_seqlens + index, mask=index <= sequences, other=0).to(tl.int64)
    end = tl.where(index > sequences, total, end)
    start = tl.minimum(tl.maximum(start, 0), total)
    end = tl.minimum(tl.maximum(end, start), total)
    return start, end


@triton.jit
def find_tile(cu_seqlens, sequences, total, pid, BLOCK: tl.constexpr, SEQUENCES_PAD: tl.constexpr):
    """Which pseudo-sequence and which tile of it program ``pid`` works on; past all tiles: one that does not exist."""
    index = tl.arange(0, SEQUENCES_PAD)
    start, end = bounds_of(cu_seqlens, index, sequences, total)
    tiles = tl.where(index < sequences + 2, tl.cdiv(end - start, BLOCK), 0)
    before = tl.cumsum(tiles, axis=0) <= pid
    found = tl.sum(before.to(tl.int32))
    tile = pid - tl.sum(tl.where(before, tiles, 0))
    return found, tile


@triton.jit
def place(
    pid,
    cu_mine,
    cu_other,
    sequences,
    rows_mine,
    rows_other,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    SEQUENCES_PAD: tl.constexpr,
):
    """Batch, first row, length of this program's own tensor and of the other one, and its tile."""
    if PACKED:
        found, tile = find_tile(cu_mine, sequences, rows_mine, pid, BLOCK, SEQUENCES_PAD)
        start, end = bounds_of(cu_mine, found, sequences, rows_mine)
        other_start, other_end = bounds_of(cu_other, found, sequences, rows_other)
        length = tl.where(found < sequences + 2, end - start, 0)
        other_length = tl.where((found > 0) & (found <= sequences), other_end - other_start, 0)
        batch = tl.zeros_like(start)
        first = tile.to(tl.int64) * BLOCK
    else:
        tiles = tl.cdiv(rows_mine, BLOCK)
        batch = (pid // tiles).to(tl.int64)
        first = (pid % tiles).to(tl.int64) * BLOCK
        start = batch * 0
        other_start = start
        length = start + rows_mine
        other_length = start + rows_other
    return batch, start, length, other_start, other_length, first


@triton.jit
def load_rows(rows, keep_rows, offset: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """[ROWS, WIDTH_PAD] from column ``offset`` of each row; zero where absent."""
    column = tl.arange(0, WIDTH_PAD)
    return tl.load(
        rows[:, None] + offset + column[None, :], mask=keep_rows[:, None] & (column < WIDTH)[None, :], other=0.0
    )


@triton.jit
def store_rows(rows, keep_rows, value, offset: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    column = tl.arange(0, WIDTH_PAD)
    tl.store(
        rows[:, None] + offset + column[None, :],
        value.to(rows.dtype.element_ty),
        mask=keep_rows[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def forward_steps(
    acc,
    total,
    top,
    q_1,
    q_2,
    k,
    v,
    k_row,
    v_row,
    begin,
    finish,
    keys,
    own,
    scale2,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    D1: tl.constexpr,
    D1_PAD: tl.constexpr,
    D2: tl.constexpr,
    D2_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BN: tl.constexpr,
):
    for key_start in range(begin, finish, BN):
        key = key_start + tl.arange(0, BN)
        # a full block needs no mask
        exists = key < keys
        k_rows = k + key.to(tl.int64) * k_row
        k_1 = load_rows(k_rows, exists, 0, D1, D1_PAD)  # [BN, D1]
        scores = tl.dot(q_1, tl.trans(k_1), input_precision="ieee")
        if D2 > 0:
            k_2 = load_rows(k_rows, exists, D1, D2, D2_PAD)  # [BN, D2]
            scores = tl.dot(q_2, tl.trans(k_2), scores, input_precision="ieee")
        scores *= scale2
        if MASKED:
            visible = exists[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= own[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])  # [BM, BN]
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v_block = load_rows(v + key.to(tl.int64) * v_row, exists, 0, V, V_PAD)  # [BN, V]
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["sequences", "rows_q", "rows_k"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    softmax_scale,
    sequences,
    rows_q,
    rows_k,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    D1: tl.constexpr,
    D1_PAD: tl.constexpr,
    D2: tl.constexpr,
    D2_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    SEQUENCES_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    batch, start_q, queries, start_k, keys, first = place(
        tl.program_id(0), cu_q, cu_k, sequences, rows_q, rows_k, PACKED, BM, SEQUENCES_PAD
    )
    if first < queries:
        row = first + tl.arange(0, BM)
        live = row < queries
        own = row + (keys - queries)
        q_rows = q + batch * q_batch + head * q_head + (start_q + row) * q_row
        q_1 = load_rows(q_rows, live, 0, D1, D1_PAD)  # [BM, D1]
        q_2 = q_1
        if D2 > 0:
            q_2 = load_rows(q_rows, live, D1, D2, D2_PAD)  # [BM, D2]
        k += batch * k_batch + head * k_head + start_k * k_row
        v += batch * v_batch + head * v_head + start_k * v_row
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, V_PAD], tl.float32)
        scale2 = softmax_scale * LOG2E
        finish = keys
        full = keys // BN * BN
        if CAUSAL:
            # the first row of the tile sees the fewest keys
            finish = tl.minimum(keys, tl.maximum(first + BM + keys - queries, 0))
            full = tl.minimum(full, tl.maximum(first + 1 + keys - queries, 0) // BN * BN)
        acc, total, top = forward_steps(
            acc, total, top, q_1, q_2, k, v, k_row, v_row, 0, full, keys, own, scale2,
            False, CAUSAL, D1, D1_PAD, D2, D2_PAD, V, V_PAD, BN,
        )  # fmt: skip
        acc, total, top = forward_steps(
            acc, total, top, q_1, q_2, k, v, k_row, v_row, full, finish, keys, own, scale2,
            True, CAUSAL, D1, D1_PAD, D2, D2_PAD, V, V_PAD, BN,
        )  # fmt: skip
        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)
        out_rows = out + ((batch * rows_q + start_q + row) * HEADS + head) * V
        store_rows(out_rows, live, acc / divisor[:, None], 0, V, V_PAD)
        value = tl.where(empty, float("-inf"), (tl.where(empty, 0.0, top) + tl.log2(divisor)) / LOG2E)
        tl.store(lse + (batch * HEADS + head) * rows_q + start_q + row, value, mask=live)


@triton.jit(do_not_specialize=["total", "rows"])
def delta_kernel(
    grad_out,
    grad_lse,
    out,
    delta,
    total,
    rows,
    g_batch,
    g_row,
    g_head,
    gl_batch,
    gl_head,
    gl_row,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    """delta = sum(grad_out * out) - grad_lse, [.., H, S]."""
    at = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = at < total
    head = at % HEADS
    row = at // HEADS % rows
    batch = at // HEADS // rows
    g = load_rows(grad_out + batch * g_batch + row * g_row + head * g_head, live, 0, V, V_PAD)  # [BM, V]
    o = load_rows(out + at * V, live, 0, V, V_PAD)  # [BM, V]
    g_lse = tl.load(grad_lse + batch * gl_batch + head * gl_head + row * gl_row, mask=live, other=0.0)
    value = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1) - g_lse
    tl.store(delta + (batch * HEADS + head) * rows + row, value, mask=live)


@triton.jit
def softmax_grad(
    q_1, q_2, k_1, k_2, g, v, lse2, delta, visible, scale2, D2: tl.constexpr
):  # fmt: skip
    """Weights and gradient of the scores (without the scale) of one block, both [BM, BN] float32."""
    scores = tl.dot(q_1, tl.trans(k_1), input_precision="ieee")
    if D2 > 0:
        scores = tl.dot(q_2, tl.trans(k_2), scores, input_precision="ieee")
    p = tl.where(visible, tl.exp2(scores * scale2 - lse2[:, None]), 0.0)
    grad_p = tl.dot(g, tl.trans(v), input_precision="ieee")
    return p, p * (grad_p - delta[:, None])


@triton.jit
def statistics(lse, delta, at, live):
    """lse in base 2 and delta of a block of rows; an empty row has lse +inf here, so that its weights are 0."""
    lse2 = tl.load(lse + at, mask=live, other=float("-inf")) * LOG2E
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    return lse2, tl.load(delta + at, mask=live, other=0.0)


@triton.jit(do_not_specialize=["sequences", "rows_q", "rows_k"])
def backward_kv_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    cu_q,
    cu_k,
    softmax_scale,
    sequences,
    rows_q,
    rows_k,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    D1: tl.constexpr,
    D1_PAD: tl.constexpr,
    D2: tl.constexpr,
    D2_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    SEQUENCES_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of one tile of keys and values, over the query rows that see it."""
    head = tl.program_id(1).to(tl.int64)
    batch, start_k, keys, start_q, queries, first = place(
        tl.program_id(0), cu_k, cu_q, sequences, rows_k, rows_q, PACKED, BN, SEQUENCES_PAD
    )
    if first < keys:
        key = first + tl.arange(0, BN)
        exists = key < keys
        k_rows = k + batch * k_batch + head * k_head + (start_k + key) * k_row
        k_1 = load_rows(k_rows, exists, 0, D1, D1_PAD)  # [BN, D1]
        k_2 = k_1
        grad_k1 = tl.zeros([BN, D1_PAD], tl.float32)
        grad_k2 = grad_k1
        if D2 > 0:
            k_2 = load_rows(k_rows, exists, D1, D2, D2_PAD)  # [BN, D2]
            grad_k2 = tl.zeros([BN, D2_PAD], tl.float32)
        v_block = load_rows(v + batch * v_batch + head * v_head + (start_k + key) * v_row, exists, 0, V, V_PAD)
        grad_v_block = tl.zeros([BN, V_PAD], tl.float32)
        scale2 = softmax_scale * LOG2E
        begin = queries * 0
        if CAUSAL:
            # the first query row that sees the tile's first key
            begin = tl.minimum(tl.maximum(first - (keys - queries), 0) // BM * BM, queries)
        q += batch * q_batch + head * q_head + start_q * q_row
        grad_out += batch * g_batch + head * g_head + start_q * g_row
        at = (batch * HEADS + head) * rows_q + start_q
        for row_start in range(begin, queries, BM):
            row = row_start + tl.arange(0, BM)
            live = row < queries
            q_1 = load_rows(q + row.to(tl.int64) * q_row, live, 0, D1, D1_PAD)  # [BM, D1]
            q_2 = q_1
            if D2 > 0:
                q_2 = load_rows(q + row.to(tl.int64) * q_row, live, D1, D2, D2_PAD)  # [BM, D2]
            g = load_rows(grad_out + row.to(tl.int64) * g_row, live, 0, V, V_PAD)  # [BM, V]
            lse2, row_delta = statistics(lse, delta, at + row, live)
            visible = live[:, None] & exists[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= row[:, None] + (keys - queries))
            p, grad_s = softmax_grad(q_1, q_2, k_1, k_2, g, v_block, lse2, row_delta, visible, scale2, D2)
            grad_v_block = tl.dot(tl.trans(p.to(g.dtype)), g, grad_v_block, input_precision="ieee")
            grad_s_t = tl.trans(grad_s.to(q_1.dtype))
            grad_k1 = tl.dot(grad_s_t, q_1, grad_k1, input_precision="ieee")
            if D2 > 0:
                grad_k2 = tl.dot(grad_s_t, q_2, grad_k2, input_precision="ieee")
        out_row = (batch * rows_k + start_k + key) * HEADS + head
        store_rows(grad_v + out_row * V, exists, grad_v_block, 0, V, V_PAD)
        store_rows(grad_k + out_row * (D1 + D2), exists, grad_k1 * softmax_scale, 0, D1, D1_PAD)
        if D2 > 0:
            store_rows(grad_k + out_row * (D1 + D2), exists, grad_k2 * softmax_scale, D1, D2, D2_PAD)


@triton.jit(do_not_specialize=["sequences", "rows_q", "rows_k"])
def backward_q_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    cu_q,
    cu_k,
    softmax_scale,
    sequences,
    rows_q,
    rows_k,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    D1: tl.constexpr,
    D1_PAD: tl.constexpr,
    D2: tl.constexpr,
    D2_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    SEQUENCES_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradient of one tile of queries, over the keys that it sees."""
    head = tl.program_id(1).to(tl.int64)
    batch, start_q, queries, start_k, keys, first = place(
        tl.program_id(0), cu_q, cu_k, sequences, rows_q, rows_k, PACKED, BM, SEQUENCES_PAD
    )
    if first < queries:
        row = first + tl.arange(0, BM)
        live = row < queries
        q_rows = q + batch * q_batch + head * q_head + (start_q + row) * q_row
        q_1 = load_rows(q_rows, live, 0, D1, D1_PAD)  # [BM, D1]
        q_2 = q_1
        grad_q1 = tl.zeros([BM, D1_PAD], tl.float32)
        grad_q2 = grad_q1
        if D2 > 0:
            q_2 = load_rows(q_rows, live, D1, D2, D2_PAD)  # [BM, D2]
            grad_q2 = tl.zeros([BM, D2_PAD], tl.float32)
        g = load_rows(grad_out + batch * g_batch + head * g_head + (start_q + row) * g_row, live, 0, V, V_PAD)
        lse2, row_delta = statistics(lse, delta, (batch * HEADS + head) * rows_q + start_q + row, live)
        scale2 = softmax_scale * LOG2E
        finish = keys
        if CAUSAL:
            finish = tl.minimum(keys, tl.maximum(first + BM + keys - queries, 0))
        k += batch * k_batch + head * k_head + start_k * k_row
        v += batch * v_batch + head * v_head + start_k * v_row
        for key_start in range(0, finish, BN):
            key = key_start + tl.arange(0, BN)
            exists = key < keys
            k_rows = k + key.to(tl.int64) * k_row
            k_1 = load_rows(k_rows, exists, 0, D1, D1_PAD)  # [BN, D1]
            k_2 = k_1
            if D2 > 0:
                k_2 = load_rows(k_rows, exists, D1, D2, D2_PAD)  # [BN, D2]
            v_block = load_rows(v + key.to(tl.int64) * v_row, exists, 0, V, V_PAD)  # [BN, V]
            visible = live[:, None] & exists[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= row[:, None] + (keys - queries))
            _, grad_s = softmax_grad(q_1, q_2, k_1, k_2, g, v_block, lse2, row_delta, visible, scale2, D2)
            grad_s = grad_s.to(k_1.dtype)
            grad_q1 = tl.dot(grad_s, k_1, grad_q1, input_precision="ieee")
            if D2 > 0:
                grad_q2 = tl.dot(grad_s, k_2, grad_q2, input_precision="ieee")
        out_rows = grad_q + ((batch * rows_q + start_q + row) * HEADS + head) * (D1 + D2)
        store_rows(out_rows, live, grad_q1 * softmax_scale, 0, D1, D1_PAD)
        if D2 > 0:
            store_rows(out_rows, live, grad_q2 * softmax_scale, D1, D2, D2_PAD)


def dims(dim: int, v_dim: int) -> dict[str, int]:
    """A head's width as two parts: the largest power of two in it, and the rest."""
    first = 1 << (dim.bit_length() - 1)
    # a narrow rest would cost a whole extra product: below 16 the head is padded instead
    first = dim if 0 < dim - first < 16 else first
    second = dim - first
    return {
        "D1": first,
        "D1_PAD": max(16, triton.next_power_of_2(first)),
        "D2": second,
        "D2_PAD": max(16, triton.next_power_of_2(max(1, second))),
        "V": v_dim,
        "V_PAD": max(16, triton.next_power_of_2(v_dim)),
    }


def forward_tile(dim: int, v_dim: int, itemsize: int, target: str) -> dict[str, int]:
    """Wide tiles where the matrix unit reads operands from shared memory (sm_90, sm_100), narrower ones elsewhere.

    sm_120's instructions need a few registers more than sm_80's, which 128 rows of queries do not leave.
    """
    widest, capability = max(dim, v_dim), arch.capability(target)
    if itemsize > 2:
        return {"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 1}
    if widest > 256:
        return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
    if capability == 120:
        return {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 64 if capability in (90, 100) else 32, "num_warps": 8, "num_stages": 2}


def backward_tile(dim: int, v_dim: int, itemsize: int, over: str, target: str) -> dict[str, int]:
    """The side whose gradient accumulates takes the longer tile. ``over``: ``"q"`` or ``"kv"``."""
    capability = arch.capability(target)
    if itemsize > 2 or max(dim, v_dim) > 256:
        return {"BM": 16, "BN": 16, "num_warps": 8 if over == "q" else 4, "num_stages": 1}
    if capability == 100:
        return {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 1}
    if capability == 90:
        if over == "q":
            return {"BM": 64, "BN": 16, "num_warps": 8, "num_stages": 1}
        return {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2}
    # operands of the matrix unit are registers: anything larger spills
    if capability == 120 and over == "kv":
        return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
    return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 2}


def strides(x: Tensor) -> tuple[int, ...]:
    """Batch, row and head strides of [B, S, H, D] or packed [T, H, D]."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def packing(x: Tensor, cu_seqlens: Tensor | None, block: int) -> tuple[int, int, dict[str, int | bool]]:
    """Tiles of a launch, sequences, and the constants that go with them."""
    rows = x.shape[-3]
    if cu_seqlens is None:
        return triton.cdiv(rows, block) * x.shape[0], 0, {"PACKED": False, "SEQUENCES_PAD": 1}
    sequences = cu_seqlens.shape[0] - 1
    # every pseudo-sequence may end in a ragged tile
    tiles = triton.cdiv(rows, block) + sequences + 2
    return tiles, sequences, {"PACKED": True, "SEQUENCES_PAD": triton.next_power_of_2(sequences + 2)}


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
    config = forward_tile(dim, v_dim, q.element_size(), arch.of(q.device))
    tiles, sequences, packed = packing(q, cu_seqlens_q, config["BM"])
    with on_device(q):
        forward_kernel[(tiles, heads)](
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale,
            sequences,
            rows,
            k.shape[-3],
            *strides(q),
            *strides(k),
            *strides(v),
            HEADS=heads,
            CAUSAL=causal,
            **packed,
            **dims(dim, v_dim),
            **config,
        )
    return out, lse


def mla_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor,
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
    rows, heads, dim = q.shape[-3:]
    v_dim = v.shape[-1]
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if lse.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    delta = torch.empty_like(lse)
    gl_strides = (0, *grad_lse.stride()) if grad_lse.dim() == 2 else grad_lse.stride()
    common = {"HEADS": heads, "CAUSAL": causal, **dims(dim, v_dim)}
    v_pad = common["V_PAD"]
    target = arch.of(q.device)
    config_q, config_kv = (backward_tile(dim, v_dim, q.element_size(), over, target) for over in ("q", "kv"))
    with on_device(q):
        delta_kernel[(triton.cdiv(lse.numel(), 32),)](
            grad_out,
            grad_lse,
            out,
            delta,
            lse.numel(),
            rows,
            *strides(grad_out),
            *gl_strides,
            HEADS=heads,
            V=v_dim,
            V_PAD=v_pad,
            BM=32,
            num_warps=4,
        )
        tensors = (q, k, v, grad_out, lse, delta)
        all_strides = (*strides(q), *strides(k), *strides(v), *strides(grad_out))
        tiles, sequences, packed = packing(q, cu_seqlens_q, config_q["BM"])
        rest = (cu_seqlens_q, cu_seqlens_k, softmax_scale, sequences, rows, k.shape[-3], *all_strides)
        backward_q_kernel[(tiles, heads)](*tensors, grad_q, *rest, **packed, **common, **config_q)
        tiles, _, packed = packing(k, cu_seqlens_k, config_kv["BN"])
        if tiles:
            backward_kv_kernel[(tiles, heads)](*tensors, grad_k, grad_v, *rest, **packed, **common, **config_kv)
    return grad_q, grad_k, grad_v


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
                expect={"nvidia": products, "delta_kernel": ("LDG.128",)},
            )
