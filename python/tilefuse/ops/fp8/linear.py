"""``fp8_linear``: a linear layer whose forward and both backward products run in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import once_differentiable, op
from ...packing import PackedWeight, Weight
from .matmul import matmul, weight_scale
from .quantize import (
    CODES,
    as_rows,
    check_scale_options,
    fp8_quantize_dual_fwd,
    fp8_quantize_rows,
    fp8_quantize_tiles,
)

__all__ = ["fp8_linear"]

_MODULE = "fp8/linear"


def _quantize_weight(weight: Tensor, pow2: bool, eps: float) -> tuple[Tensor, Tensor]:
    q, scale = fp8_quantize_tiles(errors.check_last_dim_contiguous(weight).unsqueeze(0), pow2, eps)
    return q[0], scale[0]


def quantized_product(
    codes: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, pow2: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    """Activations that are quantised already times a weight that is not."""
    w, w_scale = _quantize_weight(weight, pow2, eps)
    return matmul(codes, scale, w, w_scale, bias, dtype)


def linear_gradients(
    dout: Tensor,
    weight: Tensor | None,
    along_tokens: tuple[Tensor, Tensor] | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    pow2: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's input, if its weight is given, and of the weight, if the input is, quantised along
    the tokens; in these dtypes."""
    dx = dweight = None
    rows = as_rows(dout)
    if along_tokens is not None:
        g, g_scale, g_t, g_scale_t = fp8_quantize_dual_fwd(rows, pow2, eps)
        # both operands run along the tokens with 1 x 128 scales
        dweight = matmul(g_t, g_scale_t, *along_tokens, None, dtypes[1])
    elif weight is not None:
        g, g_scale = fp8_quantize_rows(rows, pow2, eps)
    if weight is not None:
        # square blocks transpose without another rounding
        w, w_scale = _quantize_weight(weight, pow2, eps)
        dx = matmul(g, g_scale, w.t(), w_scale.t(), None, dtypes[0])
    return dx, dweight


def bias_gradient(dout: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return dout.sum(0, dtype=wide).to(dtype)


class _Linear(torch.autograd.Function):
    """Saves the activation as e4m3 along the tokens, the form in which the weight gradient needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pow2: bool, eps: float) -> Tensor:
        q_t = scale_t = None
        if ctx.needs_input_grad[1]:
            q, scale, q_t, scale_t = fp8_quantize_dual_fwd(x, pow2, eps)
        else:
            q, scale = fp8_quantize_rows(x, pow2, eps)
        ctx.save_for_backward(q_t, scale_t, weight if ctx.needs_input_grad[0] else None)
        ctx.quantization = (pow2, eps)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return quantized_product(q, scale, weight, bias, pow2, eps, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q_t, scale_t, weight = ctx.saved_tensors
        *dtypes, bias_dtype = ctx.dtypes
        along_tokens = (q_t, scale_t) if ctx.needs_input_grad[1] else None
        dx, dweight = linear_gradients(dout, weight, along_tokens, tuple(dtypes), *ctx.quantization)
        dbias = bias_gradient(dout, bias_dtype) if bias_dtype is not None and ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


def check_weight(name: str, x: Tensor, arg: str, k: int, weight: Tensor, bias: Tensor | None) -> None:
    """The float weight and the bias of a linear layer with k inputs, which are made from x, the argument ``arg``."""
    if weight.ndim != 2 or weight.shape[1] != k:
        errors.value_error(name, "weight", f"[N, {k}]", weight)
    errors.check_dtype(name, "weight", weight, errors.FLOATS)
    errors.check_device(name, "weight", weight, x, arg)
    check_bias(name, x, arg, weight, bias)


def check_bias(name: str, x: Tensor, arg: str, weight: Weight, bias: Tensor | None) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (weight.shape[0],):
        errors.value_error(name, "bias", f"[{weight.shape[0]}]", bias)
    errors.check_dtype(name, "bias", bias, errors.FLOATS)
    errors.check_device(name, "bias", bias, x, arg)


@op(
    module=_MODULE,
    kernels=("fp8_quantize_rows", "fp8_quantize_tiles", "fp8_quantize_dual_fwd", "fp8_matmul_fwd"),
    differentiable=("x", "weight", "bias"),
    not_repeated="calls several kernels",
)
def fp8_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    scale_format: str = "fp32",
    eps: float = 1e-12,
    quantize_activations: bool = True,
) -> Tensor:
    """``x @ weight.T + bias`` with all three matrix products of training in FP8.

    Forward: x is quantised 1 x 128, the weight 128 x 128. Gradient of x: the output gradient 1 x 128 against the
    transposed weight blocks. Gradient of the weight: output gradient and x, both quantised 1 x 128 *along the
    tokens*. Products accumulate in float32 as in ``fp8_matmul``; every result is rounded once.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16 (float64 on the reference backend). Any strides.
        weight: ``[N, K]`` of any float dtype, the master weight. For inference on a CPU what ``pack_weight`` made of
            its codes and scales: it is not quantised at each call, and read faster.
        bias: ``[N]`` of any float dtype, or None.
        scale_format: ``"fp32"`` or ``"pow2"``, for all four quantisations.
        eps: of all four, as in ``fp8_quantize``: values far below it become 0. Output gradients do so below about
            1e-18 with the default; smaller ones (a loss without scaling) want a smaller eps, such as 1e-30.
        quantize_activations: False leaves x in its dtype, as ``fp8_matmul`` does without ``a_scale``: less error, and
            on a CPU with bfloat16 less time. For inference.

    Returns:
        ``[..., N]`` of x's dtype, contiguous.

    Gradients: for x (in its dtype), weight (accumulated in float32, returned in the weight's dtype) and bias. What is
    saved for them is x as one byte per element plus scales, and the weight itself: not x in its own dtype. Not
    twice differentiable. Deterministic; the output and x's gradient are batch-invariant as ``fp8_matmul`` is.

    Raises:
        ValueError: shapes that do not fit together, or a wrong scale_format or eps.
        TypeError: wrong dtypes.
        RuntimeError: a gradient is wanted, and the weight is packed or x not quantised.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3).
    """
    name = "fp8_linear"
    check_scale_options(name, scale_format, eps)
    if x.ndim < 1:
        errors.value_error(name, "x", "[..., K]", x)
    errors.check_dtype(name, "x", x, errors.FLOATS)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        errors.value_error(name, "weight", f"[N, {x.shape[-1]}]", weight)
    packed = isinstance(weight, PackedWeight)
    errors.check_dtype(name, "weight", weight, (CODES,) if packed else errors.FLOATS)
    errors.check_device(name, "weight", weight, x, "x")
    check_bias(name, x, "x", weight, bias)
    rows, pow2 = as_rows(x), scale_format == "pow2"
    if packed or not quantize_activations:
        why = "a packed weight and unquantised activations are for inference"
        errors.check_not_differentiated(name, why, x=x, weight=None if packed else weight, bias=bias)
    if errors.needs_grad(x, None if packed else weight, bias):
        out = _Linear.apply(rows, weight, bias, pow2, eps)
    else:
        w, w_scale = (weight, weight_scale(name, weight, None)) if packed else _quantize_weight(weight, pow2, eps)
        codes, scale = fp8_quantize_rows(rows, pow2, eps) if quantize_activations else (rows, None)
        out = matmul(codes, scale, w, w_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])
