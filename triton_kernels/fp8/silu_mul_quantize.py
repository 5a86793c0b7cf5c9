"""silu(gate) * up and its quantisation; one program makes some rows of one 128-wide block column."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import fp8
from ..common.launch import on_device
from .host import CODES, blocks_of, empty_row_scale


@triton.jit(do_not_specialize=["m", "pitch4", "eps_bits"])
def silu_mul_quantize_fwd_kernel(
    x_ptr,
    x_sm,
    q_ptr,
    scale_ptr,
    pitch4,
    m,
    k,
    eps_bits,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """gate_up [M, 2K] to q [M, K] and scale [KB, 4 * pitch4]."""
    blocks = tl.cdiv(k, 128)
    row = (tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    block = tl.program_id(0) % blocks
    col = block * 128 + tl.arange(0, 128)
    mask = (row < m)[:, None] & (col < k)[None, :]
    place = x_ptr + row[:, None] * x_sm + col[None, :]
    # [BLOCK_M, 128]
    gate = tl.load(place, mask, 0.0).to(tl.float32)
    up = tl.load(place + k, mask, 0.0).to(tl.float32)
    x = fp8.silu_mul(gate, up)
    scale = fp8.block_scale(tl.max(fp8.finite_magnitude(x), 1), eps_bits, POW2)
    tl.store(scale_ptr + block.to(tl.int64) * pitch4 * 4 + row, scale, row < m)
    tl.store(q_ptr + row[:, None] * k + col[None, :], fp8.quantize(x, scale[:, None], POW2, NATIVE), mask)


TILE = {"BLOCK_M": 16, "num_warps": 4}


def silu_mul_quantize_fwd(gate_up, pow2, eps):
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    q = torch.empty((m, k), dtype=CODES, device=gate_up.device)
    scale = empty_row_scale(gate_up, m, blocks_of(k))
    if q.numel():
        with on_device(gate_up):
            silu_mul_quantize_fwd_kernel[(triton.cdiv(m, TILE["BLOCK_M"]) * blocks_of(k),)](
                gate_up,
                gate_up.stride(0),
                q.view(torch.uint8),
                scale,
                scale.stride(1) // 4,
                m,
                k,
                fp8.float_bits(eps),
                POW2=pow2,
                NATIVE=fp8.native_cast(q.device),
                # a fused multiply-add would round once where the rule rounds twice
                enable_fp_fusion=False,
                **TILE,
            )
    return q, scale


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for dtype in ("bf16", "fp32"):
        yield AotCase(dtype, call("silu_mul_quantize", tensor(dtype, 4096, 2 * 2048)), expect=("LDG.128",))
