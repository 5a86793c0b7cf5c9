"""``rms_norm_quantize``: residual add, RMSNorm and quantisation in one pass."""

from __future__ import annotations

from torch import Tensor

from ... import errors
from ...library import kernel, op
from .quantize import (
    CODES,
    FLOAT32_MAX,
    as_rows,
    blocks_of,
    check_input,
    check_scale_options,
    empty_row_scale,
    split_rows,
)

__all__ = ["rms_norm_quantize"]

_MODULE = "fp8/rms_norm_quantize"
# a Triton program holds a row in registers
_MAX_TRITON_ROW = 65536


def _fake(
    x: Tensor, _weight: Tensor, _residual: Tensor | None, _norm_eps: float, _pow2: bool, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    return x.new_empty((m, k), dtype=CODES), empty_row_scale(x, m, blocks_of(k)), x.new_empty((m, k))


def _long_row(x: Tensor, *_rest: object) -> str | None:
    return f"takes rows of at most {_MAX_TRITON_ROW}" if x.shape[1] > _MAX_TRITON_ROW else None


rms_norm_quantize_fwd = kernel(
    "rms_norm_quantize_fwd(Tensor x, Tensor weight, Tensor? residual, float norm_eps, bool pow2, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
    when={"triton": _long_row},
)


@op(
    module=_MODULE,
    kernels=("rms_norm_quantize_fwd",),
    not_repeated="views of its arguments and results",
)
def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    scale_format: str = "fp32",
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual add, RMSNorm and quantisation in one pass.

    With ``s = x + residual`` in float32 (``s = x`` without residual), ``h`` is s rounded to x's dtype and
    ``(q, scale)`` quantises ``s / sqrt(mean(s^2) + norm_eps) * weight``, taken of the unrounded s, by the rule of
    ``fp8_quantize``.
    The sum of squares is added up by halving, so all backends give the same bits.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16 (float64 on the reference backend). Any strides; a copy is made
            if the last dim is not contiguous.
        weight: ``[K]`` of any float dtype.
        residual: x's shape and dtype, or None.
        norm_eps: added to the mean square; finite and >= 0, rounded to float32.
        scale_format, eps: as in ``fp8_quantize``.

    Returns:
        ``(q, scale, h)``: q float8_e4m3fn of x's shape, scale float32 ``[..., ceil(K / 128)]`` in the layout of
        ``fp8_quantize``'s (1, 128) scales, h of x's shape and dtype, contiguous (without residual a copy of x).

    Not differentiable: a gradient of codes would be e4m3 too. ``rms_norm_fp8_linear`` is, straight through the codes.
    Deterministic and batch-invariant. NaN anywhere in a row makes the row's codes NaN.

    Raises:
        ValueError: wrong shapes, scale_format, eps or norm_eps.
        TypeError: wrong dtypes.
        RuntimeError: an argument requires grad and grad mode is on.

    Source: RMSNorm: Zhang and Sennrich (arXiv 1910.07467); fused with quantisation as in vLLM.
    """
    name = "rms_norm_quantize"
    check_scale_options(name, scale_format, eps)
    check_input(name, "x", x)
    if not 0.0 <= norm_eps <= FLOAT32_MAX:
        errors.value_error(name, "norm_eps", "finite and >= 0", norm_eps)
    if weight.shape != x.shape[-1:]:
        errors.value_error(name, "weight", f"[{x.shape[-1]}]", weight)
    errors.check_dtype(name, "weight", weight, errors.FLOATS)
    errors.check_device(name, "weight", weight, x, "x")
    if residual is not None:
        if residual.shape != x.shape:
            errors.value_error(name, "residual", f"of x's shape {[*x.shape]}", residual)
        if residual.dtype != x.dtype:
            errors.type_error(name, "residual", f"of x's dtype {errors.dtype_name(x.dtype)}", residual)
        errors.check_device(name, "residual", residual, x, "x")
    errors.check_not_differentiated(
        name, "quantisation has no gradient (rms_norm_fp8_linear has one)", weight=weight, residual=residual
    )
    rows = None if residual is None else as_rows(residual)
    if weight.dtype.itemsize == 8:
        # float64 weights belong to float64 activations; elsewhere the arithmetic is float32
        weight = weight if x.dtype.itemsize == 8 else weight.float()
    q, scale, h = rms_norm_quantize_fwd(as_rows(x), weight.contiguous(), rows, norm_eps, scale_format == "pow2", eps)
    return q.view(x.shape), split_rows(scale, x.shape[:-1]), h.view(x.shape)
