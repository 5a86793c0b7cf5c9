"""Reference of linear_cross_entropy with its gradients made in the forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear_logprobs import linear_logprobs_bwd, linear_logprobs_fwd

Kernel = Callable[..., tuple[Tensor, ...]]


def losses_and_coefficients(
    statistics: tuple[Tensor, ...],
    target: Tensor,
    class_weight: Tensor | None,
    vocabulary: int,
    token_factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Losses [T], and the coefficients of ``linear_logprobs_bwd`` that belong to them times ``token_factor``."""
    logp, lse, _, _, smoothed, _ = statistics
    kept = target != ignore_index
    weights, total = torch.ones_like(logp), vocabulary
    if class_weight is not None:
        at = torch.where(kept, target, 0).clamp(0, vocabulary - 1).long()
        weights, total = class_weight.to(logp.dtype)[at], class_weight.to(logp.dtype).sum()
    own, spread = (1 - label_smoothing) * weights, label_smoothing / vocabulary
    losses = -logp * own + z_loss * lse.square()
    if label_smoothing > 0:
        losses = losses + spread * smoothed
    of_p = token_factor * (own + spread * total + 2 * z_loss * lse)
    coefficients = torch.stack((of_p, torch.zeros_like(of_p), -token_factor * own, token_factor * spread))
    return torch.where(kept, losses, 0.0), torch.where(kept, coefficients, 0.0)


def with_gradients(
    forward: Kernel,
    backward: Kernel,
    x,
    weight,
    target,
    bias,
    class_weight,
    token_factor,
    factor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    z_loss,
    *needs,
) -> tuple[Tensor, ...]:
    """``linear_cross_entropy_fwd`` of a backend's two kernels of linear_logprobs, one after the other."""
    head = (x, weight, target, bias, class_weight)
    transform = (scale, softcap, 1.0, ignore_index)
    statistics = forward(*head, *transform, label_smoothing > 0)
    losses, coefficients = losses_and_coefficients(
        statistics, target, class_weight, weight.shape[0], token_factor, ignore_index, label_smoothing, z_loss
    )
    entropy, norm = statistics[2], statistics[5]
    return losses, *backward(*head, norm, entropy, coefficients, factor * scale, 0, *transform, *needs)


def linear_cross_entropy_fwd(*args) -> tuple[Tensor, ...]:
    return with_gradients(linear_logprobs_fwd, linear_logprobs_bwd, *args)
