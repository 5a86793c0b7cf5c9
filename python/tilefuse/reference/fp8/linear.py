"""FP8 linear layer in plain PyTorch: forward and the two backward products, each from unquantised operands."""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import fp8_matmul_fwd
from .quantize import fp8_quantize_rows, fp8_quantize_tiles


def fp8_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, pow2: bool, out_dtype: torch.dtype) -> Tensor:
    w, w_scale = fp8_quantize_tiles(weight.unsqueeze(0), pow2, 1e-12)
    return fp8_matmul_fwd(*fp8_quantize_rows(x, pow2, 1e-12), w[0], w_scale[0], bias, out_dtype)


def fp8_linear_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, pow2: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    w, w_scale = fp8_quantize_tiles(weight.t().contiguous().unsqueeze(0), pow2, 1e-12)
    dx = fp8_matmul_fwd(*fp8_quantize_rows(dout, pow2, 1e-12), w[0], w_scale[0], None, out_dtype)
    dout_t = fp8_quantize_rows(dout.t(), pow2, 1e-12)
    dweight = fp8_matmul_fwd(*dout_t, *fp8_quantize_rows(x.t(), pow2, 1e-12), None, out_dtype)
    return dx, dweight, dout.to(out_dtype).sum(0)
