"""FP8 linear layers whose input is quantised where it is made: behind an RMSNorm, behind a gated activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import once_differentiable, op
from ..norm.gated_activation import gated_activation_bwd, gated_activation_fwd
from ..norm.rms_norm import as_weight, check_like, check_norm_eps, check_rows, rms_norm_bwd, rms_norm_fwd
from .linear import bias_gradient, check_weight, linear_gradients, quantized_product
from .quantize import as_rows, check_scale_options, fp8_quantize_dual_fwd
from .rms_norm_quantize import rms_norm_quantize_fwd
from .silu_mul_quantize import silu_mul_quantize_fwd

__all__ = ["rms_norm_fp8_linear", "silu_mul_fp8_linear"]

_MODULE = "fp8/fused_linear"
# activation, alpha, limit and layout of gated_activation
_SILU = ("silu", 1.0, 0.0, False)
_LINEAR = ("fp8_quantize_rows", "fp8_quantize_tiles", "fp8_quantize_dual_fwd", "fp8_matmul_fwd")


class _SiluMulLinear(torch.autograd.Function):
    """Saves gate and up alone: the backward makes the activation anew."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, bias: Tensor | None, pow2: bool, eps: float) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(gate_up if needs[0] or needs[1] else None, weight if needs[0] else None)
        ctx.quantization = (pow2, eps)
        ctx.dtypes = (gate_up.dtype, weight.dtype, None if bias is None else bias.dtype)
        q, scale = silu_mul_quantize_fwd(gate_up, pow2, eps)
        return quantized_product(q, scale, weight, bias, pow2, eps, gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, weight = ctx.saved_tensors
        *dtypes, bias_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        along_tokens = dgate_up = None
        if needs[1]:
            activated = gated_activation_fwd(gate_up, None, *_SILU)
            along_tokens = fp8_quantize_dual_fwd(activated, *ctx.quantization)[2:]
        dactivated, dweight = linear_gradients(dout, weight, along_tokens, tuple(dtypes), *ctx.quantization)
        if dactivated is not None:
            dgate_up, _ = gated_activation_bwd(dactivated, gate_up, None, *_SILU)
        dbias = bias_gradient(dout, bias_dtype) if bias_dtype is not None and needs[2] else None
        return dgate_up, dweight, dbias, None, None


class _RMSNormLinear(torch.autograd.Function):
    """Saves the sum of the residual stream alone: the backward norms it anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        norm_eps: float,
        pow2: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        q, scale, h = rms_norm_quantize_fwd(x, norm_weight, residual, norm_eps, pow2, eps)
        ctx.save_for_backward(h, norm_weight, weight)
        ctx.norm_eps, ctx.quantization = norm_eps, (pow2, eps)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return quantized_product(q, scale, weight, bias, pow2, eps, x.dtype), h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        h, norm_weight, weight = ctx.saved_tensors
        *dtypes, bias_dtype = ctx.dtypes
        need_x, need_norm, need_weight, need_bias, need_residual = ctx.needs_input_grad[:5]
        none = (None, None, None)
        if dout is None:
            # the sum alone was used
            return dh if need_x else None, None, None, None, dh if need_residual else None, *none
        need_input = need_x or need_norm or need_residual
        dx = dnorm = along_tokens = None
        if need_input or need_weight:
            normed, rstd = rms_norm_fwd(h, norm_weight, ctx.norm_eps, 0.0, False)
        if need_weight:
            along_tokens = fp8_quantize_dual_fwd(normed, *ctx.quantization)[2:]
        wanted = weight if need_input else None
        dnormed, dweight = linear_gradients(dout, wanted, along_tokens, tuple(dtypes), *ctx.quantization)
        if dnormed is not None:
            dh = None if dh is None else errors.check_last_dim_contiguous(dh)
            dx, dnorm = rms_norm_bwd(dnormed, dh, h, norm_weight, rstd, 0.0, need_norm)
        dbias = bias_gradient(dout, bias_dtype) if bias_dtype is not None and need_bias else None
        return (
            dx if need_x else None,
            dnorm if need_norm else None,
            dweight,
            dbias,
            dx if need_residual else None,
            *none,
        )


@op(
    module=_MODULE,
    kernels=("silu_mul_quantize_fwd", "gated_activation_fwd", "gated_activation_bwd", *_LINEAR),
    differentiable=("gate_up", "weight", "bias"),
    not_repeated="calls several kernels",
)
def silu_mul_fp8_linear(
    gate_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_format: str = "fp32",
    eps: float = 1e-12,
) -> Tensor:
    """``(silu(gate) * up) @ weight.T + bias`` in FP8, for training.

    ``silu_mul_quantize`` and the three products of ``fp8_linear``. A gradient of e4m3 codes would itself be e4m3, so
    ``silu_mul_quantize`` has none; here it goes past the codes: quantisation is taken as the identity (straight
    through).

    Args:
        gate_up: ``[..., 2I]``, gate first, as in ``silu_mul_quantize``.
        weight: ``[N, I]`` of any float dtype, the master weight (a ``down_proj.weight``).
        bias: ``[N]`` of any float dtype, or None.
        scale_format, eps: of all quantisations, as in ``fp8_linear``.

    Returns:
        ``[..., N]`` of gate_up's dtype, contiguous: ``fp8_matmul`` of ``silu_mul_quantize(gate_up)`` and of the weight,
        quantised 128 x 128, to the bit.

    Gradients: for gate_up (of ``gated_activation``, at the input gradient of ``fp8_linear``), weight and bias, in their
    dtypes; once. Saved are gate_up and the weight: the backward makes the activation anew, rounded to gate_up's dtype,
    and quantises it along the tokens. Deterministic; the output and gate_up's gradient are batch-invariant as
    ``fp8_matmul`` is.

    Raises:
        ValueError: an odd last dim, shapes that do not fit together, or a wrong scale_format or eps.
        TypeError: wrong dtypes.

    Example::

        y = tilefuse.silu_mul_fp8_linear(torch.randn(4, 512), torch.randn(64, 256))

    Source: the fused modules of Transformer Engine; DeepSeek-V3 (arXiv 2412.19437, section 3), which makes the
    activation anew too.
    """
    name = "silu_mul_fp8_linear"
    check_scale_options(name, scale_format, eps)
    check_rows(name, "gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        errors.value_error(name, "gate_up", "[..., 2I], an even last dim", gate_up)
    check_weight(name, gate_up, "gate_up", gate_up.shape[-1] // 2, weight, bias)
    rows, pow2 = as_rows(gate_up), scale_format == "pow2"
    if errors.needs_grad(gate_up, weight, bias):
        out = _SiluMulLinear.apply(rows, weight, bias, pow2, eps)
    else:
        q, scale = silu_mul_quantize_fwd(rows, pow2, eps)
        out = quantized_product(q, scale, weight, bias, pow2, eps, gate_up.dtype)
    return out.view(*gate_up.shape[:-1], weight.shape[0])


@op(
    module=_MODULE,
    kernels=("rms_norm_quantize_fwd", "rms_norm_fwd", "rms_norm_bwd", *_LINEAR),
    differentiable=("x", "norm_weight", "weight", "bias", "residual"),
    not_repeated="calls several kernels",
)
def rms_norm_fp8_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    scale_format: str = "fp32",
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """``rms_norm(x + residual) @ weight.T + bias`` in FP8, for training.

    ``rms_norm_quantize`` and the three products of ``fp8_linear``. A gradient of e4m3 codes would itself be e4m3, so
    ``rms_norm_quantize`` has none; here it goes past the codes: quantisation is taken as the identity (straight
    through).

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16 (float64 on the reference backend), K >= 1; any strides.
        norm_weight: ``[K]`` of any float dtype.
        weight: ``[N, K]`` of any float dtype, the master weight: of a ``gate_up_proj`` or ``qkv_proj``, say.
        bias: ``[N]`` of any float dtype, or None.
        residual: x's shape and dtype, or None.
        norm_eps: added to the mean square; positive, rounded to float32.
        scale_format, eps: of all quantisations, as in ``fp8_linear``.

    Returns:
        ``(y, h)``: y ``[..., N]`` of x's dtype, ``fp8_matmul`` of ``rms_norm_quantize``'s codes and of the weight,
        quantised 128 x 128, to the bit; h ``x + residual`` rounded to x's dtype, the residual stream (without residual
        a copy of x). Both contiguous.

    Gradients: for x and residual (the same values, through y and h), norm_weight, weight and bias, in their dtypes;
    once. They are those of ``rms_norm`` of h, at the input gradient of ``fp8_linear``. Saved are h and the weights: the
    backward norms h anew, and quantises that along the tokens. Deterministic; outputs and x's gradient are
    batch-invariant as ``fp8_matmul`` is.

    Raises:
        ValueError: shapes that do not fit together, a norm_eps that is not positive, or a wrong scale_format or eps.
        TypeError: wrong dtypes.

    Example::

        y, h = tilefuse.rms_norm_fp8_linear(torch.randn(4, 256), torch.ones(256), torch.randn(64, 256))

    Source: ``LayerNormLinear`` of Transformer Engine; DeepSeek-V3 (arXiv 2412.19437, section 3), which norms anew too.
    """
    name = "rms_norm_fp8_linear"
    check_scale_options(name, scale_format, eps)
    check_rows(name, "x", x)
    if norm_weight.shape != x.shape[-1:]:
        errors.value_error(name, "norm_weight", f"[{x.shape[-1]}]", norm_weight)
    errors.check_dtype(name, "norm_weight", norm_weight, errors.FLOATS)
    errors.check_device(name, "norm_weight", norm_weight, x, "x")
    check_weight(name, x, "x", x.shape[-1], weight, bias)
    if residual is not None:
        check_like(name, "residual", residual, x, "x")
    check_norm_eps(name, "norm_eps", norm_eps)
    rows = None if residual is None else as_rows(residual)
    scales = as_weight(norm_weight, x)
    pow2 = scale_format == "pow2"
    if errors.needs_grad(x, norm_weight, weight, bias, residual):
        y, h = _RMSNormLinear.apply(as_rows(x), scales, weight, bias, rows, norm_eps, pow2, eps)
    else:
        q, scale, h = rms_norm_quantize_fwd(as_rows(x), scales, rows, norm_eps, pow2, eps)
        y = quantized_product(q, scale, weight, bias, pow2, eps, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0]), h.view(x.shape)
