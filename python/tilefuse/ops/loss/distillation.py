"""The divergence between a student's and a teacher's distributions over a vocabulary, from their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_beta, check_target, check_transform
from .linear_logprobs import statistics_dtype
from .token_loss import check_kept_loss, kept_factors, kept_tokens, reduced

__all__ = ["distillation"]

_MODULE = "loss/distillation"
# of each token: the student's largest logit and the logarithm of its sum relative to that, the teacher's two, and
# sum_j s_j log(s_j / M_j), which the gradient subtracts (M is the teacher for beta = 1; 0 for beta = 0)
STATISTICS = 5


def fake_losses(logits, *rest):
    dtype, tokens = statistics_dtype(logits), logits.shape[0]
    return logits.new_empty((tokens,), dtype=dtype), logits.new_empty((STATISTICS, tokens), dtype=dtype)


# losses [T], 0 where `keep` (bool) is not set, and statistics [5, T]
distillation_fwd = kernel(
    "distillation_fwd(Tensor logits, Tensor teacher_logits, Tensor keep, float beta, float temperature) "
    "-> (Tensor, Tensor)",
    module=_MODULE,
    fake=fake_losses,
)
# with the coefficient c of a token: dlogits_j = c (s_j - t_j) for beta = 0, else c s_j (log(s_j / M_j) - the fifth
# statistic). A coefficient of 0 gives 0 whatever the logits are.
distillation_bwd = kernel(
    "distillation_bwd(Tensor logits, Tensor teacher_logits, Tensor statistics, Tensor coefficients, float beta, "
    "float temperature) -> Tensor",
    module=_MODULE,
    fake=lambda logits, *rest: logits.new_empty(logits.shape),
)


def coefficients_of(dlosses: Tensor, keep: Tensor, beta: float, temperature: float) -> Tensor:
    """Of each token's gradient of the logits."""
    return torch.where(keep, dlosses, 0.0) * ((1 - beta if beta < 1 else 1.0) / temperature)


@gradient_of(distillation_fwd)
class Distillation(torch.autograd.Function):
    """Saves its inputs and five numbers per token."""

    @staticmethod
    def forward(ctx, logits, teacher_logits, keep, beta, temperature):
        losses, statistics = distillation_fwd(logits, teacher_logits, keep, beta, temperature)
        ctx.save_for_backward(logits, teacher_logits, keep, statistics)
        ctx.beta, ctx.temperature = beta, temperature
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _statistics):
        # once: checkpointing unpacks them once
        logits, teacher_logits, keep, statistics = ctx.saved_tensors
        coefficients = coefficients_of(dlosses, keep, ctx.beta, ctx.temperature)
        dlogits = distillation_bwd(logits, teacher_logits, statistics, coefficients, ctx.beta, ctx.temperature)
        return dlogits, None, None, None, None


def data(tensor: Tensor, like: Tensor) -> Tensor:
    """A teacher's tensor: without its gradient, and in float64 only where the student is."""
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype == torch.float64 and like.dtype != torch.float64 else tensor


@op(
    module=_MODULE,
    kernels=("distillation_fwd", "distillation_bwd"),
    differentiable=("logits",),
    not_repeated="PyTorch works on what the kernel made",
)
def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Divergence of a student's distribution from a teacher's, from the logits of both.

    Of each token, with ``s = softmax(logits / temperature)``, ``t = softmax(teacher_logits / temperature)`` and
    ``M = (1 - beta) s + beta t``::

        loss_t = token_weight_t * (beta KL(t || M) + (1 - beta) KL(s || M))    for 0 < beta < 1
        loss_t = token_weight_t * KL(t || s)                                   for beta = 0
        loss_t = token_weight_t * KL(s || t)                                   for beta = 1

    where ``KL(p || q) = sum_j p_j log(p_j / q_j)``: beta = 0.5 is the Jensen-Shannon divergence. The formula in the
    middle tends to 0 at both ends; 0 and 1 are the two divergences by definition. No factor of temperature squared.

    Every term of the sums is computed in a form that cannot be negative and cancels nothing, so losses are never below
    0 and stay accurate, with their gradients, where student and teacher nearly agree. A term without a share of the
    teacher is its limit; a student's logit of -inf where the teacher has a share gives inf for beta = 0.

    Args:
        logits: ``[..., V]`` float32, bfloat16 or float16 (float64 on the reference backend), any strides.
        teacher_logits: ``[..., V_teacher]``, any float dtype. Both softmaxes are over the first
            ``min(V, V_teacher)`` ids: what pads one of the vocabularies never matters.
        target: ``[...]`` int32 or int64, which only selects: tokens of ``ignore_index`` are skipped. None: all count.
        token_weight: ``[...]``, any float dtype. It never enters the divisor.
        num_items: what ``"mean"`` divides by, a number or a tensor without dims, on any device; by default the number
            of tokens that are not ignored.
        beta: in ``[0, 1]``, the teacher's share of M.
        temperature: of both.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A divisor of 0 gives 0 and zero gradients, never NaN.

    Returns:
        A scalar, or with ``"none"`` ``[...]``, 0 where ignored: float32 (float64 for float64).

    Gradients: for logits, in their dtype, rounded once. What belongs to the teacher is data: it has no gradient, and
    may require one. token_weight and num_items have none. Saved are the arguments and five numbers per token; the
    backward makes the probabilities again. Once differentiable. Deterministic and batch-invariant.

    Raises:
        ValueError: wrong shapes, options out of range, num_items with another reduction. TypeError: wrong dtypes.
            RuntimeError: token_weight or num_items requires grad in grad mode.

    Example::

        with torch.no_grad():
            teacher_logits = teacher(ids)
        loss = tilefuse.distillation(student(ids), teacher_logits, labels, beta=0.5, temperature=2.0)

    Source: Agarwal et al., On-Policy Distillation of Language Models (2306.13649).
    """
    name = "distillation"
    if logits.dim() < 1 or logits.shape[-1] == 0:
        errors.value_error(name, "logits", "[..., V] with V >= 1", logits)
    errors.check_dtype(name, "logits", logits, errors.FLOATS)
    tokens = logits.shape[:-1]
    if teacher_logits.dim() < 1 or teacher_logits.shape[:-1] != tokens or teacher_logits.shape[-1] == 0:
        shape = ", ".join([*map(str, tokens), "V_teacher"])
        errors.value_error(name, "teacher_logits", f"[{shape}] with V_teacher >= 1", teacher_logits)
    errors.check_dtype(name, "teacher_logits", teacher_logits, errors.FLOATS)
    errors.check_device(name, "teacher_logits", teacher_logits, logits, "logits")
    if target is not None:
        check_target(name, target, tokens, logits, "logits")
    check_beta(name, beta)
    check_transform(name, 0.0, temperature)
    check_kept_loss(name, tokens, token_weight, num_items, logits, "logits", reduction)
    rows = errors.check_last_dim_contiguous(logits.reshape(-1, logits.shape[-1]))
    teacher = data(teacher_logits, logits).reshape(-1, teacher_logits.shape[-1])
    teacher = errors.check_last_dim_contiguous(teacher)
    keep = kept_tokens(target, rows, ignore_index)
    run = Distillation.apply if errors.needs_grad(logits) else distillation_fwd
    losses, _ = run(rows, teacher, keep, beta, temperature)
    out = reduced(losses, keep, kept_factors(keep, token_weight, losses.dtype), num_items, reduction)
    return out.view(tokens) if reduction == "none" else out
