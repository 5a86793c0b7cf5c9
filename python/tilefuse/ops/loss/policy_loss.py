"""The clipped losses of policy optimisation over log-probabilities of tokens: PPO, GRPO, DAPO, GSPO, CISPO."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_cu_seqlens, check_like

__all__ = ["policy_loss"]

_MODULE = "loss/policy_loss"
KINDS = ("clip", "cispo", "reinforce")
LEVELS = ("token", "sequence")
KLS = ("k1", "k2", "k3", "k3+")
REDUCTIONS = ("token", "sequence", "sum", "none")
STATS = 8

# advantages [.., 1] have one value per sequence
_TENSORS = (
    "Tensor logp, Tensor advantages, Tensor? old_logp, Tensor? ref_logp, Tensor? mask, Tensor? token_weight,"
    " Tensor? cu_seqlens, Tensor? num_items"
)
_OPTIONS = (
    "str kind, str level, float clip_low, float clip_high, float dual_clip, str kl, float kl_beta, bool kl_weighted,"
    " float log_ratio_limit, str reduction"
)


def _fwd_fake(logp, *args):
    return logp.new_empty(logp.shape if args[-1] == "none" else ()), logp.new_empty((STATS,))


policy_loss_fwd = kernel(
    f"policy_loss_fwd({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fwd_fake,
    dtypes={"cpu": (torch.float32,), "triton": (torch.float32,)},
)
policy_loss_bwd = kernel(
    f"policy_loss_bwd(Tensor dloss, Tensor stats, {_TENSORS}, {_OPTIONS}) -> Tensor",
    module=_MODULE,
    fake=lambda dloss, stats, logp, *args: logp.new_empty(logp.shape),
    dtypes={"cpu": (torch.float32,), "triton": (torch.float32,)},
    dtype_arg=2,
)


@gradient_of(policy_loss_fwd)
class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        loss, stats = policy_loss_fwd(*args)
        ctx.save_for_backward(stats, *args[:8])
        ctx.options = args[8:]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        return policy_loss_bwd(dloss.contiguous(), *ctx.saved_tensors, *ctx.options), *[None] * 17


def check_options(
    kind: str,
    level: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl: str,
    log_ratio_limit: float,
    reduction: str,
) -> None:
    """Of the op, and of the module that holds them."""
    name = "policy_loss"
    for arg, value, known in (
        ("kind", kind, KINDS),
        ("level", level, LEVELS),
        ("kl", kl, KLS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            errors.value_error(name, arg, f"one of {', '.join(known)}", value)
    for arg, value in (("clip_low", clip_low), ("clip_high", clip_high), ("log_ratio_limit", log_ratio_limit)):
        if not value >= 0:
            errors.value_error(name, arg, "at least 0", value)
    if dual_clip != 0 and not dual_clip > 1:
        errors.value_error(name, "dual_clip", "0 (none) or above 1", dual_clip)


def _check_tensors(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_items: Tensor | float | None,
    by_sequence: bool,
    divides: bool,
    **others: Tensor | None,
) -> None:
    name = "policy_loss"
    if logp.dim() not in (1, 2):
        errors.value_error(name, "logp", "[B, S] or packed [T]", logp)
    errors.check_dtype(name, "logp", logp, errors.FLOATS)
    if cu_seqlens is not None:
        check_cu_seqlens(name, cu_seqlens, logp, "logp")
    elif by_sequence and logp.dim() == 1:
        errors.value_error(name, "cu_seqlens", "given for packed [T] with level or reduction 'sequence'", cu_seqlens)
    errors.check_dtype(name, "advantages", advantages, errors.FLOATS)
    if advantages.shape != logp.shape:
        sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else logp.shape[0]
        if (
            (logp.dim() == 1 and cu_seqlens is None)
            or advantages.dim() not in (1, 2)
            or advantages.shape[0] != sequences
            or (advantages.dim() == 2 and advantages.shape[1] != 1)
        ):
            errors.value_error(name, "advantages", "of logp's shape, or [B] or [B, 1] for B sequences", advantages)
    errors.check_device(name, "advantages", advantages, logp, "logp")
    for arg, value in others.items():
        if value is not None:
            check_like(name, arg, value, logp, "logp")
    if mask is not None:
        if mask.shape != logp.shape:
            errors.value_error(name, "mask", f"of logp's shape {[*logp.shape]}", mask)
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            errors.type_error(name, "mask", "bool or integer", mask)
        errors.check_device(name, "mask", mask, logp, "logp")
    if num_items is not None and not divides:
        errors.value_error(name, "num_items", "None with reduction 'sum' or 'none'", num_items)
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            errors.value_error(name, "num_items", "a number or a 0-d tensor", num_items)
        errors.check_dtype(name, "num_items", num_items, (*errors.FLOATS, *errors.INDEX_DTYPES))
        # a number on the host may lie with tensors elsewhere
        if num_items.device.type != "cpu":
            errors.check_device(name, "num_items", num_items, logp, "logp")
        others["num_items"] = num_items
    others["advantages"] = advantages
    errors.check_not_differentiated(name, "only logp gets a gradient", **others)


@op(
    module=_MODULE,
    kernels=("policy_loss_fwd", "policy_loss_bwd"),
    differentiable=("logp",),
    not_repeated="views and copies of its arguments in other dtypes",
)
def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: Tensor | float | None = None,
    *,
    kind: str = "clip",
    level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    kl: str = "k3",
    kl_beta: float = 0.0,
    kl_weighted: bool = False,
    log_ratio_limit: float = 20.0,
    reduction: str = "token",
) -> tuple[Tensor, Tensor]:
    """Loss of a policy on sampled answers, from the log-probabilities of their tokens.

    With ``d = logp - old_logp``, ``r = e^d`` and A the advantage, a token's loss is
    ``token_weight * (P + kl_beta * K)``. P is

    * ``kind="clip"`` (PPO, GRPO, DAPO, Dr. GRPO): ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; with
      ``dual_clip`` at most ``-dual_clip A`` where A < 0. The gradient is 0 where the clipped branch is strictly
      smaller.
    * ``"cispo"``: ``-min(r, 1 + clip_high) A logp``, with no gradient through r; clip_low and dual_clip are not used.
    * ``"reinforce"``: ``-A logp``; old_logp is for the statistics alone.

    ``level="sequence"`` (GSPO) takes for r the exponential of d's mean over the sequence's tokens. A = 0 gives 0, with
    no gradient, whatever r is.

    K, with ``e = ref_logp - logp``: ``kl="k1"`` -e; ``"k2"`` e^2 / 2; ``"k3"`` e^e - e - 1 (the exponential of e, not
    of d), accurate where both policies nearly agree; ``"k3+"`` the value of k3 with the gradient of k2, whose
    expectation is that of the KL divergence. ``kl_weighted`` multiplies it by the token's own ratio e^d, at every
    level, through which it is differentiated too (DeepSeek-V3.2).

    ``log_ratio_limit`` clamps d and e to +-limit, with no gradient outside, before any exponential; 0: no limit. At
    level ``"sequence"`` it clamps d's mean.

    Args:
        logp: ``[B, S]``, or packed ``[T]``: log-probability of each token under the policy, as ``linear_logprobs``
            gives it. float32, bfloat16 or float16 (float64 on the reference backend); computed in float32.
        advantages: of logp's shape, or one per sequence, ``[B]`` or ``[B, 1]``. Any float dtype, as all that follow.
        old_logp: of logp's shape, under the policy that sampled. None: the policy itself, r = 1 with the gradient A.
        ref_logp: of logp's shape, under the reference; needed where ``kl_beta`` is not 0.
        mask: of logp's shape, bool or integer, 0 = not a token of an answer. What stands there never matters, even NaN.
        token_weight: of logp's shape, multiplies each token's loss. A weight of 0 leaves a token out of the loss; it
            still counts in divisors and statistics.
        cu_seqlens: ``[B + 1]`` int32 or int64, bounds of packed sequences. Tokens outside of them are masked. Without
            it packed tokens belong to no sequence.
        num_items: a number or a 0-d tensor, instead of the divisor below: tokens or sequences of all micro-batches and
            ranks, or ``B * L_max`` for Dr. GRPO.
        kind, level, clip_low, clip_high, dual_clip: the policy's term; ``clip_low`` and ``clip_high`` >= 0,
            ``dual_clip`` 0 (none) or above 1.
        kl, kl_beta, kl_weighted, log_ratio_limit: the divergence's.
        reduction: ``"token"``: the sum over all tokens, divided by num_items or the number of tokens (DAPO);
            ``"sequence"``: the mean over each sequence's tokens, summed, divided by num_items or B, in which sequences
            without tokens count (GRPO); ``"sum"``; ``"none"``: each token's loss, 0 where masked.

    Returns:
        (loss, stats). loss is a float32 scalar, or of logp's shape (float64 for float64). A divisor of 0 gives 0 with
        zero gradients. stats ``[8]``, without gradient, are means over unmasked tokens, unweighted, after the limit:
        number of tokens, share of clipped low (A < 0), clipped high (A > 0; cispo: any A) and dual-clipped tokens, k1,
        k3 (both 0 without ref_logp), ratio, and the largest ratio. All 0 without tokens.

    Gradients: for ``logp``, once; recomputed, nothing is saved but arguments. Deterministic; with reduction ``"none"``
    batch-invariant.

    Raises:
        ValueError: a wrong shape, an unknown option or one out of range, ``kl_beta`` without ref_logp, packed tokens
            without cu_seqlens where level or reduction is ``"sequence"``, num_items with ``"sum"`` or ``"none"``.
        TypeError: a wrong dtype. RuntimeError: a tensor other than logp requires grad in grad mode.

    Example::

        loss, stats = tilefuse.policy_loss(logp, advantages, old_logp, ref_logp, mask, kl_beta=0.04,
                                           reduction="sequence")

    Sources: PPO (1707.06347), GRPO (2402.03300), dual clip (1912.09729), DAPO (2503.14476), Dr. GRPO (2503.20783),
    GSPO (2507.18071), CISPO (2506.13585), k1 to k3 (Schulman, Approximating KL divergence).
    """
    check_options(kind, level, clip_low, clip_high, dual_clip, kl, log_ratio_limit, reduction)
    if kl_beta != 0 and ref_logp is None:
        errors.value_error("policy_loss", "ref_logp", "given where kl_beta is not 0", ref_logp)
    by_sequence = "sequence" in (level, reduction)
    divides = reduction in ("token", "sequence")
    _check_tensors(
        logp, advantages, mask, cu_seqlens, num_items, by_sequence, divides,
        old_logp=old_logp, ref_logp=ref_logp, token_weight=token_weight,
    )  # fmt: skip
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    if advantages.shape != logp.shape:
        advantages = advantages.reshape(-1, 1)
    if num_items is not None:
        if isinstance(num_items, Tensor):
            num_items = num_items.to(logp.device, dtype)
        else:
            num_items = torch.full((), float(num_items), dtype=dtype, device=logp.device)
    logp, advantages = (x.to(dtype).contiguous() for x in (logp, advantages))
    old_logp, ref_logp, token_weight = (
        x if x is None else x.to(dtype).contiguous() for x in (old_logp, ref_logp, token_weight)
    )
    if mask is not None:
        mask = mask.to(torch.bool).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    args = (
        logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, num_items, kind, level,
        float(clip_low), float(clip_high), float(dual_clip), kl, float(kl_beta), kl_weighted,
        float(log_ratio_limit), reduction,
    )  # fmt: skip
    return _PolicyLoss.apply(*args) if errors.needs_grad(logp) else policy_loss_fwd(*args)
