"""Log-probabilities of logits that exist already."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_logits, check_transform
from .linear_logprobs import RESULT, TRANSFORM, coefficients_of, result_like, statistics_dtype

__all__ = ["logprobs"]

_MODULE = "loss/logprobs"
_LOGITS = "Tensor logits, Tensor target, Tensor? class_weight"

# logits [A, B, V], target [A B]; the results are those of linear_logprobs_fwd
logprobs_fwd = kernel(
    f"logprobs_fwd({_LOGITS}, {TRANSFORM}, bool smooth) -> {RESULT}",
    module=_MODULE,
    fake=lambda logits, target, *rest: result_like(logits, target.shape[0], statistics_dtype(logits), rest[-1]),
)
# with a_t, e_t, b_t, s_t the rows of `coefficients` [4, T], before the cap's derivative:
# dlogits_j = p_j (a - e (logp_j + entropy)) + b [j = target] - s c_j; contiguous
logprobs_bwd = kernel(
    f"logprobs_bwd({_LOGITS}, Tensor norm, Tensor entropy, Tensor coefficients, {TRANSFORM}) -> Tensor",
    module=_MODULE,
    fake=lambda logits, *rest: logits.new_empty(logits.shape),
)


@gradient_of(logprobs_fwd)
class Logprobs(torch.autograd.Function):
    """Saves the logits, which are the caller's, and three numbers per token."""

    @staticmethod
    def forward(ctx, logits, target, class_weight, scale, softcap, temperature, ignore_index, smooth):
        transform = (scale, softcap, temperature, ignore_index)
        results = logprobs_fwd(logits, target, class_weight, *transform, smooth)
        ctx.save_for_backward(logits, target, class_weight, results[5], results[2])
        ctx.transform, ctx.smooth = transform, smooth
        ctx.mark_non_differentiable(results[3], results[5], *(() if smooth else (results[4],)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dlse, dentropy, _argmax, dsmoothed, _norm):
        # once: checkpointing unpacks them once
        saved = ctx.saved_tensors
        logits, target, class_weight = saved[:3]
        scale, _, temperature, ignore_index = ctx.transform
        smoothing_weight = logits.shape[-1] if class_weight is None else class_weight.to(dlogp.dtype).sum()
        upstream = (dlogp, dlse, dentropy, dsmoothed if ctx.smooth else None)
        coefficients = coefficients_of(upstream, target, smoothing_weight, ignore_index) * (scale / temperature)
        return logprobs_bwd(*saved, coefficients, *ctx.transform), *(None,) * 7


def token_rows(logits: Tensor) -> Tensor:
    """``[A, B, V]`` with the elements of a row side by side; a view unless strides forbid it."""
    logits = errors.check_last_dim_contiguous(logits)
    if logits.dim() > 3:
        return logits.flatten(0, -3)
    return logits[(None,) * (3 - logits.dim())]


@op(
    module=_MODULE,
    kernels=("logprobs_fwd", "logprobs_bwd"),
    differentiable=("logits",),
    not_repeated="views of its arguments and results",
)
def logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each token's target under logits that exist already; ``linear_logprobs`` needs none.

    With ``z = cap(scale * logits) / temperature``, ``cap(z) = softcap * tanh(z / softcap)`` if ``softcap > 0``:
    ``lse = log sum_j exp z_j``, ``logp = z_target - lse``, ``entropy = lse - sum_j p_j z_j`` and ``argmax``, the lowest
    index of the largest logit. Arithmetic is float32 whatever the logits are; a logit of -inf contributes 0.

    Args:
        logits: ``[..., V]`` with V >= 1; float32, bfloat16 or float16 (float64 on the reference backend). Rows are read
            where they lie: a slice such as ``logits[:, :-1]`` is not copied, unless its V is not the innermost dim.
        target: ``[...]`` int32 or int64, logits' shape without V. Nothing is shifted: labels come shifted.
        scale, softcap, temperature: of the logits, applied in this order; ``softcap=0`` caps nothing.
        ignore_index: tokens with this target are skipped: their logits are never read. May lie in ``[0, V)``.

    Returns:
        ``logp``, ``lse``, ``entropy`` float32 (float64 for float64) and ``argmax`` int32, all of target's shape; of
        ignored tokens 0, 0, 0 and -1.

    Gradients: for logits, from any subset of logp, lse and entropy, in logits' dtype: made in float32, rounded once, of
    ignored tokens exactly 0. The backward makes the probabilities again from the logits; nothing of their size is kept
    or made beside the gradient. Once differentiable.

    Deterministic and batch-invariant. The vocabulary is summed in blocks of 4,096 in ascending order; on a CPU float32
    logits have the bits of the ``linear_logprobs`` that makes them.

    Raises:
        ValueError: wrong shapes, ``softcap < 0``, ``temperature <= 0``, on a CPU a target outside of ``[0, V)`` that is
            not ``ignore_index`` (on a GPU: NaN for that token). TypeError: wrong dtypes.

    Example::

        logp, lse, entropy, argmax = tilefuse.logprobs(logits[:, :-1], ids[:, 1:], temperature=0.7)

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (1805.02867).
    """
    name = "logprobs"
    check_logits(name, logits, target)
    check_transform(name, softcap, temperature)
    args = (token_rows(logits), target.reshape(-1).contiguous(), None, scale, softcap, temperature, ignore_index, False)
    run = Logprobs.apply if errors.needs_grad(logits) else logprobs_fwd
    logp, lse, entropy, argmax, *_ = run(*args)
    return tuple(result.view(target.shape) for result in (logp, lse, entropy, argmax))
