"""Block quantisation: each program handles one or more whole blocks, so a block is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import fp8
from ..common.launch import on_device, vector_width
from .host import CODES, blocks_of, empty_row_scale


@triton.jit(do_not_specialize=["m", "pitch4", "eps_bits"])
def fp8_quantize_rows_kernel(
    x_ptr,
    x_sm,
    q_ptr,
    q_sm,
    scale_ptr,
    pitch4,
    m,
    k,
    eps_bits,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """BLOCK_M rows of one 128-wide block column; q [M, K], scale [KB, 4 * pitch4]."""
    blocks = tl.cdiv(k, 128)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % blocks
    col = block * 128 + tl.arange(0, 128)
    row64 = row.to(tl.int64)
    mask = (row < m)[:, None] & (col < k)[None, :]
    # [BLOCK_M, 128]
    x = tl.load(x_ptr + row64[:, None] * x_sm + col[None, :], mask, 0.0).to(tl.float32)
    scale = fp8.block_scale(tl.max(fp8.finite_magnitude(x), 1), eps_bits, POW2)
    tl.store(scale_ptr + block.to(tl.int64) * pitch4 * 4 + row64, scale, row < m)
    tl.store(q_ptr + row64[:, None] * q_sm + col[None, :], fp8.quantize(x, scale[:, None], POW2, NATIVE), mask)


@triton.jit(do_not_specialize=["m", "eps_bits"])
def fp8_quantize_tiles_kernel(
    x_ptr,
    x_sg,
    x_sm,
    q_ptr,
    scale_ptr,
    m,
    k,
    eps_bits,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One 128 x 128 block; q [G, M, K], scale [G, MB, KB], both contiguous."""
    blocks = tl.cdiv(k, 128)
    row_blocks = tl.cdiv(m, 128)
    pid = tl.program_id(0)
    g = (pid // (blocks * row_blocks)).to(tl.int64)
    row = (pid // blocks % row_blocks * 128 + tl.arange(0, 128)).to(tl.int64)
    col = pid % blocks * 128 + tl.arange(0, 128)
    mask = (row < m)[:, None] & (col < k)[None, :]
    # [128, 128]
    x = tl.load(x_ptr + g * x_sg + row[:, None] * x_sm + col[None, :], mask, 0.0).to(tl.float32)
    amax = tl.max(tl.max(fp8.finite_magnitude(x), 1), 0)
    scale = fp8.block_scale(amax, eps_bits, POW2)
    tl.store(scale_ptr + pid, scale)
    tl.store(q_ptr + (g * m + row)[:, None] * k + col[None, :], fp8.quantize(x, scale, POW2, NATIVE), mask)


@triton.jit(do_not_specialize=["m", "m_vec", "pitch4", "eps_bits"])
def fp8_quantize_dual_fwd_kernel(
    x_ptr,
    x_sm,
    q_ptr,
    scale_ptr,
    pitch4,
    qt_ptr,
    scale_t_ptr,
    pitch4_t,
    m,
    m_vec,
    k,
    eps_bits,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    VEC: tl.constexpr,
):
    """One 128 x 128 tile along both directions; q [M, K], q_t [K, M] with m = m_vec * VEC."""
    blocks = tl.cdiv(k, 128)
    row_block = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = (row_block * 128 + tl.arange(0, 128)).to(tl.int64)
    col = (block * 128 + tl.arange(0, 128)).to(tl.int64)
    mask = (row < m)[:, None] & (col < k)[None, :]
    # [128, 128]
    x = tl.load(x_ptr + row[:, None] * x_sm + col[None, :], mask, 0.0).to(tl.float32)
    magnitude = fp8.finite_magnitude(x)
    scale = fp8.block_scale(tl.max(magnitude, 1), eps_bits, POW2)
    tl.store(scale_ptr + block.to(tl.int64) * pitch4 * 4 + row, scale, row < m)
    tl.store(q_ptr + row[:, None] * k + col[None, :], fp8.quantize(x, scale[:, None], POW2, NATIVE), mask)
    scale_t = fp8.block_scale(tl.max(magnitude, 0), eps_bits, POW2)
    tl.store(scale_t_ptr + row_block.to(tl.int64) * pitch4_t * 4 + col, scale_t, col < k)
    codes = tl.trans(fp8.quantize(x, scale_t[None, :], POW2, NATIVE))
    tl.store(qt_ptr + col[:, None] * m_vec * VEC + row[None, :], codes, tl.trans(mask))


@triton.jit(do_not_specialize=["rows", "m", "scale_sg"])
def fp8_dequantize_fwd_kernel(
    q_ptr,
    q_sg,
    q_sm,
    scale_ptr,
    scale_sg,
    scale_sm,
    scale_sk,
    out_ptr,
    rows,
    m,
    k,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """BLOCK_M rows, counted over all g, of one 128-wide block column."""
    blocks = tl.cdiv(k, 128)
    i = (tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    block = tl.program_id(0) % blocks
    col = block * 128 + tl.arange(0, 128)
    g = i // m
    row = i % m
    mask = (i < rows)[:, None] & (col < k)[None, :]
    # [BLOCK_M, 128]
    code = tl.load(q_ptr + (g * q_sg + row * q_sm)[:, None] + col[None, :], mask, 0)
    # [BLOCK_M]
    scale = tl.load(scale_ptr + g * scale_sg + row // BLOCK_ROWS * scale_sm + block * scale_sk, i < rows, 0.0)
    value = fp8.decode(code) * scale[:, None]
    tl.store(out_ptr + i[:, None] * k + col[None, :], value.to(out_ptr.dtype.element_ty), mask)


# rows of one program of the kernels that take whole rows
ROWS = {"BLOCK_M": 16, "num_warps": 4}


def fp8_quantize_rows(x, pow2, eps):
    m, k = x.shape
    q = torch.empty((m, k), dtype=CODES, device=x.device)
    scale = empty_row_scale(x, m, blocks_of(k))
    if q.numel():
        grid = (triton.cdiv(m, ROWS["BLOCK_M"]) * blocks_of(k),)
        with on_device(x):
            fp8_quantize_rows_kernel[grid](
                x,
                x.stride(0),
                q.view(torch.uint8),
                k,
                scale,
                scale.stride(1) // 4,
                m,
                k,
                fp8.float_bits(eps),
                POW2=pow2,
                NATIVE=fp8.native_cast(x.device),
                **ROWS,
            )
    return q, scale


def fp8_quantize_tiles(x, pow2, eps):
    g, m, k = x.shape
    q = torch.empty((g, m, k), dtype=CODES, device=x.device)
    scale = torch.empty((g, blocks_of(m), blocks_of(k)), dtype=torch.float32, device=x.device)
    if q.numel():
        with on_device(x):
            fp8_quantize_tiles_kernel[(scale.numel(),)](
                x,
                x.stride(0),
                x.stride(1),
                q.view(torch.uint8),
                scale,
                m,
                k,
                fp8.float_bits(eps),
                POW2=pow2,
                NATIVE=fp8.native_cast(x.device),
                num_warps=8,
            )
    return q, scale


def fp8_quantize_dual_fwd(x, pow2, eps):
    m, k = x.shape
    q = torch.empty((m, k), dtype=CODES, device=x.device)
    q_t = torch.empty((k, m), dtype=CODES, device=x.device)
    scale, scale_t = empty_row_scale(x, m, blocks_of(k)), empty_row_scale(x, k, blocks_of(m))
    if q.numel():
        vec = vector_width(1, m)
        with on_device(x):
            fp8_quantize_dual_fwd_kernel[(blocks_of(m) * blocks_of(k),)](
                x,
                x.stride(0),
                q.view(torch.uint8),
                scale,
                scale.stride(1) // 4,
                q_t.view(torch.uint8),
                scale_t,
                scale_t.stride(1) // 4,
                m,
                m // vec,
                k,
                fp8.float_bits(eps),
                POW2=pow2,
                NATIVE=fp8.native_cast(x.device),
                VEC=vec,
                num_warps=8,
            )
    return q, scale, q_t, scale_t


def fp8_dequantize_fwd(q, scale, block_rows, out_dtype):
    g, m, k = q.shape
    out = torch.empty((g, m, k), dtype=out_dtype, device=q.device)
    if out.numel():
        grid = (triton.cdiv(g * m, ROWS["BLOCK_M"]) * blocks_of(k),)
        with on_device(q):
            fp8_dequantize_fwd_kernel[grid](
                q.view(torch.uint8),
                q.stride(0),
                q.stride(1),
                scale,
                *scale.stride(),
                out,
                g * m,
                m,
                k,
                BLOCK_ROWS=block_rows,
                **ROWS,
            )
    return out


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for dtype in ("bf16", "fp32"):
        x = tensor(dtype, 4096, 7168)
        for rule in ("fp32", "pow2"):
            for name, block in (("rows", (1, 128)), ("tiles", (128, 128))):
                yield AotCase(f"{name}_{dtype}_{rule}", call("fp8_quantize", x, block=block, scale_format=rule))
            yield AotCase(f"dual_{dtype}_{rule}", call("fp8_quantize_dual", x, scale_format=rule))
        out = {"out_dtype": torch.bfloat16 if dtype == "bf16" else torch.float32}
        for rows in (1, 128):
            codes, scales = tensor("fp8", 4096, 7168), tensor("fp32", 4096 // rows, 56)
            yield AotCase(f"dequantize_{rows}_{dtype}", call("fp8_dequantize", codes, scales, block=(rows, 128), **out))
