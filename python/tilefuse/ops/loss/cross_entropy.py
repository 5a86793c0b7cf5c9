"""Cross-entropy of logits that exist already."""

from __future__ import annotations

from torch import Tensor

from ... import errors
from ...library import op
from .checks import check_logits, check_transform
from .linear_logprobs import named, statistics_dtype
from .logprobs import Logprobs, logprobs_fwd, token_rows
from .token_loss import check_token_loss, kept_factors, reduced, target_weights, token_losses

__all__ = ["cross_entropy"]

_MODULE = "loss/cross_entropy"


@op(
    module=_MODULE,
    kernels=("logprobs_fwd", "logprobs_bwd"),
    differentiable=("logits",),
    not_repeated="PyTorch works on what the kernel made",
)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
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
) -> Tensor:
    """Cross-entropy of logits against targets; from a linear head ``linear_cross_entropy`` makes it without logits.

    Of each token, with the logits z, logp and lse of ``logprobs`` and ``c = class_weight`` (1 without)::

        loss_t = token_weight_t * ((1 - e) c_target (-logp_target) + e / V sum_j c_j (-logp_j) + z_loss * lse_t^2)

    where ``e = label_smoothing`` (PyTorch's rule). Tokens of ``ignore_index`` are skipped.

    Args:
        logits: ``[..., V]`` with V >= 1; float32, bfloat16 or float16 (float64 on the reference backend). Rows are read
            where they lie: a slice such as ``logits[:, :-1]`` is not copied, unless its V is not the innermost dim.
        target: ``[...]`` int32 or int64, logits' shape without V. Nothing is shifted: labels come shifted.
        token_weight: of target's shape, any float dtype. It never enters the divisor.
        class_weight: ``[V]``, any float dtype.
        num_items: what ``"mean"`` divides by, a number or a tensor without dims, on any device: the tokens of all
            micro-batches, say. By default the sum of class weights of the kept targets: their number without.
        scale, softcap: of the logits, as in ``logprobs``.
        ignore_index: may lie in ``[0, V)``.
        label_smoothing: in ``[0, 1]``.
        z_loss: coefficient of the squared lse (PaLM).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A divisor of 0 gives 0 and zero gradients, never NaN.

    Returns:
        A scalar, or with ``"none"`` a tensor of target's shape, 0 where ignored: float32 (float64 for float64).

    Gradients: for logits, in their dtype, made in float32 and rounded once; exactly 0 for ignored tokens. The backward
    reads the logits again and writes nothing else. token_weight, class_weight and num_items have none. Once
    differentiable; a second backward is right. Deterministic; losses and gradients of tokens are batch-invariant but
    for the divisor.

    Raises:
        ValueError: wrong shapes, options out of range, num_items with another reduction, on a CPU a target outside of
            ``[0, V)`` that is not ``ignore_index`` (on a GPU: NaN). TypeError: wrong dtypes. RuntimeError:
            token_weight, class_weight or num_items requires grad in grad mode.

    Example::

        loss = tilefuse.cross_entropy(model(ids)[:, :-1], ids[:, 1:])  # logits [B, S, V]

    Sources: the formula is that of ``torch.nn.functional.cross_entropy``; the z-loss that of PaLM (2204.02311).
    """
    name = "cross_entropy"
    check_logits(name, logits, target)
    check_transform(name, softcap)
    vocabulary = logits.shape[-1]
    check_token_loss(
        name, target, vocabulary, token_weight, class_weight, num_items, logits, "logits", label_smoothing, reduction
    )
    class_weight = None if class_weight is None else class_weight.contiguous()
    dtype, ids = statistics_dtype(logits), target.reshape(-1).contiguous()
    weights = target_weights(ids, class_weight, ignore_index, dtype)
    factors = kept_factors(ids != ignore_index, token_weight, dtype)
    smooth = label_smoothing > 0
    args = (token_rows(logits), ids, class_weight if smooth else None, scale, softcap, 1.0, ignore_index, smooth)
    run = Logprobs.apply if errors.needs_grad(logits) else logprobs_fwd
    logp, lse, _, _, smoothed, _ = named(name, run, *args)
    losses = token_losses(logp, lse, smoothed, weights, vocabulary, label_smoothing, z_loss)
    out = reduced(losses, weights, factors, num_items, reduction)
    return out.view(target.shape) if reduction == "none" else out
