"""``rms_norm``, and ``add_rms_norm`` with the sum of a residual stream in front of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from ..fp8.quantize import as_rows

__all__ = ["add_rms_norm", "rms_norm"]

_MODULE = "norm/rms_norm"
ROUNDINGS = ("once", "llama")
# smallest eps that float32, which the kernels round it to, holds as a normal number
_MIN_EPS = 2.0**-126
_MAX_EPS = (2.0 - 2.0**-23) * 2.0**127


def check_rows(name: str, arg: str, x: Tensor) -> None:
    """``[..., D]`` of a float dtype."""
    errors.check_dtype(name, arg, x, errors.FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        errors.value_error(name, arg, "[..., D] with D >= 1", x)


def check_like(name: str, arg: str, tensor: Tensor, like: Tensor, like_arg: str) -> None:
    """The shape, dtype and device of another argument."""
    if tensor.shape != like.shape:
        errors.value_error(name, arg, f"of {like_arg}'s shape {[*like.shape]}", tensor)
    if tensor.dtype != like.dtype:
        errors.type_error(name, arg, f"of {like_arg}'s dtype {errors.dtype_name(like.dtype)}", tensor)
    errors.check_device(name, arg, tensor, like, like_arg)


def check_norm(name: str, x: Tensor, weight: Tensor | None, eps: float) -> None:
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            errors.value_error(name, "weight", f"[{x.shape[-1]}]", weight)
        errors.check_dtype(name, "weight", weight, errors.FLOATS)
        errors.check_device(name, "weight", weight, x, "x")
    check_norm_eps(name, "eps", eps)


def check_norm_eps(name: str, arg: str, eps: float) -> None:
    if not _MIN_EPS <= eps <= _MAX_EPS:
        errors.value_error(name, arg, "positive (a normal float32)", eps)


def as_weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Contiguous; a float64 one belongs to float64 rows, elsewhere the arithmetic is float32."""
    if weight is None:
        return None
    if weight.dtype == torch.float64 and x.dtype != torch.float64:
        weight = weight.float()
    return weight.contiguous()


def new_rstd(x: Tensor) -> Tensor:
    """``[T]`` in the dtype of the arithmetic, float32 but for the float64 of the reference."""
    return x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def no_gradient(weight: Tensor | None, x: Tensor) -> Tensor:
    """What a backward kernel returns in place of a weight gradient that nobody asked for."""
    return (x if weight is None else weight).new_empty(0)


def _fake_fwd(x: Tensor, _weight: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), new_rstd(x)


def _fake_add_fwd(x: Tensor, _residual: Tensor, _weight: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), new_rstd(x)


def _fake_bwd(
    _dout: Tensor,
    _dh: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    _rstd: Tensor,
    _weight_offset: float,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if with_dweight and weight is not None else no_gradient(weight, x)
    return x.new_empty(x.shape), dweight


_OPTIONS = "float eps, float weight_offset, bool llama"
rms_norm_fwd = kernel(
    f"rms_norm_fwd(Tensor x, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor)", module=_MODULE, fake=_fake_fwd
)
add_rms_norm_fwd = kernel(
    f"add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_add_fwd,
)
# dh, the gradient of the sum that was normed, is added to that of the norm
rms_norm_bwd = kernel(
    "rms_norm_bwd(Tensor dout, Tensor? dh, Tensor x, Tensor? weight, Tensor rstd, float weight_offset, "
    "bool with_dweight) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_bwd,
)


@gradient_of(rms_norm_fwd)
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, weight_offset, llama):
        y, rstd = rms_norm_fwd(x, weight, eps, weight_offset, llama)
        ctx.save_for_backward(x, weight, rstd)
        ctx.weight_offset = weight_offset
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        needed = ctx.needs_input_grad[1]
        dout = errors.check_last_dim_contiguous(dout)
        dx, dweight = rms_norm_bwd(dout, None, *ctx.saved_tensors, ctx.weight_offset, needed)
        return dx, dweight if needed else None, None, None, None


@gradient_of(add_rms_norm_fwd)
class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, weight_offset, llama):
        y, h, rstd = add_rms_norm_fwd(x, residual, weight, eps, weight_offset, llama)
        ctx.save_for_backward(h, weight, rstd)
        ctx.weight_offset = weight_offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return y, h, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dh, _):
        h, weight, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[2]
        if dout is None:
            # the sum alone was used
            return dh, dh, torch.zeros_like(weight) if needed else None, None, None, None
        dout = errors.check_last_dim_contiguous(dout)
        dh = None if dh is None else errors.check_last_dim_contiguous(dh)
        dx, dweight = rms_norm_bwd(dout, dh, h, weight, rstd, ctx.weight_offset, needed)
        return dx, dx, dweight if needed else None, None, None, None


def _options(name: str, eps: float, weight_offset: float, rounding: str) -> tuple[float, float, bool]:
    if rounding not in ROUNDINGS:
        errors.value_error(name, "rounding", "'once' or 'llama'", rounding)
    return eps, weight_offset, rounding == "llama"


@op(
    module=_MODULE,
    kernels=("rms_norm_fwd", "rms_norm_bwd"),
    differentiable=("x", "weight"),
    not_repeated="views of its arguments and results",
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str = "once",
) -> Tensor:
    """RMSNorm over the last dim: ``y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``.

    All in float32, ``weight + weight_offset`` too (added in bfloat16 the offset swallows small weights), with one
    rounding at the end.

    Args:
        x: ``[..., D]``, any rank and any D >= 1; float32, bfloat16 or float16 (float64 on the reference backend). Any
            strides; a copy is made if the last dim is not contiguous.
        weight: ``[D]`` of any float dtype, or None: no scaling, whatever ``weight_offset`` is.
        eps: added to the mean square; positive, rounded to float32.
        weight_offset: added to the weight; Gemma stores ``weight - 1`` and needs 1.0.
        rounding: ``"once"``, or ``"llama"``: the normed row is rounded to x's dtype before it meets the weight, and
            the product again, as Hugging Face's Llama does.

    Returns:
        ``[..., D]``, contiguous, in x's dtype, whatever that of the weight is.

    A row whose squares overflow float32 is scaled first: its result is right. A row of zeros gives zeros. NaN or
    infinity in a row makes NaN in that row only.

    Gradients: for x and weight, once. They are those of the formula: the inner rounding of ``"llama"`` passes them on.
    Saved are x and a float32 per row. The weight's gradient, in its dtype, is summed in float32 over spans of 32 rows,
    which are added in a fixed order: two runs are bit-equal, on any number of cores. Batch-invariant but for that sum.

    Raises:
        ValueError: no dim or an empty last one, a weight that is not ``[D]``, an eps that is not positive, another
            rounding.
        TypeError: wrong dtypes.

    Example::

        y = tilefuse.rms_norm(torch.randn(4, 4096, dtype=torch.bfloat16), torch.ones(4096))

    Source: Zhang and Sennrich (arXiv 1910.07467); the roundings of Hugging Face's Llama and Gemma.
    """
    name = "rms_norm"
    check_rows(name, "x", x)
    check_norm(name, x, weight, eps)
    args = as_rows(x), as_weight(weight, x), *_options(name, eps, weight_offset, rounding)
    y, _ = _RMSNorm.apply(*args) if errors.needs_grad(x, weight) else rms_norm_fwd(*args)
    return y.view(x.shape)


@op(
    module=_MODULE,
    kernels=("add_rms_norm_fwd", "rms_norm_bwd"),
    differentiable=("x", "residual", "weight"),
    not_repeated="views of its arguments and results",
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str = "once",
) -> tuple[Tensor, Tensor]:
    """The sum of a residual stream and its RMSNorm in one pass: ``h = x + residual``, ``y = rms_norm(h, weight)``.

    ``h`` is rounded once to x's dtype, and the norm is taken of the rounded h, as models do it: the gradient is that of
    what the forward computed. (``rms_norm_quantize`` norms the unrounded sum.)

    Args:
        x: ``[..., D]``, as in ``rms_norm``.
        residual: x's shape and dtype, any strides.
        weight, eps, weight_offset, rounding: as in ``rms_norm``.

    Returns:
        ``(y, h)``, both of x's shape and dtype, contiguous. Neither is an argument: nothing is written in place.

    Gradients: for x and residual (the same values) and weight, through y, h or both, once; otherwise as in
    ``rms_norm``. Saved are h and a float32 per row. Deterministic; batch-invariant but for the weight's gradient.

    Raises:
        ValueError, TypeError: as ``rms_norm``, and for a residual of another shape or dtype.

    Example::

        y, h = tilefuse.add_rms_norm(torch.randn(4, 64), torch.randn(4, 64), torch.ones(64))

    Source: the fused add and norm of vLLM, which works in place, and of Liger-Kernel.
    """
    name = "add_rms_norm"
    check_rows(name, "x", x)
    check_like(name, "residual", residual, x, "x")
    check_norm(name, x, weight, eps)
    args = as_rows(x), as_rows(residual), as_weight(weight, x), *_options(name, eps, weight_offset, rounding)
    y, h, _ = _AddRMSNorm.apply(*args) if errors.needs_grad(x, residual, weight) else add_rms_norm_fwd(*args)
    return y.view(x.shape), h.view(x.shape)
