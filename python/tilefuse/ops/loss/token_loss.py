"""What every cross-entropy makes of its tokens' statistics: their losses, and one number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from .checks import check_like, check_vocabulary

__all__: list[str] = []

REDUCTIONS = ("mean", "sum", "none")


def check_num_items(name: str, num_items: Tensor | float | None, like: Tensor, like_arg: str, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        errors.value_error(name, "num_items", f"None with reduction={reduction!r}, which does not divide", num_items)
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            errors.value_error(name, "num_items", "a number or a tensor without dims", num_items)
        if num_items.dtype.is_complex or num_items.dtype == torch.bool:
            errors.type_error(name, "num_items", "integer or float", num_items)
        # of any device that has a value
        if num_items.is_meta != like.is_meta:
            errors.check_device(name, "num_items", num_items, like, like_arg)
        errors.check_not_differentiated(name, "it has no gradient", num_items=num_items)


def check_reduction_name(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        errors.value_error(name, "reduction", f"one of {', '.join(REDUCTIONS)}", reduction)


def check_reduction(name: str, num_items: Tensor | float | None, like: Tensor, like_arg: str, reduction: str) -> None:
    check_reduction_name(name, reduction)
    check_num_items(name, num_items, like, like_arg, reduction)


def check_token_loss(
    name: str,
    target: Tensor,
    vocabulary: int,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    num_items: Tensor | float | None,
    like: Tensor,
    like_arg: str,
    label_smoothing: float,
    reduction: str,
) -> None:
    if token_weight is not None:
        check_like(name, "token_weight", token_weight, target, "target")
    if class_weight is not None:
        check_vocabulary(name, "class_weight", class_weight, vocabulary, like, like_arg)
    check_reduction(name, num_items, like, like_arg, reduction)
    if not 0 <= label_smoothing <= 1:
        errors.value_error(name, "label_smoothing", "in [0, 1]", label_smoothing)
    errors.check_not_differentiated(name, "it has no gradient", token_weight=token_weight, class_weight=class_weight)


def check_kept_loss(
    name: str,
    tokens: torch.Size,
    token_weight: Tensor | None,
    num_items: Tensor | float | None,
    like: Tensor,
    like_arg: str,
    reduction: str,
) -> None:
    """Of a loss whose targets only select, or are not there: ``tokens`` is their shape."""
    if token_weight is not None:
        if token_weight.shape != tokens:
            errors.value_error(name, "token_weight", f"{[*tokens]}", token_weight)
        errors.check_dtype(name, "token_weight", token_weight, errors.FLOATS)
        errors.check_device(name, "token_weight", token_weight, like, like_arg)
    check_reduction(name, num_items, like, like_arg, reduction)
    errors.check_not_differentiated(name, "it has no gradient", token_weight=token_weight)


def kept_tokens(target: Tensor | None, rows: Tensor, ignore_index: int) -> Tensor:
    """Which of the rows count, bool ``[T]``."""
    if target is None:
        return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    return target.reshape(-1) != ignore_index


def kept_factors(keep: Tensor, token_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each token counts ``[T]``: its weight, 0 where it is not kept."""
    return keep.to(dtype) if token_weight is None else torch.where(keep, token_weight.reshape(-1).to(dtype), 0.0)


def target_weights(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Class weight of each token's target, 0 for ignored ones."""
    kept = target != ignore_index
    if class_weight is None:
        return kept.to(dtype)
    # one out of range has a logp of NaN anyway
    at = torch.where(kept, target, 0).clamp(0, class_weight.shape[0] - 1).long()
    return torch.where(kept, class_weight.to(dtype)[at], 0.0)


def token_losses(
    logp: Tensor,
    lse: Tensor,
    smoothed: Tensor,
    weights: Tensor,
    vocabulary: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Of each token ``[T]``; ``weights`` are those of its target, ``smoothed`` is ``sum_j c_j (-logp_j)``."""
    losses = -logp * weights if label_smoothing == 0 else -logp * ((1 - label_smoothing) * weights)
    if label_smoothing > 0:
        losses = losses + label_smoothing / vocabulary * smoothed
    return losses + z_loss * lse.square() if z_loss != 0 else losses


def divided(values: Tensor, weights: Tensor, num_items: Tensor | float | None) -> Tensor:
    """Values over the number of items, by default the sum of weights; 0, still connected, over 0."""
    if num_items is None:
        divisor = weights.sum()
    elif isinstance(num_items, Tensor):
        divisor = num_items.to(values.device, values.dtype)
    else:
        divisor = values.new_full((), num_items)
    nothing = divisor == 0
    return torch.where(nothing, 0.0, values / torch.where(nothing, 1.0, divisor))


def reduced(
    losses: Tensor,
    weights: Tensor,
    factors: Tensor,
    num_items: Tensor | float | None,
    reduction: str,
) -> Tensor:
    losses = torch.where(factors == 0, 0.0, losses * factors)
    if reduction == "none":
        return losses
    return divided(losses.sum(), weights, num_items) if reduction == "mean" else losses.sum()
