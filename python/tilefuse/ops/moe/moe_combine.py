"""Sums each token's expert rows, weighted, in slot order."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op

__all__ = ["moe_combine"]

_MODULE = "moe/moe_combine"


def check_weights(name: str, weights: Tensor, like: Tensor, like_arg: str) -> None:
    """Weights are float32, whatever the rows are; the rows' own dtype is taken too, as models cast them."""
    if weights.dtype not in (torch.float32, like.dtype):
        errors.type_error(name, "weights", f"float32 or of {like_arg}'s dtype", weights)
    errors.check_device(name, "weights", weights, like, like_arg)


def _check(y: Tensor, inverse: Tensor, weights: Tensor) -> None:
    name = "moe_combine"
    if y.dim() != 2:
        errors.value_error(name, "y", "[rows, H]", y)
    errors.check_dtype(name, "y", y, errors.FLOATS)
    if weights.dim() != 2 or weights.shape[1] == 0:
        errors.value_error(name, "weights", "[T, k] float32 with k >= 1", weights)
    check_weights(name, weights, y, "y")
    slots = weights.shape[0] * weights.shape[1]
    if inverse.shape != (slots,):
        errors.value_error(name, "inverse", f"[{slots}] int32 or int64", inverse)
    errors.check_dtype(name, "inverse", inverse, errors.INDEX_DTYPES)
    errors.check_device(name, "inverse", inverse, y, "y")


moe_combine_fwd = kernel(
    "moe_combine_fwd(Tensor y, Tensor inverse, Tensor? weights, int top_k) -> Tensor",
    module=_MODULE,
    fake=lambda y, inverse, weights, top_k: y.new_empty((inverse.shape[0] // top_k, y.shape[1])),
    linear=("y", "weights"),
)
moe_combine_bwd = kernel(
    "moe_combine_bwd(Tensor dout, Tensor y, Tensor inverse, Tensor weights, int top_k) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=lambda dout, y, inverse, weights, top_k: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
)


@gradient_of(moe_combine_fwd)
class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, inverse, weights, top_k):
        ctx.save_for_backward(y, inverse, weights)
        return moe_combine_fwd(y, inverse, weights, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, inverse, weights = ctx.saved_tensors
        dy, dweights = moe_combine_bwd(dout.contiguous(), y, inverse, weights, weights.shape[1])
        return dy, None, dweights, None


@op(
    module=_MODULE,
    kernels=("moe_combine_fwd", "moe_combine_bwd"),
    differentiable=("y", "weights"),
)
def moe_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """Brings expert rows back to their tokens.

    Formula: ``out[t] = sum_j weights[t, j] * y[inverse[t * k + j]]``, summed in float32 in the order of j, rounded
    once. A dropped slot (``inverse < 0``, or past y's rows) is left out, even where y holds NaN.

    Args:
        y: ``[rows, H]`` float32, bfloat16 or float16 (float64 on the reference backend), any row stride.
        inverse: ``[T * k]`` int32 or int64, from ``moe_plan``: the row of each slot. Rows are distinct.
        weights: ``[T, k]`` float32, or y's dtype.

    Returns:
        ``[T, H]`` in y's dtype.

    Gradients: for ``y`` (rows that no slot names get exactly 0) and ``weights``. Deterministic, batch-invariant: a
    token owns its sum, nothing is added atomically.

    Raises:
        ValueError: a wrong shape. TypeError: a wrong dtype.

    Example::

        out = tilefuse.moe_combine(y, inverse, weights)

    Source: the combine step of GShard (2006.16668), per slot instead of per capacity place.
    """
    _check(y, inverse, weights)
    y, weights = errors.check_last_dim_contiguous(y), weights.contiguous()
    args = (y, inverse.contiguous(), weights, weights.shape[1])
    return _Combine.apply(*args) if errors.needs_grad(y, weights) else moe_combine_fwd(*args)
