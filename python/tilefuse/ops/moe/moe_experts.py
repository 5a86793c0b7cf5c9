"""The expert layer after routing: up-projection with activation, down-projection, combine."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from ...packing import Weight, check_inference
from .grouped_matmul import (
    either_contiguous,
    grouped_bias_grad,
    grouped_matmul_fwd,
    grouped_matmul_wgrad,
    not_triton,
    only_bfloat16,
    scatter_rows,
)
from .moe_combine import check_weights, moe_combine_fwd
from .moe_plan import moe_plan_fwd

__all__ = ["moe_experts"]

_MODULE = "moe/moe_experts"
ACTIVATIONS = ("silu", "gelu", "swiglu_oai", "gelu_erf")


def check_experts(
    name: str,
    x: Tensor,
    w_gate_up: Weight,
    w_down: Weight,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    limit: float,
) -> None:
    """Shapes and options that moe_experts and moe_experts_fp8 share."""
    if x.dim() != 2:
        errors.value_error(name, "x", "[T, H]", x)
    errors.check_dtype(name, "x", x, errors.FLOATS)
    tokens, hidden = x.shape
    if w_gate_up.dim() != 3 or w_gate_up.shape[0] == 0 or w_gate_up.shape[1] % 2 or w_gate_up.shape[2] != hidden:
        errors.value_error(name, "w_gate_up", f"[E, 2 I, {hidden}]", w_gate_up)
    experts, inner = w_gate_up.shape[0], w_gate_up.shape[1] // 2
    if w_down.shape != (experts, hidden, inner):
        errors.value_error(name, "w_down", f"[{experts}, {hidden}, {inner}]", w_down)
    if ids.dim() != 2 or ids.shape[0] != tokens or ids.shape[1] == 0:
        errors.value_error(name, "ids", f"[{tokens}, k] int32 or int64 with k >= 1", ids)
    errors.check_dtype(name, "ids", ids, errors.INDEX_DTYPES)
    if weights.shape != ids.shape:
        errors.value_error(name, "weights", f"{[*ids.shape]} float32", weights)
    check_weights(name, weights, x, "x")
    for arg, tensor in (("w_gate_up", w_gate_up), ("w_down", w_down), ("ids", ids)):
        errors.check_device(name, arg, tensor, x, "x")
    if activation not in ACTIVATIONS:
        errors.value_error(name, "activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    if limit > 0 and activation in ("gelu", "gelu_erf"):
        errors.value_error(name, "limit", f"0 (no clamp) with {activation}", limit)


def _check(x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, activation, limit) -> None:
    name = "moe_experts"
    check_experts(name, x, w_gate_up, w_down, weights, ids, activation, limit)
    for arg, tensor in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if tensor.dtype != x.dtype:
            errors.type_error(name, arg, f"of x's dtype {x.dtype}", tensor)
    for arg, bias, weight in (("bias_gate_up", bias_gate_up, w_gate_up), ("bias_down", bias_down, w_down)):
        if bias is None:
            continue
        if bias.shape != weight.shape[:2]:
            errors.value_error(name, arg, f"{[*weight.shape[:2]]} of x's dtype", bias)
        if bias.dtype != x.dtype:
            errors.type_error(name, arg, f"of x's dtype {x.dtype}", bias)
        errors.check_device(name, arg, bias, x, "x")


def _up_fake(x, w_gate_up, offsets, order, bias, top_k, activation, alpha, limit, save, w_scale):
    rows, both = order.shape[0], w_gate_up.shape[1]
    return x.new_empty((rows, both // 2)), x.new_empty((rows if save else 0, both))


def _act_bwd_fake(z, dh, offsets, order, weights, activation, alpha, limit):
    return z.new_empty(z.shape), z.new_empty((z.shape[0], z.shape[1] // 2)), weights.new_empty(weights.shape)


moe_experts_up = kernel(
    "moe_experts_up(Tensor x, Tensor w_gate_up, Tensor offsets, Tensor order, Tensor? bias, int top_k,"
    " str activation, float alpha, float limit, bool save, Tensor? w_scale) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_up_fake,
    when={
        "cpu": lambda x, w, *rest: only_bfloat16(x, rest[-1]),
        "triton": lambda x, w, *rest: not_triton(w, rest[-1]),
    },
)
moe_experts_act_bwd = kernel(
    "moe_experts_act_bwd(Tensor z, Tensor dh, Tensor offsets, Tensor order, Tensor weights, str activation,"
    " float alpha, float limit) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_act_bwd_fake,
)


@gradient_of(moe_experts_up)
class _Up(torch.autograd.Function):
    """For transforms of torch.func, which differentiate kernel by kernel."""

    @staticmethod
    def forward(ctx, x, w_gate_up, offsets, order, bias, top_k, activation, alpha, limit, save, w_scale):
        if w_scale is not None or w_gate_up.ndim > 3:
            raise NotImplementedError("tilefuse.moe_experts_up: packed and e4m3 weights have no derivative")
        h, z = moe_experts_up(x, w_gate_up, offsets, order, bias, top_k, activation, alpha, limit, True, None)
        ctx.save_for_backward(x, w_gate_up, offsets, order, z)
        ctx.mark_non_differentiable(z)
        ctx.has_bias, ctx.top_k, ctx.options = bias is not None, top_k, (activation, alpha, limit)
        return h, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, _):
        x, w_gate_up, offsets, order, z = ctx.saved_tensors
        top_k = ctx.top_k
        dx = dw_gate_up = dbias = None
        ones = z.new_ones((x.shape[0], top_k), dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
        dz = moe_experts_act_bwd(z, dh.contiguous(), offsets, order, ones, *ctx.options)[0]
        if ctx.needs_input_grad[0]:
            rows = grouped_matmul_fwd(dz, w_gate_up.transpose(1, 2), offsets, None, None, 1, ones.dtype, None)
            dx = scatter_rows(rows, order // top_k, offsets, x.shape[0], x.dtype)
        if ctx.needs_input_grad[1]:
            dw_gate_up = grouped_matmul_wgrad(x, dz, offsets, order, None, top_k, w_gate_up.dtype)
        if ctx.has_bias and ctx.needs_input_grad[4]:
            dbias = grouped_bias_grad(dz, offsets, None, 1, dz.dtype)
        return dx, dw_gate_up, None, None, dbias, *[None] * 6


def forward(
    x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, activation, alpha, limit, save, scales=(None, None)
):
    """The layer on checked arguments; scales: of e4m3 weights, which meet x in its own dtype."""
    top_k = ids.shape[1]
    plan = order, inverse, offsets = moe_plan_fwd(ids, w_gate_up.shape[0])
    h, z = moe_experts_up(x, w_gate_up, offsets, order, bias_gate_up, top_k, activation, alpha, limit, save, scales[0])
    y = grouped_matmul_fwd(h, w_down, offsets, None, bias_down, 1, x.dtype, scales[1])
    return moe_combine_fwd(y, inverse, weights, top_k), z, plan


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, activation, alpha, limit):
        out, z, plan = forward(
            x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, activation, alpha, limit, True
        )
        # of the activations only x and the pre-activation stay
        ctx.save_for_backward(x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, z, *plan)
        ctx.options = (activation, alpha, limit)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, z, order, inverse, offsets = ctx.saved_tensors
        top_k = ids.shape[1]
        dout = dout.contiguous()
        need = ctx.needs_input_grad
        dx = dw_gate_up = dw_down = dweights = dbias_gate_up = dbias_down = None
        dh = grouped_matmul_fwd(dout, w_down.transpose(1, 2), offsets, order, None, top_k, x.dtype, None)
        dz, weighted_h, dweights = moe_experts_act_bwd(z, dh, offsets, order, weights, *ctx.options)
        if need[0]:
            rows = grouped_matmul_fwd(dz, w_gate_up.transpose(1, 2), offsets, None, None, 1, x.dtype, None)
            dx = moe_combine_fwd(rows, inverse, None, top_k)
        if need[1]:
            dw_gate_up = grouped_matmul_wgrad(x, dz, offsets, order, None, top_k, w_gate_up.dtype)
        if need[2]:
            dw_down = grouped_matmul_wgrad(weighted_h, dout, offsets, None, order, top_k, w_down.dtype)
        if need[3] and bias_down is not None:
            dweights = dweights + _bias_dot(dout, bias_down, ids).to(dweights.dtype)
        if bias_gate_up is not None and need[5]:
            dbias_gate_up = grouped_bias_grad(dz, offsets, None, 1, bias_gate_up.dtype)
        if bias_down is not None and need[6]:
            dbias_down = _weighted_bias_grad(dout, weights, offsets, order, top_k, bias_down.dtype)
        return dx, dw_gate_up, dw_down, dweights if need[3] else None, None, dbias_gate_up, dbias_down, *[None] * 3


def _bias_dot(dout: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """<dout[t], bias[ids[t, j]]>: the down-projection's bias in the gradient of the weights."""
    compute = dout.dtype if dout.dtype == torch.float64 else torch.float32
    dropped = (ids < 0) | (ids >= bias.shape[0])
    dots = dout.to(compute) @ bias.to(compute).T
    return dots.gather(1, ids.long().masked_fill(dropped, 0)).masked_fill(dropped, 0)


def _weighted_bias_grad(dout, weights, offsets, order, top_k, dtype):
    """``sum_p w[p] dout[token(p)]`` per expert: a weight gradient against the column of slot weights."""
    compute = dout.dtype if dout.dtype == torch.float64 else torch.float32
    column = weights.flatten()[order.long()].to(compute)[:, None]
    return grouped_matmul_wgrad(column, dout.to(compute), offsets, None, order, top_k, compute)[..., 0].to(dtype)


@op(
    module=_MODULE,
    kernels=(
        "moe_plan_fwd", "moe_experts_up", "grouped_matmul_fwd", "moe_combine_fwd", "moe_experts_act_bwd",
        "grouped_matmul_wgrad",
    ),
    differentiable=("x", "w_gate_up", "w_down", "weights", "bias_gate_up", "bias_down"),
    not_repeated="calls several kernels",
)  # fmt: skip
def moe_experts(
    x: Tensor,
    w_gate_up: Weight,
    w_down: Weight,
    weights: Tensor,
    ids: Tensor,
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 0.0,
) -> Tensor:
    """The whole mixture-of-experts layer after routing.

    Formula: ``z = x[t] @ w_gate_up[e].T (+ bias_gate_up[e])``, ``gate, up = z.chunk(2)``,
    ``y = act(gate, up) @ w_down[e].T (+ bias_down[e])``, ``out[t] = sum_j weights[t, j] * y`` with
    ``e = ids[t, j]``. The activation is computed from the pre-activation before z is rounded (float16 on
    a CPU: after); y has x's dtype.

    Args:
        x: ``[T, H]`` float32, bfloat16 or float16 (float64 on the reference backend), any row stride.
        w_gate_up: ``[E, 2 I, H]`` of x's dtype, gate rows first, then up; H or 2 I may be the contiguous dim.
        w_down: ``[E, H, I]`` of x's dtype. Any H, I, E. Both weights may be what ``pack_weight`` made of them: the same
            bits.
        weights: ``[T, k]`` float32 (or x's dtype), from ``moe_route``.
        ids: ``[T, k]`` int32 or int64; an id outside ``[0, E)`` is dropped and contributes exactly 0.
        bias_gate_up, bias_down: ``[E, 2 I]`` and ``[E, H]`` of x's dtype.
        activation: ``"silu"`` (``silu(gate) * up``), ``"gelu"`` (tanh form), ``"gelu_erf"`` (exact) or
            ``"swiglu_oai"`` (gpt-oss: ``gate * sigmoid(alpha * gate) * (up + 1)``).
        alpha: of ``"swiglu_oai"`` only.
        limit: if positive, clamps gate above at ``limit`` and up to +-``limit`` before the activation (gpt-oss,
            DeepSeek-V4). Not with gelu. A value at the bound passes its gradient, a clamped one none.

    Returns:
        ``[T, H]`` in x's dtype.

    Gradients: for x, both weights, both biases and ``weights``. Saves x and the pre-activation ``z [T * k, 2 I]`` (in
    x's dtype) and recomputes the activation; without a gradient z is not written at all. No tokens, or none kept,
    gives connected zero gradients. Deterministic; a token's result does not depend on the others, on a GPU among
    calls of as many tokens (their number per expert chooses the tile). No host synchronisation.

    Raises:
        ValueError: a wrong shape or activation, a limit with gelu. TypeError: a wrong dtype. RuntimeError: a packed
        weight, and a gradient is wanted.

    Example::

        weights, ids = tilefuse.moe_route(router(x), top_k=8)
        out = tilefuse.moe_experts(x, w_gate_up, w_down, weights, ids)

    Source: the memory scheme is that of SonicMoE (2512.14080).
    """
    _check(x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, activation, limit)
    check_inference(
        "moe_experts", (w_gate_up, w_down), x=x, weights=weights, bias_gate_up=bias_gate_up, bias_down=bias_down
    )
    x, ids, weights = errors.check_last_dim_contiguous(x), ids.contiguous(), weights.contiguous()
    w_gate_up, w_down = either_contiguous(w_gate_up), either_contiguous(w_down)
    bias_gate_up, bias_down = (None if b is None else b.contiguous() for b in (bias_gate_up, bias_down))
    args = (x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, activation, float(alpha), float(limit))
    if errors.needs_grad(*args[:4], bias_gate_up, bias_down):
        return _Experts.apply(*args)
    return forward(*args, False)[0]
