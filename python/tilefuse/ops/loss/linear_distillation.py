"""The divergence between a student's and a teacher's distributions over a vocabulary, without their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors, library
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_beta, check_head, check_target, check_transform
from .distillation import coefficients_of, data, fake_losses
from .linear_logprobs import head_gradients_like, power_below
from .token_loss import check_kept_loss, kept_factors, kept_tokens, reduced

__all__ = ["linear_distillation"]

_MODULE = "loss/linear_distillation"
_HEADS = "Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, Tensor? bias, Tensor? teacher_bias"


def _fake_backward(x, weight, teacher_x, teacher_weight, bias, *rest):
    return head_gradients_like(x, weight, bias, *rest[-3:])


# losses [T] and statistics [5, T], as distillation_fwd has them
linear_distillation_fwd = kernel(
    f"linear_distillation_fwd({_HEADS}, Tensor keep, float beta, float temperature) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=fake_losses,
)
# coefficients [T] as in distillation_bwd; `factor` (a scalar) multiplies the finished sums. Gradients that are not
# asked for have size 0.
linear_distillation_bwd = kernel(
    f"linear_distillation_bwd({_HEADS}, Tensor statistics, Tensor coefficients, Tensor factor, float beta, "
    "float temperature, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_backward,
)


@gradient_of(linear_distillation_fwd)
class LinearDistillation(torch.autograd.Function):
    """Saves its inputs and five numbers per token; nothing of the vocabulary's size."""

    @staticmethod
    def forward(ctx, x, weight, teacher_x, teacher_weight, bias, teacher_bias, keep, beta, temperature):
        heads = (x, weight, teacher_x, teacher_weight, bias, teacher_bias)
        losses, statistics = linear_distillation_fwd(*heads, keep, beta, temperature)
        ctx.save_for_backward(*heads, keep, statistics)
        ctx.beta, ctx.temperature = beta, temperature
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _statistics):
        # once: checkpointing unpacks them once
        *heads, keep, statistics = ctx.saved_tensors
        coefficients = coefficients_of(dlosses, keep, ctx.beta, ctx.temperature)
        # gradients of logits fill the range of float16, to which they are rounded for the products. They are at most
        # the coefficient; at beta = 1, times the logarithm of a ratio.
        factor = power_below(coefficients) * (2.0**-14 if ctx.beta < 1 else 2.0**-8)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        gradients = linear_distillation_bwd(
            *heads, statistics, coefficients / factor, factor, ctx.beta, ctx.temperature, *needs
        )
        dx, dweight, dbias = (g if need else None for g, need in zip(gradients, needs))
        return dx, dweight, None, None, dbias, None, None, None, None


@op(
    module=_MODULE,
    kernels=("linear_distillation_fwd", "linear_distillation_bwd"),
    differentiable=("x", "weight", "bias"),
    not_repeated="PyTorch works on what the kernel made",
)
def linear_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Divergence of a student's distribution from a teacher's, from their heads, without ever holding all logits.

    ``distillation`` of the logits ``x weight^T + bias`` and ``teacher_x teacher_weight^T + teacher_bias``. They are
    accumulated and kept in float32, whatever x is: rounded to bfloat16, logits of a student that nearly agrees with
    its teacher have lost the difference, and the loss turns negative.

    Args:
        x: ``[..., H]`` hidden states of the student; float32, bfloat16 or float16 (float64 on the reference backend),
            any strides.
        weight: ``[V, H]`` in x's dtype, as ``lm_head.weight``.
        teacher_x: ``[..., H_teacher]``, any float dtype; another size and another dtype than the student's are
            welcome.
        teacher_weight: ``[V_teacher, H_teacher]`` in teacher_x's dtype. Both softmaxes are over the first
            ``min(V, V_teacher)`` rows: those that pad one of the heads never matter, and have a gradient of 0.
        target: ``[...]`` int32 or int64, which only selects: tokens of ``ignore_index`` are skipped, not multiplied by
            zero. None: all count.
        bias, teacher_bias: ``[V]`` and ``[V_teacher]``, any float dtype.
        token_weight, num_items, beta, temperature, reduction: as in ``distillation``.

    Returns:
        A scalar, or with ``"none"`` ``[...]``, 0 where ignored: float32 (float64 for float64).

    Gradients: for x, weight and bias, in their dtypes, only those that are needed. What belongs to the teacher is data:
    it has no gradient, and may require one. token_weight and num_items have none. The backward makes the logits again,
    a block of the vocabulary at a time: a block of weight's gradient is finished and rounded once before the next
    begins. The gradient of a logit is rounded to x's dtype for the two products where the hardware multiplies that.
    Once differentiable.

    Memory beside inputs, outputs and gradients: forward, the logits of as many tokens as fit into 64 MiB on a CPU and
    256 MiB on a GPU, one at least; backward, those of a block of the vocabulary, as much again, and T x H float32.
    Never T x V, never float32 V x H.

    Deterministic. Losses of tokens are batch-invariant, gradients of x and weight are not.

    Raises:
        ValueError: wrong shapes, options out of range, num_items with another reduction. TypeError: wrong dtypes.
            RuntimeError: token_weight or num_items requires grad in grad mode.

    Example::

        with torch.no_grad():
            teacher_hidden = teacher.model(ids)
        hidden = student.model(ids)  # [B, S, H]
        loss = tilefuse.linear_distillation(
            hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels, beta=0.5
        )

    Source: Agarwal et al., On-Policy Distillation of Language Models (2306.13649), for the divergence; the order of the
    backward, vocabulary outermost, is this package's.
    """
    name = "linear_distillation"
    x, weight, teacher_x, teacher_weight = library.autocast(x, weight, teacher_x, teacher_weight)
    check_head(name, x, weight, bias)
    check_head(name, teacher_x, teacher_weight, teacher_bias, x, "teacher_")
    tokens = x.shape[:-1]
    if teacher_x.shape[:-1] != tokens:
        shape = ", ".join([*map(str, tokens), "H_teacher"])
        errors.value_error(name, "teacher_x", f"[{shape}]", teacher_x)
    if target is not None:
        check_target(name, target, tokens, x, "x")
    check_beta(name, beta)
    check_transform(name, 0.0, temperature)
    check_kept_loss(name, tokens, token_weight, num_items, x, "x", reduction)
    # tokens in one dim, also where there are none
    rows, teacher_rows = (states.unsqueeze(0).flatten(0, -2) for states in (x, teacher_x))
    rows = errors.check_last_dim_contiguous(rows)
    teacher_rows = data(errors.check_last_dim_contiguous(teacher_rows), x)
    keep = kept_tokens(target, rows, ignore_index)
    heads = (
        rows,
        errors.check_last_dim_contiguous(weight),
        teacher_rows,
        data(errors.check_last_dim_contiguous(teacher_weight), x),
        None if bias is None else bias.contiguous(),
        None if teacher_bias is None else data(teacher_bias.contiguous(), x),
    )
    run = LinearDistillation.apply if errors.needs_grad(x, weight, bias) else linear_distillation_fwd
    losses, _ = run(*heads, keep, beta, temperature)
    out = reduced(losses, keep, kept_factors(keep, token_weight, losses.dtype), num_items, reduction)
    return out.view(tokens) if reduction == "none" else out
