"""Cross-entropy of a linear head, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors, library
from ...library import kernel, once_differentiable, op
from .checks import check_linear, check_transform
from .linear_logprobs import (
    LinearLogprobs,
    head_gradients_like,
    head_inputs,
    linear_logprobs_fwd,
    named,
    power_below,
    statistics_dtype,
)
from .token_loss import check_token_loss, divided, kept_factors, reduced, target_weights, token_losses

__all__ = ["linear_cross_entropy"]

_MODULE = "loss/linear_cross_entropy"
# of float32 logits, for which gradients in the forward have room
LOGITS_BYTES = 64 << 20


def _fake(x, weight, target, bias, *rest):
    losses = x.new_empty((x.shape[0],), dtype=statistics_dtype(x))
    return losses, *head_gradients_like(x, weight, bias, *rest[-3:])


# losses [T], and the gradients of sum_t token_factor_t factor losses_t; those that are not asked for have size 0
linear_cross_entropy_fwd = kernel(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
    "Tensor token_factor, Tensor factor, float scale, float softcap, int ignore_index, float label_smoothing, "
    "float z_loss, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
)


class _WithGradients(torch.autograd.Function):
    """The sum of the losses times ``factors``; the forward makes the gradients."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, class_weight, factors, *options):
        power = power_below(factors)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        losses, *gradients = linear_cross_entropy_fwd(
            x, weight, target, bias, class_weight, factors / power, power, *options, *needs
        )
        # the operands too: a derivative of these gradients, which is refused, would be one of them
        ctx.save_for_backward(*(g if need else None for g, need in zip(gradients, needs)), x, weight, bias)
        return torch.where(factors == 0, 0.0, losses * factors).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        # never in place: there may be a second backward
        dx, dweight, dbias = (None if g is None else (g * dout).to(g.dtype) for g in ctx.saved_tensors[:3])
        return dx, dweight, None, dbias, *(None,) * 7


@op(
    module=_MODULE,
    kernels=("linear_logprobs_fwd", "linear_logprobs_bwd", "linear_cross_entropy_fwd"),
    differentiable=("x", "weight", "bias"),
    not_repeated="PyTorch works on what the kernel made",
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    recompute: bool = True,
) -> Tensor:
    """Cross-entropy of a linear head against targets, without ever holding all logits.

    Of each token, with the logits z, logp and lse of ``linear_logprobs`` and ``c = class_weight`` (1 without)::

        loss_t = token_weight_t * ((1 - e) c_target (-logp_target) + e / V sum_j c_j (-logp_j) + z_loss * lse_t^2)

    where ``e = label_smoothing`` (PyTorch's rule). Tokens of ``ignore_index`` are skipped.

    Args:
        x: ``[..., H]`` hidden states; float32, bfloat16 or float16 (float64 on the reference backend), any strides.
        weight: ``[V, H]`` in x's dtype, as ``lm_head.weight``.
        target: ``[...]`` int32 or int64, x's shape without H. Nothing is shifted: labels come shifted.
        bias: ``[V]``, any float dtype.
        token_weight: of target's shape, any float dtype. It never enters the divisor.
        class_weight: ``[V]``, any float dtype.
        num_items: what ``"mean"`` divides by, a number or a tensor without dims, on any device: the tokens of all
            micro-batches, say. By default the sum of class weights of the kept targets: their number without.
        scale, softcap: of the logits, as in ``linear_logprobs``.
        ignore_index: may lie in ``[0, V)``.
        label_smoothing: in ``[0, 1]``.
        z_loss: coefficient of the squared lse (PaLM).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A divisor of 0 gives 0 and zero gradients, never NaN.
        recompute: False makes the gradients in the forward, three matrix products instead of four, and keeps them for
            the backward, with logits of at most 64 MiB in between; where they would be more (4 T V bytes), with
            ``"none"`` and inside of transforms of ``torch.func`` logits are made again after all. The same values
            within a rounding.

    Returns:
        A scalar, or with ``"none"`` a tensor of target's shape, 0 where ignored: float32 (float64 for float64).

    Gradients: for x, weight and bias, in their dtypes, only those that are needed. token_weight, class_weight and
    num_items have none. With ``recompute=True`` nothing of the vocabulary's size survives the forward; memory is that
    of ``linear_logprobs``. A second backward is right either way. Deterministic; losses of tokens are batch-invariant,
    gradients are not.

    Raises:
        ValueError: wrong shapes, options out of range, num_items with another reduction, on a CPU a target outside of
            ``[0, V)`` that is not ``ignore_index`` (on a GPU: NaN). TypeError: wrong dtypes. RuntimeError:
            token_weight, class_weight or num_items requires grad in grad mode.

    Example::

        hidden = model(ids)  # [B, S, H]
        loss = tilefuse.linear_cross_entropy(hidden[:, :-1], head.weight, ids[:, 1:])

    Sources: the formula is that of ``torch.nn.functional.cross_entropy``; the z-loss that of PaLM (2204.02311); the
    fusion that of Wijmans et al., Cut Your Losses (2411.09009).
    """
    name = "linear_cross_entropy"
    x, weight = library.autocast(x, weight)
    check_linear(name, x, weight, target, bias)
    check_transform(name, softcap)
    vocabulary = weight.shape[0]
    check_token_loss(
        name, target, vocabulary, token_weight, class_weight, num_items, x, "x", label_smoothing, reduction
    )
    tensors = head_inputs(x, weight, target, bias)
    class_weight = None if class_weight is None else class_weight.contiguous()
    dtype, ids = statistics_dtype(x), target.reshape(-1)
    weights = target_weights(ids, class_weight, ignore_index, dtype)
    factors = kept_factors(ids != ignore_index, token_weight, dtype)
    needs_grad = errors.needs_grad(x, weight, bias)
    if not recompute and needs_grad and reduction != "none" and 4 * ids.shape[0] * vocabulary <= LOGITS_BYTES:
        if reduction == "mean":
            factors = divided(factors, weights, num_items)
        options = (scale, softcap, ignore_index, label_smoothing, z_loss)
        return named(name, _WithGradients.apply, *tensors, class_weight, factors, *options)
    smooth = label_smoothing > 0
    args = (*tensors, class_weight if smooth else None, scale, softcap, 1.0, ignore_index, smooth)
    logp, lse, _, _, smoothed, _ = named(name, LinearLogprobs.apply if needs_grad else linear_logprobs_fwd, *args)
    losses = token_losses(logp, lse, smoothed, weights, vocabulary, label_smoothing, z_loss)
    out = reduced(losses, weights, factors, num_items, reduction)
    return out.view(target.shape) if reduction == "none" else out
