"""Window attention with global tokens.

Local rows run in window_attention's kernels: the global keys are gathered into a prefix that every tile visits, and
a byte per token takes global and padded ones out of the band. Global rows are a dense attention of few rows against
all keys, split over the keys; their results replace the rows' own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilefuse import arch

from ...reference.attention.global_attention import global_positions
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
from .paged_attention import _merge_kernel
from .window_attention import UNBOUNDED, Prefix, Problem, backward, forward, padded, statistics_strides, strides

# keys of one program of a global row
CHUNK = 1024


@triton.jit
def _visible(at, n, sk, KEY_MASK, stride_ms, MASKED: tl.constexpr):
    """Which keys n exist and are not padding."""
    shown = n < sk
    if MASKED:
        shown = shown & (tl.load(KEY_MASK + n.to(tl.int64) * stride_ms, mask=shown, other=0) != 0)
    return shown


@triton.jit
def _rows_fwd_kernel(
    Q, K, V, POSITIONS, KEY_MASK, PARTS, PART_LSE,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_px, stride_pb, stride_ps, stride_ph, stride_lx, stride_lb, stride_lh, stride_mb, stride_ms,
    sk, globals_, heads, group, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Global rows against one chunk of keys: normalised output and lse, float32."""
    chunk = tl.program_id(0)
    pid = tl.program_id(1)
    h = pid % heads
    tiles = tl.cdiv(globals_, BM)
    g = pid // heads % tiles * BM + tl.arange(0, BM)
    b = (pid // heads // tiles).to(tl.int64)
    at = tl.load(POSITIONS + b * globals_ + g, mask=g < globals_, other=-1).to(tl.int32)
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    K += b * stride_kb + kv * stride_kh
    V += b * stride_vb + kv * stride_vh
    KEY_MASK += b * stride_mb
    q = load_rows(Q + b * stride_qb + head * stride_qh, at, stride_qs, at >= 0, D, BD, True)  # [BM, BD]
    top, total = softmax_start(0.0, BM, False)
    acc = tl.zeros([BM, BDV], tl.float32)
    start = chunk * CHUNK
    for n0 in tl.range(start, tl.minimum(start + CHUNK, sk), BN):
        n = n0 + tl.arange(0, BN)
        shown = _visible(at, n, sk, KEY_MASK, stride_ms, MASKED)
        k = load_rows(K, n, stride_ks, shown, D, BD, True)  # [BN, BD]
        s, _ = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, 0.0, False)
        s = tl.where(shown[None, :] & (at >= 0)[:, None], s, float("-inf"))
        if CAUSAL:
            s = tl.where(n[None, :] <= at[:, None], s, float("-inf"))
        v = load_rows(V, n, stride_vs, shown, DV, BDV, True)  # [BN, BDV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    out, lse = softmax_end(acc, top, total)
    part = chunk.to(tl.int64)
    store_rows(PARTS + part * stride_px + b * stride_pb + head * stride_ph, g, stride_ps, g < globals_, out, DV, BDV)
    tl.store(PART_LSE + part * stride_lx + b * stride_lb + head * stride_lh + g, lse, mask=g < globals_)


@triton.jit
def _row_statistics(OUT, DOUT, LSE, DLSE, at, stride_os, stride_gs, stride_ns, DV, BDV, DLSE_GIVEN: tl.constexpr):
    """dout rows, delta and base-2 lse of the rows `at`."""
    live = at >= 0
    do = load_rows(DOUT, at, stride_gs, live, DV, BDV, True)
    out = load_rows(OUT, at, stride_os, live, DV, BDV, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE_GIVEN:
        delta -= tl.load(DLSE + at.to(tl.int64) * stride_ns, mask=live, other=0.0).to(tl.float32)
    lse2 = tl.load(LSE + at, mask=live, other=float("-inf")) * LOG2E
    return do, delta, lse2


@triton.jit
def _rows_dq_kernel(
    Q, K, V, OUT, DOUT, LSE, DLSE, POSITIONS, KEY_MASK, PARTS, DELTA,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    stride_nb, stride_nh, stride_ns, stride_px, stride_pb, stride_ps, stride_ph, stride_mb, stride_ms,
    sk, globals_, heads, group, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DLSE_GIVEN: tl.constexpr,
):  # fmt: skip
    """Partial dq of the global rows from one chunk of keys; the first chunk also keeps delta for the key pass."""
    chunk = tl.program_id(0)
    pid = tl.program_id(1)
    h = pid % heads
    tiles = tl.cdiv(globals_, BM)
    g = pid // heads % tiles * BM + tl.arange(0, BM)
    b = (pid // heads // tiles).to(tl.int64)
    at = tl.load(POSITIONS + b * globals_ + g, mask=g < globals_, other=-1).to(tl.int32)
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    K += b * stride_kb + kv * stride_kh
    V += b * stride_vb + kv * stride_vh
    KEY_MASK += b * stride_mb
    q = load_rows(Q + b * stride_qb + head * stride_qh, at, stride_qs, at >= 0, D, BD, True)  # [BM, BD]
    if DLSE_GIVEN:
        DLSE += b * stride_nb + head * stride_nh
    do, delta, lse2 = _row_statistics(
        OUT + b * stride_ob + head * stride_oh, DOUT + b * stride_gb + head * stride_gh,
        LSE + b * stride_lb + head * stride_lh, DLSE, at, stride_os, stride_gs, stride_ns, DV, BDV, DLSE_GIVEN,
    )  # fmt: skip
    if chunk == 0:
        tl.store(DELTA + (b * heads + h) * globals_ + g, delta, mask=g < globals_)
    dq = tl.zeros([BM, BD], tl.float32)
    start = chunk * CHUNK
    for n0 in tl.range(start, tl.minimum(start + CHUNK, sk), BN):
        n = n0 + tl.arange(0, BN)
        shown = _visible(at, n, sk, KEY_MASK, stride_ms, MASKED)
        k = load_rows(K, n, stride_ks, shown, D, BD, True)  # [BN, BD]
        s, _ = logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, 0.0, False)
        s = tl.where(shown[None, :] & (at >= 0)[:, None], s, float("-inf"))
        if CAUSAL:
            s = tl.where(n[None, :] <= at[:, None], s, float("-inf"))
        v = load_rows(V, n, stride_vs, shown, DV, BDV, True)  # [BN, BDV]
        p = probabilities(s, lse2[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = logit_gradient(p, dp, delta[:, None], p, False)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    part = PARTS + chunk.to(tl.int64) * stride_px + b * stride_pb + head * stride_ph
    store_rows(part, g, stride_ps, g < globals_, dq * scale, D, BD)


@triton.jit
def _rows_sum_kernel(
    PARTS, DQ, POSITIONS, stride_px, stride_pb, stride_ps, stride_ph, stride_db, stride_ds, stride_dh, chunks, globals_,
    heads, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq of one global row: its parts summed in order, written to the row's place."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    g = pid // heads % globals_
    b = (pid // heads // globals_).to(tl.int64)
    at = tl.load(POSITIONS + b * globals_ + g).to(tl.int64)
    columns = tl.arange(0, BD)
    dq = tl.zeros([BD], tl.float32)
    for chunk in range(chunks):
        part = tl.cast(chunk, tl.int64) * stride_px + b * stride_pb + g.to(tl.int64) * stride_ps + h * stride_ph
        dq += tl.load(PARTS + part + columns, mask=columns < D, other=0.0)
    pointers = DQ + b * stride_db + at * stride_ds + h * stride_dh + columns
    tl.store(pointers, dq.to(DQ.dtype.element_ty), mask=(columns < D) & (at >= 0))


@triton.jit
def _rows_dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, POSITIONS, KEY_MASK, DK, DV_OUT,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_lb, stride_lh, stride_dkb, stride_dks, stride_dkh,
    stride_dvb, stride_dvs, stride_dvh, stride_mb, stride_ms,
    sk, globals_, kv_heads, group, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys from all global rows, added to float32 ones where k and v are shared."""
    pid = tl.program_id(0)
    kv = pid % kv_heads
    tiles = tl.cdiv(sk, BN)
    n = pid // kv_heads % tiles * BN + tl.arange(0, BN)
    b = (pid // kv_heads // tiles).to(tl.int64)
    kv_head = kv.to(tl.int64)
    shown = _visible(n, n, sk, KEY_MASK + b * stride_mb, stride_ms, MASKED)
    k = load_rows(K + b * stride_kb + kv_head * stride_kh, n, stride_ks, shown, D, BD, True)  # [BN, BD]
    v = load_rows(V + b * stride_vb + kv_head * stride_vh, n, stride_vs, shown, DV, BDV, True)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    for member in range(group):
        head = (kv * group + member).to(tl.int64)
        QH = Q + b * stride_qb + head * stride_qh
        GH = DOUT + b * stride_gb + head * stride_gh
        for g0 in tl.range(0, globals_, BM):
            g = g0 + tl.arange(0, BM)
            at = tl.load(POSITIONS + b * globals_ + g, mask=g < globals_, other=-1).to(tl.int32)
            live = at >= 0
            q = load_rows(QH, at, stride_qs, live, D, BD, True)  # [BM, BD]
            lse2 = tl.load(LSE + b * stride_lb + head * stride_lh + at, mask=live, other=float("-inf")) * LOG2E
            delta = tl.load(DELTA + (b * kv_heads * group + head) * globals_ + g, mask=g < globals_, other=0.0)
            s, _ = logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, 0.0, False)  # [BN, BM]
            s = tl.where(shown[:, None] & live[None, :], s, float("-inf"))
            if CAUSAL:
                s = tl.where(n[:, None] <= at[None, :], s, float("-inf"))
            p = probabilities(s, lse2[None, :])
            do = load_rows(GH, at, stride_gs, live, DV, BDV, True)  # [BM, BDV]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = logit_gradient(p, dp, delta[None, :], p, False)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= scale
    DK += b * stride_dkb + kv_head * stride_dkh
    DV_OUT += b * stride_dvb + kv_head * stride_dvh
    if ADD_K:
        dk += load_rows(DK, n, stride_dks, n < sk, D, BD, True)
    if ADD_V:
        dv += load_rows(DV_OUT, n, stride_dvs, n < sk, DV, BDV, True)
    store_rows(DK, n, stride_dks, n < sk, dk, D, BD)
    store_rows(DV_OUT, n, stride_dvs, n < sk, dv, DV, BDV)


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    warps: int
    stages: int


def config(kernel: str, head_dim: int, element_size: int, globals_: int, target: str) -> Config:
    """Tiles of ``fwd``, ``dq`` or ``dkdv`` of the global rows; few rows take a small tile."""
    rows = max(16, triton.next_power_of_2(globals_))
    # these need registers that the others do not
    amd, sm_120 = target.startswith("gfx"), arch.capability(target) == 120
    if element_size > 2:
        return Config(32, 16, 8 if kernel == "dkdv" else 4, 1) if head_dim <= 64 else Config(16, 16, 8, 1)
    if kernel == "fwd":
        wide = head_dim <= 128 and not (sm_120 and head_dim <= 64)
        return Config(min(rows, 64), 64 if wide else 32, 4 if head_dim <= 64 else 8, 2)
    if kernel == "dq":
        wide = head_dim <= 64 or (head_dim <= 128 and not amd)
        return Config(min(rows, 64 if head_dim <= 64 and not sm_120 else 32), 64 if wide else 32, 8, 1)
    return Config(min(rows, 32), 64 if head_dim <= 128 else 32, 8, 1)


def _problem(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_mask: Tensor | None, left: int, right: int, dilation: int,
    causal: bool, scale: float,
) -> Problem:  # fmt: skip
    batch, length = q.shape[:2]
    count = positions.shape[1]
    spare = torch.where(positions >= 0, positions, length)
    hidden = torch.zeros(batch, length + 1, dtype=torch.uint8, device=q.device).scatter_(1, spare, 1)[:, :length]
    if key_mask is not None:
        hidden = hidden | ~key_mask
    rows = positions.clamp(min=0)[:, :, None, None]
    keys, values = (x.gather(1, rows.expand(-1, -1, *x.shape[2:])) for x in (k, v))
    prefix = Prefix(count, 0 if causal else UNBOUNDED.value, keys, values, positions.int().contiguous())
    return Problem(
        q, k, v, None, None, None, None, left, right, dilation, scale, 0.0, prefix if count else Prefix(0, 0),
        hidden.to(torch.uint8).contiguous(),
    )  # fmt: skip


def _call(kernel: str, q: Tensor, v: Tensor, globals_: int) -> tuple[Config, dict[str, int]]:
    d, dv = q.shape[-1], v.shape[-1]
    tile = config(kernel, max(padded(d), padded(dv)), q.element_size(), globals_, arch.of(q.device))
    constants = {"D": d, "DV": dv, "BD": padded(d), "BDV": padded(dv), "BM": tile.block_m, "BN": tile.block_n}
    return tile, constants | {"num_warps": tile.warps, "num_stages": tile.stages}


def global_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, global_index: Tensor, q_global: Tensor | None, k_global: Tensor | None,
    v_global: Tensor | None, key_mask: Tensor | None, left: int, right: int, dilation: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    positions = global_positions(global_index, key_mask, q.shape[1])
    out, lse = forward(_problem(q, k, v, positions, key_mask, left, right, dilation, causal, scale))
    count = positions.shape[1]
    if count == 0 or out.numel() == 0:
        return out, lse
    q_global, k_global, v_global = (
        a if a is not None else b for a, b in zip((q_global, k_global, v_global), (q, k, v))
    )
    batch, length, heads, _ = q.shape
    positions = positions.int().contiguous()
    chunks = triton.cdiv(length, CHUNK)
    parts = torch.empty((chunks, batch, count, heads, v.shape[-1]), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((chunks, batch, heads, count), dtype=torch.float32, device=q.device)
    tile, constants = _call("fwd", q, v, count)
    with on_device(q):
        _rows_fwd_kernel[(chunks, batch * heads * triton.cdiv(count, tile.block_m))](
            q_global, k_global, v_global, positions, key_mask if key_mask is not None else positions, parts, part_lse,
            *strides(q_global), *strides(k_global), *strides(v_global), *parts.stride()[:4], *part_lse.stride()[:3],
            *((0, 0) if key_mask is None else key_mask.stride()), length, count, heads, heads // k.shape[2], scale,
            CHUNK=CHUNK, MASKED=key_mask is not None, CAUSAL=causal, **constants,
        )  # fmt: skip
        _merge_kernel[(batch * count * heads,)](
            parts, part_lse, out, lse, None, positions, *parts.stride()[:4], *part_lse.stride()[:3], *strides(out),
            *lse.stride()[:2], chunks, count, heads, DV=v.shape[-1], BDV=padded(v.shape[-1]), SINK=False, SCATTER=True,
            num_warps=1,
        )  # fmt: skip
    return out, lse


def global_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, global_index: Tensor,
    q_global: Tensor | None, k_global: Tensor | None, v_global: Tensor | None, key_mask: Tensor | None, left: int,
    right: int, dilation: int, causal: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    positions = global_positions(global_index, key_mask, q.shape[1])
    problem = _problem(q, k, v, positions, key_mask, left, right, dilation, causal, scale)
    dq, dk, dv, _, dpk, dpv = backward(problem, dout, dlse, out, lse, torch.float32)
    batch, length, heads, _ = q.shape
    kv_heads, count = k.shape[2], positions.shape[1]
    own = (q_global is not None, k_global is not None, v_global is not None)
    if count and q.numel():
        # a global key is out of the band, so its row is still zero
        spare = torch.where(positions >= 0, positions, length)[:, :, None, None]
        dk, dv = (_with_rows(x, spare, part) for x, part in ((dk, dpk), (dv, dpv)))
    dqg, dkg, dvg = dq, dk, dv
    if own[0]:
        dqg = torch.zeros_like(q, memory_format=torch.contiguous_format)
    new = torch.empty if count and q.numel() else torch.zeros
    if own[1]:
        dkg = new(k.shape, dtype=k.dtype, device=k.device)
    if own[2]:
        dvg = new(v.shape, dtype=v.dtype, device=v.device)
    if count and q.numel():
        qg, kg, vg = (a if a is not None else b for a, b in zip((q_global, k_global, v_global), (q, k, v)))
        positions = positions.int().contiguous()
        chunks = triton.cdiv(length, CHUNK)
        parts = torch.empty((chunks, batch, count, heads, q.shape[-1]), dtype=torch.float32, device=q.device)
        delta = torch.empty((batch, heads, count), dtype=torch.float32, device=q.device)
        mask = key_mask if key_mask is not None else positions
        mask_strides = (0, 0) if key_mask is None else key_mask.stride()
        flags = {"MASKED": key_mask is not None, "CAUSAL": causal}
        tile, constants = _call("dq", q, v, count)
        with on_device(q):
            _rows_dq_kernel[(chunks, batch * heads * triton.cdiv(count, tile.block_m))](
                qg, kg, vg, out, dout, lse, dlse, positions, mask, parts, delta, *strides(qg), *strides(kg),
                *strides(vg),
                *strides(out), *strides(dout), *statistics_strides(lse), *((0, 0,
                0) if dlse is None else dlse.stride()),
                *parts.stride()[:4], *mask_strides, length, count, heads, heads // kv_heads, scale, CHUNK=CHUNK,
                DLSE_GIVEN=dlse is not None, **flags, **constants,
            )  # fmt: skip
            _rows_sum_kernel[(batch * count * heads,)](
                parts, dqg, positions, *parts.stride()[:4], *strides(dqg), chunks, count, heads, D=q.shape[-1],
                BD=padded(q.shape[-1]), num_warps=1,
            )  # fmt: skip
        tile, constants = _call("dkdv", q, v, count)
        with on_device(q):
            _rows_dkdv_kernel[(batch * kv_heads * triton.cdiv(length, tile.block_n),)](
                qg, kg, vg, dout, lse, delta, positions, mask, dkg, dvg, *strides(qg), *strides(kg), *strides(vg),
                *strides(dout), *statistics_strides(lse), *strides(dkg), *strides(dvg), *mask_strides, length, count,
                kv_heads, heads // kv_heads, scale, ADD_K=not own[1], ADD_V=not own[2], **flags, **constants,
            )  # fmt: skip
    results = [dq, dk.to(k.dtype), dv.to(v.dtype)]
    results += [g if there else q.new_empty(0) for g, there in zip((dqg, dkg, dvg), own)]
    return tuple(results)


def _with_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [B, S, H, D] with ``values`` in the given rows; row S takes what belongs nowhere."""
    wide = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
    return wide.scatter_(1, rows.expand(-1, -1, *x.shape[2:]), values)[:, :-1].contiguous()


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    plain = dict.fromkeys(("_rows_sum_kernel", "_merge_kernel", "_prefix_reduce_kernel"), ())
    shapes = (("bf16", 64, 16), ("bf16", 64, 256), ("bf16", 128, 64), ("bf16", 256, 16), ("fp32", 64, 16))
    for dtype, d, count in shapes:
        x = [tensor(dtype, 2, 4096, 12, d) for _ in range(6)]
        index, mask = tensor("i64", 2, count), tensor("bool", 2, 4096)
        yield AotCase(
            f"{dtype}_d{d}_g{count}",
            train("global_attention", *x[:3], index, *x[3:], mask, window=(256, 256), outputs=1),
            expect={"nvidia": ("MMA",), **plain} if dtype == "bf16" else (),
        )
    x = [tensor("bf16", 2, 4096, 12, 64) for _ in range(3)]
    yield AotCase("bf16_d64_shared", train("global_attention", *x, tensor("i64", 2, 16), window=(256, 256), outputs=1))
