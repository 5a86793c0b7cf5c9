"""Residual add, RMSNorm and quantisation; one program holds one row in registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common import fp8
from ..common.launch import constants, on_device
from .host import CODES, blocks_of, empty_row_scale


@triton.jit
def _tree_sum(x, LOG2: tl.constexpr):
    """Sum of a vector of 2^LOG2 elements by halving: an order that every backend can follow."""
    for _ in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@triton.jit(do_not_specialize=["pitch4", "norm_eps", "eps_bits"])
def rms_norm_quantize_fwd_kernel(
    x_ptr,
    x_sm,
    weight_ptr,
    residual_ptr,
    residual_sm,
    q_ptr,
    scale_ptr,
    pitch4,
    h_ptr,
    k,
    norm_eps,
    eps_bits,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG2: tl.constexpr,
):
    """One row of x [M, K]; q, h [M, K] contiguous, scale [KB, 4 * pitch4]."""
    BLOCK_K: tl.constexpr = 1 << LOG2
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_K)
    mask = col < k
    # [BLOCK_K]
    x = tl.load(x_ptr + row * x_sm + col, mask, 0.0)
    total = x.to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * residual_sm + col, mask, 0.0).to(tl.float32)
        tl.store(h_ptr + row * k + col, total.to(h_ptr.dtype.element_ty), mask)
    else:
        tl.store(h_ptr + row * k + col, x, mask)
    mean = tl.div_rn(_tree_sum(total * total, LOG2), k.to(tl.float32))
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + norm_eps))
    normed = total * factor * tl.load(weight_ptr + col, mask, 0.0).to(tl.float32)
    # columns past k are zeros of a whole row that may hold an infinite factor
    blocks = tl.reshape(tl.where(mask, normed, 0.0), (BLOCK_K // 128, 128))
    scale = fp8.block_scale(tl.max(fp8.finite_magnitude(blocks), 1), eps_bits, POW2)
    block = tl.arange(0, BLOCK_K // 128)
    tl.store(scale_ptr + block.to(tl.int64) * pitch4 * 4 + row, scale, block < tl.cdiv(k, 128))
    codes = tl.reshape(fp8.quantize(blocks, scale[:, None], POW2, NATIVE), (BLOCK_K,))
    tl.store(q_ptr + row * k + col, codes, mask)


@dataclass(frozen=True)
class Config:
    """Base-2 logarithm of the columns of a program, which holds one row."""

    log2: int
    num_warps: int


def config(k: int) -> Config:
    """About 16 elements per thread, at most 32 warps."""
    size = max(128, triton.next_power_of_2(k))
    return Config(size.bit_length() - 1, min(max(size // 512, 1), 32))


def rms_norm_quantize_fwd(x, weight, residual, norm_eps, pow2, eps):
    m, k = x.shape
    q = torch.empty((m, k), dtype=CODES, device=x.device)
    scale = empty_row_scale(x, m, blocks_of(k))
    h = torch.empty((m, k), dtype=x.dtype, device=x.device)
    if q.numel():
        with on_device(x):
            rms_norm_quantize_fwd_kernel[(m,)](
                x,
                x.stride(0),
                weight,
                residual,
                0 if residual is None else residual.stride(0),
                q.view(torch.uint8),
                scale,
                scale.stride(1) // 4,
                h,
                k,
                norm_eps,
                fp8.float_bits(eps),
                POW2=pow2,
                NATIVE=fp8.native_cast(x.device),
                # a fused multiply-add would round once where the rule rounds twice
                enable_fp_fusion=False,
                **constants(config(k)),
            )
    return q, scale, h


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    for k in (2048, 7168):
        x, weight = tensor("bf16", 4096, k), tensor("bf16", k)
        for name, rest in (("plain", ()), ("residual", (x,))):
            yield AotCase(f"k{k}_{name}", call("rms_norm_quantize", x, weight, *rest), expect=("LDG.128",))
