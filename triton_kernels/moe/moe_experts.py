"""The expert layer's own kernels: the gathered up-projection with the activation in its epilogue, and its backward."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from ..common import tuned
from ..common.grouped import find_tile, groups_padded, max_tiles, tile_order
from ..common.launch import on_device
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
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
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
    else:
        clamp = limit > 0
        gate_high = clamp & (gate > limit)
        up_high = clamp & (up > limit)
        up_low = clamp & (up < -limit)
        gate = tl.where(gate_high, limit, gate)
        up = tl.where(up_high, limit, tl.where(up_low, -limit, up)) + 1.0
        s = _sigmoid(alpha * gate)
        g = gate * s
        h = g * up
        d_gate = tl.where(gate_high, 0.0, up * (s + alpha * g * (1.0 - s)))
        d_up = tl.where(up_high | up_low, 0.0, g)
    return h, d_gate, d_up


@triton.jit(do_not_specialize=["rows", "x_rows", "tiles_m", "programs", "top_k"])
def moe_experts_up_kernel(
    x, w, bias, h, z, offsets, order,
    rows, x_rows, INNER, K, stride_x, stride_we, stride_wn, stride_wk, tiles_m, programs, top_k, alpha, limit,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GATHER: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(INNER, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        group, row_begin, row_end = find_tile(tile_m, offsets, rows, GROUPS, GROUPS_PADDED, BLOCK_M)
        if row_begin < row_end:
            row = row_begin + tl.arange(0, BLOCK_M)
            inside = row < row_end
            col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            wide = group.to(tl.int64)
            source, exists = source_rows(order, row, inside & (group < GROUPS), x_rows, top_k, GATHER)
            k = tl.arange(0, BLOCK_K)
            x_at = x + source[:, None] * stride_x
            gate_at = w + wide * stride_we + col.to(tl.int64)[None, :] * stride_wn
            up_at = gate_at + tl.full([], INNER, tl.int64) * stride_wn
            # two accumulators: two dots into one are miscompiled on some targets
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            depth = tl.where(group < GROUPS, K, 0)
            for start in range(0, depth, BLOCK_K):
                step = start + k
                a = tl.load(x_at + step[None, :], mask=exists[:, None] & (step < K)[None, :], other=0.0)
                w_mask = (step < K)[:, None] & (col < INNER)[None, :]
                w_step = step.to(tl.int64)[:, None] * stride_wk
                gate = tl.dot(a, tl.load(gate_at + w_step, mask=w_mask, other=0.0), gate, input_precision="ieee")
                up = tl.dot(a, tl.load(up_at + w_step, mask=w_mask, other=0.0), up, input_precision="ieee")
            if HAS_BIAS:
                b_mask = (col < INNER) & (group < GROUPS)
                b_at = bias + wide * 2 * INNER + col
                gate += tl.load(b_at, mask=b_mask, other=0.0).to(tl.float32)[None, :]
                up += tl.load(b_at + INNER, mask=b_mask, other=0.0).to(tl.float32)[None, :]
            mask = inside[:, None] & (col < INNER)[None, :]
            if SAVE:
                z_at = z + row.to(tl.int64)[:, None] * (2 * INNER) + col[None, :]
                tl.store(z_at, gate.to(z.dtype.element_ty), mask=mask)
                tl.store(z_at + INNER, up.to(z.dtype.element_ty), mask=mask)
            value, _, _ = activate(gate, up, alpha, limit, ACTIVATION)
            tl.store(h + row.to(tl.int64)[:, None] * INNER + col[None, :], value.to(h.dtype.element_ty), mask=mask)


@triton.jit
def moe_experts_act_bwd_kernel(
    z, dh, offsets, order, weights, dz, weighted_h, dweights, INNER, alpha, limit,
    GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dz, weight * h, and the slot's weight gradient <h, dh>."""
    row = tl.program_id(0)
    kept = (row >= tl.load(offsets)) & (row < tl.load(offsets + GROUPS))
    wide = row.to(tl.int64)
    slot = tl.load(order + row).to(tl.int64)
    w = tl.load(weights + slot).to(tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, INNER, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < INNER
        read = mask & kept
        gate = tl.load(z + wide * 2 * INNER + col, mask=read, other=0.0).to(tl.float32)
        up = tl.load(z + wide * 2 * INNER + INNER + col, mask=read, other=0.0).to(tl.float32)
        d = tl.load(dh + wide * INNER + col, mask=read, other=0.0).to(tl.float32)
        h, d_gate, d_up = activate(gate, up, alpha, limit, ACTIVATION)
        dot += h * d
        dz_at = dz + wide * 2 * INNER + col
        tl.store(dz_at, tl.where(read, d_gate * d * w, 0.0).to(dz.dtype.element_ty), mask=mask)
        tl.store(dz_at + INNER, tl.where(read, d_up * d * w, 0.0).to(dz.dtype.element_ty), mask=mask)
        tl.store(weighted_h + wide * INNER + col, tl.where(read, h * w, 0.0).to(weighted_h.dtype.element_ty), mask=mask)
    tl.store(dweights + slot, tl.sum(dot, axis=0).to(dweights.dtype.element_ty))


def narrowed(tile: Config) -> Config:
    """A tile holds a gate and an up column block: from 64 rows on, their sums fit the registers of twice the warps."""
    if tile.BLOCK_M < 64:
        return tile
    return replace(tile, BLOCK_N=min(tile.BLOCK_N, 128 if tile.BLOCK_M < 128 else 64), num_warps=8)


CONFIGS = {"moe_experts_up": TRIED}


def config(rows, groups, inner, k, dtype, device) -> Config:
    """The measured tile, else the heuristic's."""
    tile = narrowed(heuristic(rows, groups, inner, k, dtype.itemsize))
    tile = fitted(tile, 2, dtype.itemsize, budget_of(device))
    return tuned.choose("moe_experts_up", shape_key(rows, groups, inner, k, dtype), device, tile)


def moe_experts_up(x, w_gate_up, offsets, order, bias, top_k, activation, alpha, limit, save):
    rows, groups, inner, k = order.shape[0], w_gate_up.shape[0], w_gate_up.shape[1] // 2, w_gate_up.shape[2]
    h = x.new_empty((rows, inner))
    z = x.new_empty((rows if save else 0, 2 * inner))
    if h.numel() == 0:
        return h, z
    tile = config(rows, groups, inner, k, x.dtype, x.device)
    with on_device(x):
        if tile.gather_first:
            x, order = gathered(x, order, offsets, top_k), None
        tiles_m = max_tiles(rows, groups, tile.BLOCK_M)
        programs = programs_of(tiles_m * triton.cdiv(inner, tile.BLOCK_N), x.device)
        moe_experts_up_kernel[(programs,)](
            x, w_gate_up, bias, h, z, offsets, order,
            rows, x.shape[0], inner, k, x.stride(0), w_gate_up.stride(0), w_gate_up.stride(1), w_gate_up.stride(2),
            tiles_m, programs, top_k, alpha, limit,
            GROUPS=groups, GROUPS_PADDED=groups_padded(groups), GATHER=order is not None, HAS_BIAS=bias is not None,
            SAVE=save, ACTIVATION=activation, **tile.options,
        )  # fmt: skip
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
                z, dh, offsets, order, weights, dz, weighted_h, dweights, inner, alpha, limit,
                GROUPS=offsets.shape[0] - 1, ACTIVATION=activation, BLOCK=block, num_warps=4,
            )  # fmt: skip
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
