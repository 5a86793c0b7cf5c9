"""Gated activations; a program makes some rows of some columns of the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import constants, on_device


@triton.jit
def _activate(gate, alpha, ACTIVATION: tl.constexpr):
    """The activation of gate and its derivative."""
    if ACTIVATION == "relu2":
        positive = tl.where(gate < 0.0, 0.0, gate)
        activated, slope = positive * positive, 2.0 * positive
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        activated, slope = gate * share, share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(x)) is a sigmoid of twice the argument
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        inner = 1.5957691216057308 + 0.2140644488 * gate * gate
        # far out the square of gate overflows beside a factor that is 0
        bend = tl.where((share == 0.0) | (share == 1.0), 0.0, gate * share * (1.0 - share) * inner)
        activated, slope = gate * share, share + bend
    else:
        factor = alpha if ACTIVATION == "swiglu_oai" else 1.0
        share = tl.sigmoid(factor * gate)
        activated, slope = gate * share, share + factor * gate * share * (1.0 - share)
    return activated, slope


@triton.jit
def _clamp(gate, up, limit, CLAMPED: tl.constexpr):
    # written so that NaN passes every comparison
    if CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    return gate, up


@triton.jit
def _load(gate_ptr, gate_row, up_ptr, up_row, row, col, mask, INTERLEAVED: tl.constexpr):
    """gate and up in float32 of columns `col` of each; INTERLEAVED: of pairs of columns `col` of gate."""
    gate = tl.load(gate_ptr + row[:, None] * gate_row + col[None, :], mask, 0.0).to(tl.float32)
    if INTERLEAVED:
        # one contiguous read, then apart
        first, up = tl.split(tl.reshape(gate, (gate.shape[0], gate.shape[1] // 2, 2)))
    else:
        first, up = gate, tl.load(up_ptr + row[:, None] * up_row + col[None, :], mask, 0.0).to(tl.float32)
    return first, up


@triton.jit
def _place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Rows, columns and mask of this program, of rows of WIDTH * columns."""
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks * (WIDTH * BLOCK_N) + tl.arange(0, WIDTH * BLOCK_N)
    return row, col, (row < rows)[:, None] & (col < WIDTH * columns)[None, :]


@triton.jit(do_not_specialize=["rows", "alpha", "limit"])
def gated_activation_fwd_kernel(
    gate_ptr,
    gate_row,
    up_ptr,
    up_row,
    out_ptr,
    rows,
    columns,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [T, I] contiguous."""
    row, col, mask = _place(rows, columns, BLOCK_M, BLOCK_N, 1)
    _, wide_col, wide_mask = _place(rows, columns, BLOCK_M, BLOCK_N, 2 if INTERLEAVED else 1)
    gate, up = _load(gate_ptr, gate_row, up_ptr, up_row, row, wide_col, wide_mask, INTERLEAVED)
    gate, up = _clamp(gate, up, limit, CLAMPED)
    activated, _ = _activate(gate, alpha, ACTIVATION)
    if ACTIVATION == "swiglu_oai":
        up += 1.0
    tl.store(out_ptr + row[:, None] * columns + col[None, :], (activated * up).to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "alpha", "limit"])
def gated_activation_bwd_kernel(
    dout_ptr,
    dout_row,
    gate_ptr,
    gate_row,
    up_ptr,
    up_row,
    dgate_ptr,
    dup_ptr,
    d_row,
    rows,
    columns,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgate and dup with rows d_row apart; where INTERLEAVED dgate holds both."""
    row, col, mask = _place(rows, columns, BLOCK_M, BLOCK_N, 1)
    _, wide_col, wide_mask = _place(rows, columns, BLOCK_M, BLOCK_N, 2 if INTERLEAVED else 1)
    given_gate, given_up = _load(gate_ptr, gate_row, up_ptr, up_row, row, wide_col, wide_mask, INTERLEAVED)
    gate, up = _clamp(given_gate, given_up, limit, CLAMPED)
    dout = tl.load(dout_ptr + row[:, None] * dout_row + col[None, :], mask, 0.0).to(tl.float32)
    activated, slope = _activate(gate, alpha, ACTIVATION)
    if ACTIVATION == "swiglu_oai":
        up += 1.0
    dgate, dup = dout * up * slope, dout * activated
    if CLAMPED:
        dgate = tl.where(given_gate > limit, 0.0, dgate)
        dup = tl.where((given_up > limit) | (given_up < -limit), 0.0, dup)
    dtype = dgate_ptr.dtype.element_ty
    if INTERLEAVED:
        place = dgate_ptr + row[:, None] * d_row + wide_col[None, :]
        tl.store(place, tl.interleave(dgate, dup).to(dtype), wide_mask)
    else:
        tl.store(dgate_ptr + row[:, None] * d_row + col[None, :], dgate.to(dtype), mask)
        tl.store(dup_ptr + row[:, None] * d_row + col[None, :], dup.to(dtype), mask)


@dataclass(frozen=True)
class Config:
    """Rows and columns of a program."""

    block_m: int
    block_n: int
    num_warps: int


def config(columns: int) -> Config:
    """About 8 elements for each of 128 threads."""
    block_n = min(max(16, triton.next_power_of_2(columns)), 1024)
    return Config(1024 // block_n, block_n, 4)


def _halves(gate: Tensor, up: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up; where the kernel reads both by gate's pointer, that twice."""
    if up is not None:
        return gate, up
    return (gate, gate) if interleaved else gate.chunk(2, -1)


def gated_activation_fwd(gate, up, activation, alpha, limit, interleaved):
    columns = gate.shape[1] if up is not None else gate.shape[1] // 2
    out = torch.empty((gate.shape[0], columns), dtype=gate.dtype, device=gate.device)
    g, u = _halves(gate, up, interleaved)
    tile = config(columns)
    if out.numel():
        with on_device(gate):
            gated_activation_fwd_kernel[
                (triton.cdiv(out.shape[0], tile.block_m) * triton.cdiv(columns, tile.block_n),)
            ](
                g,
                g.stride(0),
                u,
                u.stride(0),
                out,
                out.shape[0],
                columns,
                alpha,
                limit,
                ACTIVATION=activation,
                CLAMPED=limit > 0.0,
                INTERLEAVED=interleaved,
                **constants(tile),
            )
    return out


def gated_activation_bwd(dout, gate, up, activation, alpha, limit, interleaved):
    rows, columns = dout.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(0 if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    (g, u), (dg, du) = _halves(gate, up, interleaved), _halves(dgate, None if up is None else dup, interleaved)
    tile = config(columns)
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    if dout.numel():
        with on_device(gate):
            gated_activation_bwd_kernel[(programs,)](
                dout,
                dout.stride(0),
                g,
                g.stride(0),
                u,
                u.stride(0),
                dg,
                du,
                dg.stride(0),
                rows,
                columns,
                alpha,
                limit,
                ACTIVATION=activation,
                CLAMPED=limit > 0.0,
                INTERLEAVED=interleaved,
                **constants(tile),
            )
    return dgate, dup


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    wide = ("LDG.128", "STG.128")
    for dtype in ("bf16", "fp32"):
        gate = tensor(dtype, 4096, 2 * 14336)
        yield AotCase(f"{dtype}_joined", train("gated_activation", gate), expect=wide)
    gate = tensor("bf16", 4096, 2880)
    for activation in ("gelu", "gelu_tanh", "relu2"):
        yield AotCase(activation, train("gated_activation", gate, gate, activation=activation), expect=wide)
    oai = {"activation": "swiglu_oai", "limit": 7.0, "layout": "interleaved"}
    yield AotCase("oai", train("gated_activation", tensor("bf16", 4096, 2 * 2880), **oai), expect=wide)
