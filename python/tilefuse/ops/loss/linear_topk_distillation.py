"""Distillation of a linear head from what its teacher lists of its distribution, without logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors, library
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_beta, check_head, check_target, check_transform
from .linear_logprobs import balancing_power, fake_backward, head_inputs, statistics_dtype
from .token_loss import check_kept_loss, kept_factors, kept_tokens, reduced

__all__ = ["linear_topk_distillation"]

_MODULE = "loss/linear_topk_distillation"
TAILS = ("bucket", "renormalize", "none")


def _fake(x, weight, target, bias, teacher_logp, *rest):
    tokens, listed = teacher_logp.shape
    return tuple(
        x.new_empty(shape, dtype=statistics_dtype(x)) for shape in ((tokens,), (tokens, listed + 1), (2, tokens))
    )


# teacher_ids [T, k] in ascending order, -1 ahead of them. Losses [T]; their gradients in the logits of the listed ids
# and, last, in the logarithm of the sum of exp of all others, [T, k + 1]; norm [2, T]: the largest logit of those
# others and the logarithm of their sum relative to it, 0 and inf where there are none
linear_topk_distillation_fwd = kernel(
    "linear_topk_distillation_fwd(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor teacher_logp, "
    "Tensor teacher_ids, float beta, str tail, float temperature, int ignore_index) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
)
# dz_j = coefficients [T, k + 1] at the listed ids, elsewhere the last of them times exp(z_j - norm[0] - norm[1]).
# `factor` (a scalar) multiplies the finished sums. Gradients that are not asked for have size 0.
linear_topk_distillation_bwd = kernel(
    "linear_topk_distillation_bwd(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor teacher_ids, "
    "Tensor norm, Tensor coefficients, Tensor factor, float temperature, int ignore_index, bool need_x, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=fake_backward,
)


@gradient_of(linear_topk_distillation_fwd)
class LinearTopkDistillation(torch.autograd.Function):
    """Saves its inputs and k + 3 numbers per token; nothing of the vocabulary's size."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, teacher_logp, teacher_ids, beta, tail, temperature, ignore_index):
        losses, gradient, norm = linear_topk_distillation_fwd(
            x, weight, target, bias, teacher_logp, teacher_ids, beta, tail, temperature, ignore_index
        )
        ctx.save_for_backward(x, weight, target, bias, teacher_ids, norm, gradient)
        ctx.options = (temperature, ignore_index)
        ctx.mark_non_differentiable(gradient, norm)
        return losses, gradient, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _gradient, _norm):
        *saved, gradient = ctx.saved_tensors
        temperature, ignore_index = ctx.options
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        # nothing of a token that is ignored or not asked for matters
        counts = (saved[2] != ignore_index) & (dlosses != 0)
        coefficients = torch.where(counts[:, None], dlosses[:, None] * gradient, 0.0)
        power = balancing_power(coefficients.abs())
        factor = power / temperature
        results = linear_topk_distillation_bwd(*saved, coefficients / power, factor, temperature, ignore_index, *needs)
        dx, dweight, dbias = (result if need else None for result, need in zip(results, needs))
        return dx, dweight, None, dbias, *(None,) * 6


def check_tail(name: str, tail: str) -> None:
    if tail not in TAILS:
        errors.value_error(name, "tail", f"one of {', '.join(TAILS)}", tail)


def check_teacher(name: str, x: Tensor, teacher_logp: Tensor, teacher_ids: Tensor) -> None:
    if teacher_ids.dim() != x.dim() or teacher_ids.shape[:-1] != x.shape[:-1]:
        errors.value_error(name, "teacher_ids", f"[{', '.join(map(str, (*x.shape[:-1], 'k')))}]", teacher_ids)
    errors.check_dtype(name, "teacher_ids", teacher_ids, errors.INDEX_DTYPES)
    errors.check_device(name, "teacher_ids", teacher_ids, x, "x")
    if teacher_logp.shape != teacher_ids.shape:
        errors.value_error(name, "teacher_logp", f"of teacher_ids' shape {[*teacher_ids.shape]}", teacher_logp)
    errors.check_dtype(name, "teacher_logp", teacher_logp, errors.FLOATS)
    errors.check_device(name, "teacher_logp", teacher_logp, x, "x")


@op(
    module=_MODULE,
    kernels=("linear_topk_distillation_fwd", "linear_topk_distillation_bwd"),
    differentiable=("x", "weight", "bias"),
    not_repeated="PyTorch sorts what the teacher lists",
)
def linear_topk_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_logp: Tensor,
    teacher_ids: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    *,
    beta: float = 0.0,
    tail: str = "bucket",
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Divergence of a linear head from the k most likely tokens of its teacher, without ever holding the logits.

    With the student's ``p = softmax((x w^T + bias) / temperature)`` and the teacher's ``t_i = exp(teacher_logp_i)`` at
    the listed ids, each token has the categories that ``tail`` makes of them:

    * ``"bucket"``: the k listed ids and one for all others. There the student has the sum of p over the others, made
      in the same pass and never as ``1 - sum_i p_i``, and the teacher ``max(0, 1 - sum_i t_i)``. Where either is 0 the
      term of that category is left out; where every id is listed there is no such category.
    * ``"renormalize"``: the k listed ids, both sides divided by their own sum over these. Any scores will do for
      teacher_logp, up to a constant.
    * ``"none"``: the k listed ids as they are, a truncated sum: it may be negative, and is not smallest where both
      sides agree.

    The loss of a token is, summed over its categories,

    * ``beta = 0``: ``KL(t || p) = sum t (log t - log p)``,
    * ``beta = 1``: ``KL(p || t) = sum p (log p - log t)``,
    * between: ``beta KL(t || m) + (1 - beta) KL(p || m)`` with ``m = (1 - beta) p + beta t``, which is not continuous
      at the ends: it tends to 0 there.

    A category where t or p is 0 adds its limit: 0, or inf as in ``KL(t || p)`` for p = 0 < t. Nothing multiplies the
    loss by ``temperature ** 2``.

    Args:
        x: ``[..., H]`` hidden states; float32, bfloat16 or float16 (float64 on the reference backend), any strides.
        weight: ``[V, H]`` in x's dtype, as ``lm_head.weight``.
        teacher_logp: ``[..., k]`` log-probabilities of the teacher at the same temperature, any float dtype, any k.
        teacher_ids: ``[..., k]`` int32 or int64 in ``[0, V)``, those of one token distinct and in any order. -1 is
            padding, whatever teacher_logp holds there.
        target: ``[...]`` int32 or int64: tokens where it is ``ignore_index`` are skipped. They cost no products, and
            NaN or inf of theirs reaches nothing. Other values mean nothing; None skips no token.
        bias: ``[V]``, any float dtype.
        token_weight: ``[...]``, any float dtype: multiplies the losses. It never enters the divisor.
        num_items: what ``"mean"`` divides by, a number or a tensor without dims, on any device; by default the number
            of tokens that are not skipped.
        beta: in ``[0, 1]``, the divergence, see above.
        tail: what becomes of the tokens that the teacher does not list, see above.
        temperature: divides the student's logits.
        ignore_index: the mark in ``target``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A divisor of 0 gives 0 and zero gradients, never NaN.

    Returns:
        A scalar, or with ``"none"`` a tensor ``[...]``, 0 where skipped: float32 (float64 for float64). At least 0, but
        for ``"none"`` as the tail and for categories left out.

    Gradients: for x, weight and bias, in their dtypes, only those that are needed. The teacher's tensors are data;
    token_weight and num_items have no gradient. The backward makes the logits again, as that of ``linear_logprobs``
    does; per token it needs k + 3 numbers of the forward. Once differentiable.

    Memory beside inputs, outputs and gradients: O(T (k + V / 4096)) forward, and that of ``linear_logprobs`` backward.

    Deterministic; losses are batch-invariant, gradients are not. Logits are accumulated and kept in float32; of the
    k + 1 numbers per token everything else is computed in float64, so that a loss is accurate however small it is.

    Raises:
        ValueError: wrong shapes, options out of range, num_items with another reduction, on a CPU an id out of range
            or twice in a row of a token that is not skipped (on a GPU: NaN for that token). TypeError: wrong dtypes,
            weight not in x's dtype. RuntimeError: token_weight or num_items requires grad in grad mode.

    Example::

        with torch.no_grad():
            logp, ids = teacher(tokens).float().log_softmax(-1).topk(64)
        loss = tilefuse.linear_topk_distillation(student(tokens), head.weight, logp, ids)

    Sources: Hinton et al. (1503.02531) for distillation, Agarwal et al. (2306.13649) for the family of divergences.
    """
    name = "linear_topk_distillation"
    x, weight = library.autocast(x, weight)
    check_head(name, x, weight, bias)
    check_teacher(name, x, teacher_logp, teacher_ids)
    if target is not None:
        check_target(name, target, x.shape[:-1], x, "x")
    check_transform(name, 0.0, temperature)
    check_beta(name, beta)
    check_tail(name, tail)
    check_kept_loss(name, x.shape[:-1], token_weight, num_items, x, "x", reduction)
    if target is None:
        # of no value that is ignored
        target, ignore_index = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device), -1
    head = head_inputs(x, weight, target, bias)
    tokens, listed, dtype = target.numel(), teacher_ids.shape[-1], statistics_dtype(x)
    sorted_ids, order = teacher_ids.reshape(tokens, listed).contiguous().sort(-1)
    logp = teacher_logp.detach().reshape(tokens, listed).gather(-1, order).to(dtype).contiguous()
    options = (float(beta), tail, float(temperature), ignore_index)
    run = LinearTopkDistillation.apply if errors.needs_grad(x, weight, bias) else linear_topk_distillation_fwd
    losses, *_ = run(*head, logp, sorted_ids, *options)
    keep = kept_tokens(target, x, ignore_index)
    out = reduced(losses, keep, kept_factors(keep, token_weight, dtype), num_items, reduction)
    return out.view(target.shape) if reduction == "none" else out
