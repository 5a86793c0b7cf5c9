"""linear_cross_entropy with its gradients made in the forward: the kernels of linear_logprobs, one after the other.

Logits are made again here too: they would not fit beside the gradients of large batches.
"""

from __future__ import annotations

from .host import losses_and_coefficients
from .linear_logprobs import linear_logprobs_bwd, linear_logprobs_fwd


def linear_cross_entropy_fwd(
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
):
    head = (x, weight, target, bias, class_weight)
    transform = (scale, softcap, 1.0, ignore_index)
    statistics = linear_logprobs_fwd(*head, *transform, label_smoothing > 0)
    losses, coefficients = losses_and_coefficients(
        statistics, target, class_weight, weight.shape[0], token_factor, ignore_index, label_smoothing, z_loss
    )
    entropy, norm = statistics[2], statistics[5]
    return losses, *linear_logprobs_bwd(*head, norm, entropy, coefficients, factor * scale, 0, *transform, *needs)
