"""The expert layer's own kernels: the gathered up-projection with the activation in its epilogue, and its backward."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from ..common import tuned
from ..common.grouped import find_tile, max_tiles, tile_order
from ..common.launch import constants, on_device
from ..common.rows import Experts, Matrix
from .grouped_matmul import (
    TRIED,
    Config,
    budget_of,
    fitted,
    gathered,
    heuristic,
    programs_of,
    shape_key,
    source_rows,
)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The activation and its derivatives for gate and up."""
    if ACTIVATION == "silu":
        s = _sigmoid(gate)
        g = gate * s
        h = g * up
        d_gate = up * (s + g * (1.0 - s))
        d_up = g
    elif ACTIVATION == "gelu":
        # 0.5 (1 + tanh(u)) is a sigmoid of 2 u
        square = gate * gate
        s = _sigmoid(1.5957691216057308 * (gate + 0.044715 * square * gate))
        g = gate * s
        h = g * up
        d_gate = up * (s + g * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * square))
        d_up = g
    elif ACTIVATION == "gelu_erf":
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        g = gate * cdf
        h = g * up
        d_gate = up * (cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate))
        d_up = g
    else:
        clamp = limit > 0
        gate_high = clamp & (gate > limit)
        up_high = clamp & (up > limit)
        up_low = clamp & (up < -limit)
        gate = tl.where(gate_high, limit, gate)
        up = tl.where(up_high, limit, tl.where(up_low, -limit, up))
        if ACTIVATION == "silu_clamped":
            s = _sigmoid(gate)
            g = gate * s
            slope = s + g * (1.0 - s)
        else:
            up += 1.0
            s = _sigmoid(alpha * gate)
            g = gate * s
            slope = s + alpha * g * (1.0 - s)
        h = g * up
        d_gate = tl.where(gate_high, 0.0, up * slope)
        d_up = tl.where(up_high | up_low, 0.0, g)
    return h, d_gate, d_up


@triton.jit(do_not_specialize=["rows", "x_rows", "tiles_m", "top_k"])
def moe_experts_up_kernel(
    x: Matrix,
    w: Experts,
    bias_ptr,
    h_ptr,
    z_ptr,
    offsets_ptr,
    order_ptr,
    rows,
    x_rows,
    inner,
    k,
    tiles_m,
    top_k,
    activation,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles of h [rows, inner], and of gate and up in z [rows, 2 inner] if given; activation: (alpha, limit)."""
    alpha, limit = activation
    tiles_n = tl.cdiv(inner, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        group, row_begin, row_end = find_tile(tile_m, offsets_ptr, rows, GROUPS, BLOCK_M)
        if row_begin < row_end:
            row = row_begin + tl.arange(0, BLOCK_M)
            inside = row < row_end
            col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            wide = group.to(tl.int64)
            source, exists = source_rows(order_ptr, row, inside & (group < GROUPS), x_rows, top_k)
            x_at = x.ptr + source[:, None] * x.row
            gate_at = w.ptr + wide * w.expert + col.to(tl.int64)[None, :] * w.row
            up_at = gate_at + tl.full([], inner, tl.int64) * w.row
            # two accumulators: two dots into one are miscompiled on some targets
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            depth = tl.where(group < GROUPS, k, 0)
            for start in range(0, depth, BLOCK_K):
                step = start + tl.arange(0, BLOCK_K)
                # [BLOCK_M, BLOCK_K], twice [BLOCK_K, BLOCK_N]
                a = tl.load(x_at + step[None, :], mask=exists[:, None] & (step < k)[None, :], other=0.0)
                w_mask = (step < k)[:, None] & (col < inner)[None, :]
                w_step = step.to(tl.int64)[:, None] * w.column
                gate = tl.dot(a, tl.load(gate_at + w_step, mask=w_mask, other=0.0), gate, input_precision="ieee")
                up = tl.dot(a, tl.load(up_at + w_step, mask=w_mask, other=0.0), up, input_precision="ieee")
            if bias_ptr is not None:
                b_mask = (col < inner) & (group < GROUPS)
                b_at = bias_ptr + wide * 2 * inner + col
                gate += tl.load(b_at, mask=b_mask, other=0.0).to(tl.float32)[None, :]
                up += tl.load(b_at + inner, mask=b_mask, other=0.0).to(tl.float32)[None, :]
            mask = inside[:, None] & (col < inner)[None, :]
            if z_ptr is not None:
                z_at = z_ptr + row.to(tl.int64)[:, None] * (2 * inner) + col[None, :]
                tl.store(z_at, gate.to(z_ptr.dtype.element_ty), mask=mask)
                tl.store(z_at + inner, up.to(z_ptr.dtype.element_ty), mask=mask)
            h, _, _ = _activate(gate, up, alpha, limit, ACTIVATION)
            h_at = h_ptr + row.to(tl.int64)[:, None] * inner + col[None, :]
            tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def moe_experts_act_bwd_kernel(
    z_ptr,
    dh_ptr,
    offsets_ptr,
    order_ptr,
    weights_ptr,
    dz_ptr,
    weighted_h_ptr,
    dweights_ptr,
    inner,
    alpha,
    limit,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: dz, weight * h, and the slot's weight gradient <h, dh>."""
    row = tl.program_id(0)
    kept = (row >= tl.load(offsets_ptr)) & (row < tl.load(offsets_ptr + GROUPS))
    wide = row.to(tl.int64)
    slot = tl.load(order_ptr + row).to(tl.int64)
    weight = tl.load(weights_ptr + slot).to(tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inner, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < inner
        read = mask & kept
        gate = tl.load(z_ptr + wide * 2 * inner + col, mask=read, other=0.0).to(tl.float32)  # [BLOCK]
        up = tl.load(z_ptr + wide * 2 * inner + inner + col, mask=read, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + wide * inner + col, mask=read, other=0.0).to(tl.float32)
        h, d_gate, d_up = _activate(gate, up, alpha, limit, ACTIVATION)
        dot += h * dh
        dz_at = dz_ptr + wide * 2 * inner + col
        tl.store(dz_at, tl.where(read, d_gate * dh * weight, 0.0).to(dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_at + inner, tl.where(read, d_up * dh * weight, 0.0).to(dz_ptr.dtype.element_ty), mask=mask)
        weighted = tl.where(read, h * weight, 0.0).to(weighted_h_ptr.dtype.element_ty)
        tl.store(weighted_h_ptr + wide * inner + col, weighted, mask=mask)
    tl.store(dweights_ptr + slot, tl.sum(dot, axis=0).to(dweights_ptr.dtype.element_ty))


def narrowed(tile: Config) -> Config:
    """A tile holds a gate and an up column block: from 64 rows on, their sums fit the registers of twice the warps."""
    if tile.block_m < 64:
        return tile
    return replace(tile, block_n=min(tile.block_n, 128 if tile.block_m < 128 else 64), num_warps=8)


CONFIGS = {"moe_experts_up": TRIED}


def config(rows, groups, inner, k, dtype, device) -> Config:
    """The measured tile, else the heuristic's."""
    tile = narrowed(heuristic(rows, groups, inner, k, dtype.itemsize))
    tile = fitted(tile, 2, dtype.itemsize, budget_of(device))
    return tuned.choose("moe_experts_up", shape_key(rows, groups, inner, k, dtype), device, tile)


def _kind(activation, limit):
    """silu with a limit is a kind of its own, so that silu without one stays free of it."""
    return "silu_clamped" if activation == "silu" and limit > 0 else activation


def moe_experts_up(x, w_gate_up, offsets, order, bias, top_k, activation, alpha, limit, save, _w_scale=None):
    rows, groups, inner, k = order.shape[0], w_gate_up.shape[0], w_gate_up.shape[1] // 2, w_gate_up.shape[2]
    h = x.new_empty((rows, inner))
    z = x.new_empty((rows if save else 0, 2 * inner))
    if h.numel() == 0:
        return h, z
    tile = config(rows, groups, inner, k, x.dtype, x.device)
    if tile.gather_first:
        x, order = gathered(x, order, offsets, top_k), None
    tiles_m = max_tiles(rows, groups, tile.block_m)
    programs = programs_of(tiles_m * triton.cdiv(inner, tile.block_n), x.device)
    with on_device(x):
        moe_experts_up_kernel[(programs,)](
            Matrix.of(x),
            Experts.of(w_gate_up),
            bias,
            h,
            z if save else None,
            offsets,
            order,
            rows,
            x.shape[0],
            inner,
            k,
            tiles_m,
            top_k,
            (alpha, limit),
            ACTIVATION=_kind(activation, limit),
            GROUPS=groups,
            **constants(tile),
        )
    return h, z


def moe_experts_act_bwd(z, dh, offsets, order, weights, activation, alpha, limit):
    rows, inner = z.shape[0], z.shape[1] // 2
    dz = z.new_empty(z.shape)
    weighted_h = z.new_empty((rows, inner))
    dweights = weights.new_empty(weights.shape)
    if rows:
        block = min(1024, max(16, triton.next_power_of_2(inner)))
        with on_device(z):
            moe_experts_act_bwd_kernel[(rows,)](
                z,
                dh,
                offsets,
                order,
                weights,
                dz,
                weighted_h,
                dweights,
                inner,
                alpha,
                limit,
                GROUPS=offsets.shape[0] - 1,
                ACTIVATION=_kind(activation, limit),
                BLOCK=block,
                num_warps=4,
            )
    return dz, weighted_h, dweights


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    experts, hidden, inner = 128, 2048, 768
    for dtype in ("bf16", "fp16", "fp32"):
        up, down = tensor(dtype, experts, 2 * inner, hidden), tensor(dtype, experts, hidden, inner)
        for rows in (512, 8, 64) if dtype == "bf16" else (512,):
            tokens = rows * experts // 8
            routing = tensor("fp32", tokens, 8), tensor("i32", tokens, 8)
            yield AotCase(
                f"{dtype}_m{rows}",
                train("moe_experts", tensor(dtype, tokens, hidden), up, down, *routing),
                expect={"moe_experts_up_kernel": ("MMA",)} if dtype != "fp32" else (),
            )
