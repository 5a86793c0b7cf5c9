"""Block-sparse attention: forward and dq walk the lists of a block of queries, dk and dv the transposed lists.

A listed block is visited in pieces of BN rows; blocks and pieces are one loop, so that loads of the next piece run
ahead of the products of this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilefuse import arch

from ...reference.attention.block_lists import transpose_lists
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
from .window_attention import padded, statistics_strides, strides


@triton.jit
def _list(OFFSETS, b, h, i, stride_rb, stride_rh, entries):
    """First and last entry of row i's list, kept inside of the index."""
    at = OFFSETS + b * stride_rb + h * stride_rh + i
    start = tl.minimum(tl.maximum(tl.load(at).to(tl.int64), 0), entries)
    stop = tl.minimum(tl.maximum(tl.load(at + 1).to(tl.int64), start), entries)
    return start, stop


@triton.jit
def _piece(INDEX, start, step, blocks, limit, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Tokens of one piece of a listed block, and which of them exist."""
    pieces: tl.constexpr = (BLOCK + BN - 1) // BN
    block = tl.load(INDEX + start + step // pieces).to(tl.int32)
    within = step % pieces * BN + tl.arange(0, BN)
    token = block * BLOCK + within
    return token, (within < BLOCK) & (block >= 0) & (block < blocks) & (token < limit)


@triton.jit
def _scores(q, k, m, n, valid, delta, scale, CAUSAL: tl.constexpr):
    s, _ = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, 0.0, False)
    s = tl.where(valid[None, :], s, float("-inf"))
    if CAUSAL:
        s = tl.where(n[None, :] <= (m + delta)[:, None], s, float("-inf"))
    return s


@triton.jit
def _fwd_kernel(
    Q, K, V, OUT, LSE, OFFSETS, INDEX, KEY_MASK,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_rb, stride_rh, stride_mb, stride_ms,
    sq, sk, heads, group, rows, columns, entries, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pieces_m: tl.constexpr = (BLOCK + BM - 1) // BM
    h = pid % heads
    i = pid // heads // pieces_m % rows
    b = (pid // heads // pieces_m // rows).to(tl.int64)
    within = pid // heads % pieces_m * BM + tl.arange(0, BM)
    m = i * BLOCK + within
    live = (within < BLOCK) & (m < sq)
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    Q += b * stride_qb + head * stride_qh
    K += b * stride_kb + kv * stride_kh
    V += b * stride_vb + kv * stride_vh
    start, stop = _list(OFFSETS, b, head, i, stride_rb, stride_rh, entries)
    q = load_rows(Q, m, stride_qs, live, D, BD, True)  # [BM, BD]
    top, total = softmax_start(0.0, BM, False)
    acc = tl.zeros([BM, BDV], tl.float32)
    steps = (stop - start).to(tl.int32) * ((BLOCK + BN - 1) // BN)
    for step in tl.range(0, steps):
        n, valid = _piece(INDEX, start, step, columns, sk, BLOCK, BN)
        if MASKED:
            shown = tl.load(KEY_MASK + b * stride_mb + n.to(tl.int64) * stride_ms, mask=valid, other=0)
            valid = valid & (shown != 0)
        k = load_rows(K, n, stride_ks, valid, D, BD, True)  # [BN, BD]
        s = _scores(q, k, m, n, valid, sk - sq, scale, CAUSAL)
        v = load_rows(V, n, stride_vs, valid, DV, BDV, True)  # [BN, BDV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    out, lse = softmax_end(acc, top, total)
    store_rows(OUT + b * stride_ob + head * stride_oh, m, stride_os, live, out, DV, BDV)
    tl.store(LSE + b * stride_lb + head * stride_lh + m, lse, mask=live)


@triton.jit
def _dq_kernel(
    Q, K, V, OUT, DOUT, LSE, DLSE, DELTA, DQ, OFFSETS, INDEX, KEY_MASK,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh, stride_nb, stride_nh, stride_ns, stride_rb, stride_rh, stride_mb, stride_ms,
    sq, sk, heads, group, rows, columns, entries, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DLSE_GIVEN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pieces_m: tl.constexpr = (BLOCK + BM - 1) // BM
    h = pid % heads
    i = pid // heads // pieces_m % rows
    b = (pid // heads // pieces_m // rows).to(tl.int64)
    within = pid // heads % pieces_m * BM + tl.arange(0, BM)
    m = i * BLOCK + within
    live = (within < BLOCK) & (m < sq)
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    K += b * stride_kb + kv * stride_kh
    V += b * stride_vb + kv * stride_vh
    start, stop = _list(OFFSETS, b, head, i, stride_rb, stride_rh, entries)
    q = load_rows(Q + b * stride_qb + head * stride_qh, m, stride_qs, live, D, BD, True)  # [BM, BD]
    do = load_rows(DOUT + b * stride_gb + head * stride_gh, m, stride_gs, live, DV, BDV, True)  # [BM, BDV]
    out = load_rows(OUT + b * stride_ob + head * stride_oh, m, stride_os, live, DV, BDV, True)  # [BM, BDV]
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE_GIVEN:
        delta -= tl.load(DLSE + b * stride_nb + head * stride_nh + m.to(tl.int64) * stride_ns, mask=live, other=0.0)
    statistics = b * stride_lb + head * stride_lh
    tl.store(DELTA + statistics + m, delta, mask=live)
    lse2 = tl.load(LSE + statistics + m, mask=live, other=float("-inf")) * LOG2E
    dq = tl.zeros([BM, BD], tl.float32)
    steps = (stop - start).to(tl.int32) * ((BLOCK + BN - 1) // BN)
    for step in tl.range(0, steps):
        n, valid = _piece(INDEX, start, step, columns, sk, BLOCK, BN)
        if MASKED:
            shown = tl.load(KEY_MASK + b * stride_mb + n.to(tl.int64) * stride_ms, mask=valid, other=0)
            valid = valid & (shown != 0)
        k = load_rows(K, n, stride_ks, valid, D, BD, True)  # [BN, BD]
        s = _scores(q, k, m, n, valid, sk - sq, scale, CAUSAL)
        v = load_rows(V, n, stride_vs, valid, DV, BDV, True)  # [BN, BDV]
        p = probabilities(s, lse2[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = logit_gradient(p, dp, delta[:, None], p, False)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(DQ + b * stride_db + head * stride_dh, m, stride_ds, live, dq * scale, D, BD)


@triton.jit
def _dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV_OUT, OFFSETS, INDEX, KEY_MASK,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    stride_lb, stride_lh, stride_rb, stride_rh, stride_mb, stride_ms,
    sq, sk, kv_heads, group, rows, columns, entries, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """``rows`` and ``columns`` are the query and key blocks; the lists are the transposed ones."""
    pid = tl.program_id(0)
    pieces_n: tl.constexpr = (BLOCK + BN - 1) // BN
    kv = pid % kv_heads
    j = pid // kv_heads // pieces_n % columns
    b = (pid // kv_heads // pieces_n // columns).to(tl.int64)
    within = pid // kv_heads % pieces_n * BN + tl.arange(0, BN)
    n = j * BLOCK + within
    valid = (within < BLOCK) & (n < sk)
    shown = valid
    if MASKED:
        shown = valid & (tl.load(KEY_MASK + b * stride_mb + n.to(tl.int64) * stride_ms, mask=valid, other=0) != 0)
    kv_head = kv.to(tl.int64)
    k = load_rows(K + b * stride_kb + kv_head * stride_kh, n, stride_ks, shown, D, BD, True)  # [BN, BD]
    v = load_rows(V + b * stride_vb + kv_head * stride_vh, n, stride_vs, shown, DV, BDV, True)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    for g in range(group):
        head = (kv * group + g).to(tl.int64)
        start, stop = _list(OFFSETS, b, head, j, stride_rb, stride_rh, entries)
        QH = Q + b * stride_qb + head * stride_qh
        GH = DOUT + b * stride_gb + head * stride_gh
        statistics = b * stride_lb + head * stride_lh
        steps = (stop - start).to(tl.int32) * ((BLOCK + BM - 1) // BM)
        for step in tl.range(0, steps):
            m, live = _piece(INDEX, start, step, rows, sq, BLOCK, BM)
            q = load_rows(QH, m, stride_qs, live, D, BD, True)  # [BM, BD]
            lse2 = tl.load(LSE + statistics + m, mask=live, other=float("-inf")) * LOG2E
            delta = tl.load(DELTA + statistics + m, mask=live, other=0.0)
            s, _ = logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, 0.0, False)  # [BN, BM]
            s = tl.where(shown[:, None] & live[None, :], s, float("-inf"))
            if CAUSAL:
                s = tl.where(n[:, None] <= (m + sk - sq)[None, :], s, float("-inf"))
            p = probabilities(s, lse2[None, :])
            do = load_rows(GH, m, stride_gs, live, DV, BDV, True)  # [BM, BDV]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = logit_gradient(p, dp, delta[None, :], p, False)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(DK + b * stride_dkb + kv_head * stride_dkh, n, stride_dks, valid, dk * scale, D, BD)
    store_rows(DV_OUT + b * stride_dvb + kv_head * stride_dvh, n, stride_dvs, valid, dv, DV, BDV)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    warps: int
    stages: int


def config(kernel: str, head_dim: int, element_size: int, block_size: int, target: str) -> Config:
    """Pieces of ``fwd``, ``dq`` or ``dkdv``, no larger than a block needs."""
    whole = max(16, triton.next_power_of_2(block_size))
    if element_size > 2:
        m, n, warps, stages = (32 if head_dim <= 64 else 16, 16, 8 if head_dim > 64 and kernel == "dq" else 4, 1)
    elif kernel == "fwd":
        m, n, warps, stages = (64, 32, 4, 2) if head_dim > 128 else (128, 64, 8, 3 if head_dim <= 64 else 2)
        if block_size < 128:
            m, warps = 64, 4 if head_dim <= 64 else 8
    elif kernel == "dq":
        m, n, warps, stages = (32, 32, 4, 1) if head_dim > 128 else (64, 64, 4, 2) if head_dim <= 64 else (64, 32, 8, 2)
    else:
        m, n, warps, stages = (32, 64, 4, 2) if head_dim <= 64 else (32, 64 if head_dim <= 128 else 32, 8, 1)
        if head_dim > 128 and target.startswith("gfx"):
            m = 16
    return Config(min(m, whole), min(n, whole), warps, stages)


def _call(kernel: str, q: Tensor, v: Tensor, block_size: int) -> tuple[Config, dict[str, int]]:
    d, dv = q.shape[-1], v.shape[-1]
    tile = config(kernel, max(padded(d), padded(dv)), q.element_size(), block_size, arch.of(q.device))
    return tile, {
        "D": d, "DV": dv, "BD": padded(d), "BDV": padded(dv), "BLOCK": block_size, "BM": tile.block_m,
        "BN": tile.block_n,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _list_strides(row_offsets: Tensor) -> tuple[int, int]:
    """Of batch and head, 0 where shared."""
    return tuple(0 if row_offsets.shape[i] == 1 else row_offsets.stride(i) for i in (0, 1))


def block_sparse_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, row_offsets: Tensor, col_index: Tensor, key_mask: Tensor | None, block_size: int,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, sq, heads, _ = q.shape
    sk, kv_heads = k.shape[1], k.shape[2]
    out = torch.empty((batch, sq, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, sq), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    row_offsets, col_index = row_offsets.contiguous(), col_index.contiguous()
    tile, constants = _call("fwd", q, v, block_size)
    rows = triton.cdiv(sq, block_size)
    with on_device(q):
        _fwd_kernel[(batch * rows * triton.cdiv(block_size, tile.block_m) * heads,)](
            q, k, v, out, lse, row_offsets, col_index, key_mask, *strides(q), *strides(k), *strides(v), *strides(out),
            *statistics_strides(lse), *_list_strides(row_offsets), *((0, 0) if key_mask is None else key_mask.stride()),
            sq,
            sk, heads, heads // kv_heads, rows, triton.cdiv(sk, block_size), col_index.shape[0], scale,
            MASKED=key_mask is not None, CAUSAL=causal, **constants,
        )  # fmt: skip
    return out, lse


def block_sparse_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row_offsets: Tensor,
    col_index: Tensor, key_mask: Tensor | None, block_size: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, sq, heads, _ = q.shape
    sk, kv_heads = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    rows, columns = triton.cdiv(sq, block_size), triton.cdiv(sk, block_size)
    row_offsets, col_index = row_offsets.contiguous(), col_index.contiguous()
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    if dq.numel():
        tile, constants = _call("dq", q, v, block_size)
        with on_device(q):
            _dq_kernel[(batch * rows * triton.cdiv(block_size, tile.block_m) * heads,)](
                q, k, v, out, dout, lse, dlse, delta, dq, row_offsets, col_index, key_mask, *strides(q), *strides(k),
                *strides(v), *strides(out), *strides(dout), *strides(dq), *statistics_strides(lse),
                *((0, 0, 0) if dlse is None else dlse.stride()), *_list_strides(row_offsets), *mask_strides, sq, sk,
                heads,
                heads // kv_heads, rows, columns, col_index.shape[0], scale, MASKED=key_mask is not None, CAUSAL=causal,
                DLSE_GIVEN=dlse is not None, **constants,
            )  # fmt: skip
    if dk.numel():
        offsets, index = transpose_lists(row_offsets, col_index, columns)
        tile, constants = _call("dkdv", q, v, block_size)
        with on_device(q):
            _dkdv_kernel[(batch * columns * triton.cdiv(block_size, tile.block_n) * kv_heads,)](
                q, k, v, dout, lse, delta, dk, dv, offsets, index, key_mask, *strides(q), *strides(k), *strides(v),
                *strides(dout), *strides(dk), *strides(dv), *statistics_strides(lse), *_list_strides(offsets),
                *mask_strides,
                sq, sk, kv_heads, heads // kv_heads, rows, columns, index.shape[0], scale, MASKED=key_mask is not None,
                CAUSAL=causal, **constants,
            )  # fmt: skip
    return dq, dk, dv


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype, d, block, extra in (
        ("bf16", 128, 128, False),
        ("bf16", 64, 64, False),
        ("bf16", 64, 128, True),
        ("bf16", 128, 64, True),
        ("fp16", 128, 128, False),
        ("bf16", 256, 64, False),
        ("fp32", 64, 64, True),
        ("fp32", 128, 64, False),
    ):
        x, rows = [tensor(dtype, 2, 4096, 16, d) for _ in range(3)], 4096 // block
        mask = tensor("bool", 2, 4096) if extra else None
        lists = (tensor("i32", 1, 1, rows + 1), tensor("i32", 8 * rows), mask)
        options = {"block_size": block, "causal": extra, "outputs": None if extra else 1}
        yield AotCase(
            f"{dtype}_d{d}_block{block}{'_masked' * extra}",
            train("block_sparse_attention", *x, *lists, **options),
            expect=("MMA",) if dtype != "fp32" else (),
        )
