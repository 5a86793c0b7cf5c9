"""``fake_quantize``: quantised and dequantised at once, with gradients for quantisation-aware training."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from ..fp8.quantize import as_rows
from .quantize import as_groups, check_format, check_values, groups_of

__all__ = ["fake_quantize"]

_MODULE = "lowbit/fake_quantize"
# the default of int_quantize
EPS = 1e-12


def _check(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, group_size: int, symmetric: bool, scale_gradient: bool
) -> None:
    name = "fake_quantize"
    check_values(name, "x", x)
    if scale is None:
        if zero is not None:
            errors.value_error(name, "zero", "None without a scale", zero)
        return
    errors.check_dtype(name, "scale", scale, errors.FLOATS)
    shape = (*x.shape[:-1], groups_of(x.shape[-1], group_size))
    if tuple(scale.shape) != shape:
        errors.value_error(name, "scale", f"{[*shape]}", scale)
    errors.check_device(name, "scale", scale, x, "x")
    if scale_gradient:
        errors.value_error(name, "scale_gradient", "False with a scale, which gets its own gradient", scale_gradient)
    if zero is not None:
        errors.check_dtype(name, "zero", zero, (torch.uint8,))
        errors.check_device(name, "zero", zero, x, "x")
    if symmetric != (zero is None):
        errors.value_error(name, "zero", "None where symmetric, else given with scale", zero)
    if zero is not None and zero.shape != scale.shape:
        errors.value_error(name, "zero", f"{[*shape]}", zero)


def mask_bytes(columns: int) -> int:
    """Bytes of a row of bits."""
    return (columns + 7) // 8


def _fake_fwd(
    x: Tensor,
    _scale: Tensor | None,
    _zero: Tensor | None,
    _bits: int,
    _group_size: int,
    _symmetric: bool,
    _scale_gradient: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], mask_bytes(x.shape[1])) if keep else (0, 0)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.uint8)


def _fake_bwd(dout: Tensor, _inside: Tensor) -> Tensor:
    return dout.new_empty(dout.shape)


def _fake_bwd_scale(_dout: Tensor, x: Tensor, scale: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _fake_bwd_amax(_dout: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _shared_mask_bytes(
    x: Tensor,
    _scale: Tensor | None,
    _zero: Tensor | None,
    _bits: int,
    group_size: int,
    _symmetric: bool,
    _scale_gradient: bool,
    keep: bool,
) -> str | None:
    if keep and group_size % 8 and groups_of(x.shape[1], group_size) > 1:
        return "groups that share a byte of the mask"
    return None


_RULE = "int bits, int group_size, bool symmetric"
# scale_gradient is the gradient's; `keep` asks for the mask, a bit for each element that was not clamped, [rows, bytes]
fake_quantize_fwd = kernel(
    f"fake_quantize_fwd(Tensor x, Tensor? scale, Tensor? zero, {_RULE}, bool scale_gradient, bool keep) "
    "-> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_fwd,
    when={"triton": _shared_mask_bytes},
)
fake_quantize_bwd = kernel("fake_quantize_bwd(Tensor dout, Tensor inside) -> Tensor", module=_MODULE, fake=_fake_bwd)
fake_quantize_bwd_scale = kernel(
    f"fake_quantize_bwd_scale(Tensor dout, Tensor x, Tensor scale, Tensor? zero, {_RULE}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_bwd_scale,
)
fake_quantize_bwd_amax = kernel(
    f"fake_quantize_bwd_amax(Tensor dout, Tensor x, {_RULE}) -> Tensor", module=_MODULE, fake=_fake_bwd_amax
)


@gradient_of(fake_quantize_fwd)
class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero, bits, group_size, symmetric, scale_gradient, _keep):
        ctx.rule = bits, group_size, symmetric
        ctx.of_scale, ctx.of_extremes = scale is not None and ctx.needs_input_grad[1], scale_gradient
        # symmetric scales of x's own clamp nothing
        keep = not (ctx.of_scale or scale_gradient or (scale is None and symmetric))
        out, inside = fake_quantize_fwd(x, scale, zero, *ctx.rule, scale_gradient, keep)
        if ctx.of_scale:
            ctx.save_for_backward(x, scale, zero)
        elif scale_gradient:
            ctx.save_for_backward(x)
        elif keep:
            ctx.save_for_backward(inside)
        ctx.mark_non_differentiable(inside)
        return out, inside

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dscale = None
        if ctx.of_scale:
            dx, dscale = fake_quantize_bwd_scale(errors.check_last_dim_contiguous(dout), *ctx.saved_tensors, *ctx.rule)
        elif ctx.of_extremes:
            dx = fake_quantize_bwd_amax(errors.check_last_dim_contiguous(dout), *ctx.saved_tensors, *ctx.rule)
        elif ctx.saved_tensors:
            dx = fake_quantize_bwd(errors.check_last_dim_contiguous(dout), *ctx.saved_tensors)
        else:
            dx = dout
        return dx if ctx.needs_input_grad[0] else None, dscale, *(None,) * 6


@op(
    module=_MODULE,
    kernels=("fake_quantize_fwd", "fake_quantize_bwd", "fake_quantize_bwd_scale", "fake_quantize_bwd_amax"),
    differentiable=("x", "scale"),
    not_repeated="views of its arguments and results",
)
def fake_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    scale_gradient: bool = False,
) -> Tensor:
    """``int_dequantize(*int_quantize(x))`` in x's dtype, bit for bit, with a gradient: quantisation-aware training.

    With ``y = x / scale`` correctly rounded in float32 (0 where it is NaN), ``qmax = 2^(bits-1) - 1`` and
    ``top = 2^bits - 1``, ``out = level * scale`` where

    * symmetric: ``level = round(clamp(y, -qmax, qmax))``, clamped where ``|y| > qmax``;
    * asymmetric: ``level = clamp(round(y) + zero, 0, top) - zero``, clamped where ``round(y) + zero`` is outside.

    Without a given scale it is that of ``int_quantize``, with its default eps.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16 (float64 on the reference backend, whose codes are those of x and
            scale rounded to float32). Any strides; a copy is made if the last dim is not contiguous.
        scale: ``[..., G]`` float tensor of any strides with ``G = ceil(K / group_size)``, taken as float32; None: each
            group's own.
        zero: ``[..., G]`` uint8 beside a given scale of asymmetric codes, else None.
        bits: 8, 6 or 4.
        group_size: elements of a group along the last dim; 0: all of them.
        symmetric: as in ``int_quantize``.
        scale_gradient: whether the gradient also runs through the extremes that the group's own scale is made of.

    Returns:
        A contiguous tensor of x's shape and dtype. NaN becomes 0 in its own element, infinities the end of the codes,
        -0 is +0.

    Gradients, once, for x and scale. Straight through for x: the upstream gradient g, 0 where x was clamped. A group's
    own symmetric scale clamps nothing (infinities included), so then nothing is saved; otherwise one bit per element.
    A given scale gets LSQ's gradient, the sum over its group of ``g (level - y)``, or of ``g level`` where clamped, in
    float32; for it x and scale themselves are saved. ``scale_gradient=True`` adds that sum, through
    ``scale = amax / qmax`` (asymmetric: ``(high - low) / top``), to the elements that are the extremes: ties share
    evenly, as in ``torch.amax``, and nothing flows where eps, the end of float32 or a 0 that is not in the group takes
    an extreme's place; x is saved. Deterministic and batch-invariant: sums run in a fixed order.

    Raises:
        ValueError: bits, group_size, shapes, a zero without a scale or with symmetric codes, asymmetric codes with a
            scale and no zero, ``scale_gradient`` with a given scale.
        TypeError: wrong dtypes.

    Example::

        weight = torch.randn(64, 256, requires_grad=True)
        tilefuse.fake_quantize(weight, bits=4, group_size=32).square().sum().backward()

    Source: Jacob et al. (arXiv 1712.05877), section 3; Esser et al., LSQ (arXiv 1902.08153), section 2.1.
    """
    check_format("fake_quantize", bits, group_size)
    _check(x, scale, zero, group_size, symmetric, scale_gradient)
    if scale is not None:
        scale = as_groups(scale.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
    zero = None if zero is None else as_groups(zero)
    args = (as_rows(x), scale, zero, bits, group_size, symmetric, scale_gradient, False)
    out, _ = _FakeQuantize.apply(*args) if errors.needs_grad(x, scale) else fake_quantize_fwd(*args)
    return out.view(x.shape)
