"""Log-probabilities of a linear head, without its logits: the primitive that losses over a vocabulary are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import errors, library
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_linear, check_transform

__all__ = ["linear_logprob_stats", "linear_logprobs", "merge_logprobs"]

_MODULE = "loss/linear_logprobs"
# of the vocabulary: statistics are made of blocks of so many, and merged in their order
STATS_BLOCK = 4096
# (maximum, sum of exp, sum of z exp, logit of the target, argmax), and for smoothing (sum of c z, sum of c)
STATS_COLUMNS, SMOOTHED_COLUMNS = 5, 7

_HEAD = "Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight"
TRANSFORM = "float scale, float softcap, float temperature, int ignore_index"
RESULT = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def result_like(like: Tensor, tokens: int, dtype: torch.dtype, smooth: bool) -> tuple[Tensor, ...]:
    logp, lse, entropy = (like.new_empty((tokens,), dtype=dtype) for _ in range(3))
    argmax = like.new_empty((tokens,), dtype=torch.int32)
    smoothed = like.new_empty((tokens if smooth else 0,), dtype=dtype)
    return logp, lse, entropy, argmax, smoothed, like.new_empty((2, tokens), dtype=dtype)


def _fake_stats(x, weight, target, bias, class_weight, vocab_start, scale, softcap, temperature, ignore_index, smooth):
    blocks = -(-weight.shape[0] // STATS_BLOCK)
    columns = SMOOTHED_COLUMNS if smooth else STATS_COLUMNS
    return x.new_empty((x.shape[0], blocks, columns), dtype=statistics_dtype(x))


def head_gradients_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for gradients of x, weight and bias; those that are not asked for have size 0."""
    dbias = weight.new_empty((weight.shape[0] if need_bias else 0,), dtype=x.dtype if bias is None else bias.dtype)
    return x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,)), dbias


def fake_backward(x, weight, target, bias, *rest):
    return head_gradients_like(x, weight, bias, *rest[-3:])


# logp, lse, entropy [T]; argmax int32 [T]; smoothed = sum_j c_j (-logp_j) [T], or [0] unless `smooth`; norm [2, T]: the
# largest logit and the logarithm of the sum relative to it, which keep what lse alone rounds away
linear_logprobs_fwd = kernel(
    f"linear_logprobs_fwd({_HEAD}, {TRANSFORM}, bool smooth) -> {RESULT}",
    module=_MODULE,
    fake=lambda x, *rest: result_like(x, x.shape[0], statistics_dtype(x), rest[-1]),
)
# with a_t, e_t, b_t, s_t the rows of `coefficients` [4, T]:
# dz_j = p_j (a - e (logp_j + entropy)) + b [j = target] - s c_j. `factor` (a scalar) multiplies the finished sums.
# Gradients that are not asked for have size 0.
linear_logprobs_bwd = kernel(
    f"linear_logprobs_bwd({_HEAD}, Tensor norm, Tensor entropy, Tensor coefficients, Tensor factor, int vocab_start, "
    f"{TRANSFORM}, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=fake_backward,
)
# [T, blocks, 5 or 7] of a shard that begins at `vocab_start`. A target elsewhere has the logit NaN; an ignored token
# the maximum -inf, sums of 0 and the argmax -1.
linear_logprob_stats_fwd = kernel(
    f"linear_logprob_stats_fwd({_HEAD}, int vocab_start, {TRANSFORM}, bool smooth) -> Tensor",
    module=_MODULE,
    fake=_fake_stats,
)
merge_logprobs_fwd = kernel(
    f"merge_logprobs_fwd(Tensor stats) -> {RESULT}",
    module=_MODULE,
    fake=lambda stats: result_like(stats, stats.shape[0], stats.dtype, stats.shape[2] == SMOOTHED_COLUMNS),
    dtypes={"cpu": (torch.float32,), "triton": (torch.float32,)},
)


def power_below(values: Tensor) -> Tensor:
    """The largest power of two up to the largest finite magnitude, a scalar; 2^-100 at least."""
    magnitudes = values.abs().nan_to_num(0.0, 0.0, 0.0).flatten()
    largest = torch.cat((magnitudes, magnitudes.new_full((1,), 2.0**-100))).amax()
    # the exponent's bits alone
    wide = largest.dtype == torch.float64
    bits = largest.view(torch.int64 if wide else torch.int32)
    return (bits & (0x7FF << 52 if wide else 0xFF << 23)).view(largest.dtype)


def balancing_power(bound: Tensor) -> Tensor:
    """What gradients of logits, which these values bound, are divided by before their products.

    Gradients of any size then fill the range of float16, to which they are rounded for that; scaling a loss by a power
    of two scales its gradients exactly.
    """
    return power_below(bound) * 2.0**-12


def balanced(coefficients: Tensor, class_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Coefficients divided by a power of two, and that power."""
    widest = 1.0 if class_weight is None else class_weight.abs().amax()
    bound = coefficients.abs()
    # |p (logp + entropy)| stays below 16
    factor = balancing_power(torch.stack((bound[0], 16 * bound[1], bound[2], bound[3] * widest)))
    return coefficients / factor, factor


def coefficients_of(
    upstream: tuple[Tensor, Tensor, Tensor, Tensor | None],
    target: Tensor,
    smoothing_weight: Tensor | float,
    ignore_index: int,
) -> Tensor:
    """``[4, T]`` of a backward kernel, 0 for ignored tokens; ``upstream`` is that of logp, lse, entropy and smoothed.

    ``smoothing_weight``: the sum of class weights over the vocabulary, or its size.
    """
    dlogp, dlse, dentropy, dsmoothed = upstream
    total = dlse - dlogp
    if dsmoothed is None:
        dsmoothed = torch.zeros_like(dlogp)
    else:
        total = total + smoothing_weight * dsmoothed
    # nothing of an ignored token matters
    return torch.where(target == ignore_index, 0.0, torch.stack((total, dentropy, dlogp, dsmoothed)))


def backward(
    saved: Sequence[Tensor | None],
    upstream: tuple[Tensor, Tensor, Tensor, Tensor | None],
    needs: tuple[bool, bool, bool],
    vocab_start: int,
    smoothing_weight: Tensor | float,
    transform: tuple[float, float, float, int],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias; ``upstream`` and ``smoothing_weight`` are those of ``coefficients_of``."""
    target, class_weight = saved[2], saved[4]
    assert target is not None
    coefficients = coefficients_of(upstream, target, smoothing_weight, transform[3])
    coefficients, factor = balanced(coefficients, class_weight)
    # what multiplies every gradient of a logit multiplies the finished sums
    factor = factor * (transform[0] / transform[2])
    results = linear_logprobs_bwd(*saved, coefficients, factor, vocab_start, *transform, *needs)
    return tuple(result if need else None for result, need in zip(results, needs))


@gradient_of(linear_logprobs_fwd)
class LinearLogprobs(torch.autograd.Function):
    """Saves its inputs and three numbers per token; nothing of the vocabulary's size."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, class_weight, scale, softcap, temperature, ignore_index, smooth):
        transform = (scale, softcap, temperature, ignore_index)
        results = linear_logprobs_fwd(x, weight, target, bias, class_weight, *transform, smooth)
        ctx.save_for_backward(x, weight, target, bias, class_weight, results[5], results[2])
        ctx.transform, ctx.smooth = transform, smooth
        ctx.mark_non_differentiable(results[3], results[5], *(() if smooth else (results[4],)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dlse, dentropy, _argmax, dsmoothed, _norm):
        # once: checkpointing unpacks them once
        saved = ctx.saved_tensors
        smoothing_weight = saved[1].shape[0] if saved[4] is None else saved[4].to(dlogp.dtype).sum()
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        upstream = (dlogp, dlse, dentropy, dsmoothed if ctx.smooth else None)
        dx, dweight, dbias = backward(saved, upstream, needs, 0, smoothing_weight, ctx.transform)
        return dx, dweight, None, dbias, None, None, None, None, None, None


def head_inputs(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tokens in one dim, rows whose elements lie side by side."""
    rows = errors.check_last_dim_contiguous(x.reshape(target.numel(), x.shape[-1]))
    weight = errors.check_last_dim_contiguous(weight)
    return rows, weight, target.reshape(-1).contiguous(), None if bias is None else bias.contiguous()


def named(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The call of another op's function in an op's name, which its errors carry."""
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(re.sub(r"^tilefuse\.\w+", f"tilefuse.{name}", str(error))) from None


@op(
    module=_MODULE,
    kernels=("linear_logprobs_fwd", "linear_logprobs_bwd", "linear_logprob_stats_fwd", "merge_logprobs_fwd"),
    differentiable=("x", "weight", "bias"),
    not_repeated="views of its arguments and results",
)
def linear_logprobs(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each token's target under a linear head, without ever holding the logits.

    With ``z = cap(scale * (x w^T + bias)) / temperature``, ``cap(z) = softcap * tanh(z / softcap)`` if ``softcap > 0``:
    ``lse = log sum_j exp z_j``, ``logp = z_target - lse``, ``entropy = lse - sum_j p_j z_j`` and ``argmax``, the lowest
    index of the largest logit. Logits are accumulated and kept in float32, whatever x is; one of -inf contributes 0.

    Args:
        x: ``[..., H]`` hidden states; float32, bfloat16 or float16 (float64 on the reference backend), any strides.
        weight: ``[V, H]`` in x's dtype, as ``lm_head.weight``.
        target: ``[...]`` int32 or int64, x's shape without H. Nothing is shifted: labels come shifted.
        bias: ``[V]``, any float dtype.
        scale, softcap, temperature: of the logits, applied in this order after the bias; ``softcap=0`` caps nothing.
        ignore_index: tokens with this target are skipped: they cost no products, and NaN or inf in their x reaches
            nothing. May lie in ``[0, V)``.

    Returns:
        ``logp``, ``lse``, ``entropy`` float32 (float64 for float64) and ``argmax`` int32, all of target's shape; of
        ignored tokens 0, 0, 0 and -1.

    Gradients: for x, weight and bias, from any subset of logp, lse and entropy; in the dtypes of the arguments, only
    those that are needed. The backward makes the logits again, a block of the vocabulary at a time: a block of
    weight's gradient is finished and rounded once before the next begins. The gradient of a logit is rounded to x's
    dtype for the two products where the hardware multiplies that. Once differentiable.

    Memory beside inputs, outputs and gradients: O(T V / 4096) forward; a block of logits' gradients and T x H float32
    backward, at most 64 MiB a block on a CPU, where it has 64 ids or more (up to 131,072 tokens), and 256 MiB on a
    GPU. Never T x V, never float32 V x H.

    Deterministic. The vocabulary is summed in blocks of 4,096 in ascending order, so logp, lse, entropy and argmax are
    batch-invariant, with the same bits when shards that are cut at multiples of 4,096 are merged (``merge_logprobs``).
    Gradients are not batch-invariant.

    Raises:
        ValueError: wrong shapes, ``softcap < 0``, ``temperature <= 0``, on a CPU a target outside of ``[0, V)`` that is
            not ``ignore_index`` (on a GPU: NaN for that token). TypeError: wrong dtypes, weight not in x's dtype.

    Sources: Wijmans et al., Cut Your Losses (2411.09009), for statistics without logits; the order of the backward,
    vocabulary outermost, is this package's.
    """
    name = "linear_logprobs"
    x, weight = library.autocast(x, weight)
    check_linear(name, x, weight, target, bias)
    check_transform(name, softcap, temperature)
    args = (*head_inputs(x, weight, target, bias), None, scale, softcap, temperature, ignore_index, False)
    run = LinearLogprobs.apply if errors.needs_grad(x, weight, bias) else linear_logprobs_fwd
    logp, lse, entropy, argmax, *_ = run(*args)
    return tuple(result.view(target.shape) for result in (logp, lse, entropy, argmax))


def linear_logprob_stats(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_start: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """What one shard of the vocabulary adds to ``linear_logprobs``; ``merge_logprobs`` puts the shards together.

    A plain function, for vocabulary-parallel heads::

        stats = tilefuse.linear_logprob_stats(x, my_rows, target, vocab_start=rank * rows)
        parts = [torch.empty_like(stats) for _ in range(world)]
        dist.all_gather(parts, stats)
        logp, lse, entropy, argmax = tilefuse.merge_logprobs(parts)

    Args:
        x: ``[T, H]``, or ``[..., H]``, flattened.
        weight: ``[V_shard, H]``, the shard's rows. bias: ``[V_shard]`` or None.
        target: ``[...]`` ids in the whole vocabulary; those of other shards are expected.
        vocab_start: id of the shard's first row; a multiple of 4,096 for the bits of an undivided head.
        scale, softcap, temperature, ignore_index: as in ``linear_logprobs``.

    Returns:
        ``[T, ceil(V_shard / 4096), 5]`` float32 (float64 for float64): the largest logit of each block, the sums of
        ``exp(z - max)`` and of ``(z - max) exp(z - max)``, the target's logit (NaN where it lies elsewhere) and the
        argmax. Ignored tokens are marked by an argmax of -1.

    No gradient. Deterministic, batch-invariant. Nothing is synchronised.

    Raises:
        ValueError, TypeError: as ``linear_logprobs``; ``vocab_start < 0``. RuntimeError: an argument requires grad in
            grad mode.
    """
    name = "linear_logprob_stats"
    x, weight = library.autocast(x, weight)
    check_linear(name, x, weight, target, bias)
    check_transform(name, softcap, temperature)
    if vocab_start < 0:
        errors.value_error(name, "vocab_start", "at least 0", vocab_start)
    errors.check_not_differentiated(name, "it has no gradient", x=x, weight=weight, bias=bias)
    transform = (scale, softcap, temperature, ignore_index)
    return linear_logprob_stats_fwd(*head_inputs(x, weight, target, bias), None, vocab_start, *transform, False)


def merge_logprobs(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``linear_logprobs`` of a head whose vocabulary was divided, from each shard's ``linear_logprob_stats``.

    A plain function. The same bits as the undivided call where every cut is a multiple of 4,096, else equal to the
    accuracy of float32.

    Args:
        parts: one ``[T, blocks, 5]`` per shard, in the order of the vocabulary.

    Returns:
        ``logp``, ``lse``, ``entropy`` float32 (float64 for float64) and ``argmax`` int32, each ``[T]``. The logp of a
        target that no shard holds is NaN.

    No gradient. Deterministic, batch-invariant.

    Raises:
        ValueError: no parts, or wrong shapes. TypeError: parts of several dtypes. RuntimeError: a part requires grad in
            grad mode.
    """
    name = "merge_logprobs"
    if not parts:
        errors.value_error(name, "parts", "one tensor per shard", parts)
    first = parts[0]
    for part in parts:
        if part.dim() != 3 or part.shape[0] != first.shape[0] or part.shape[2] != STATS_COLUMNS:
            tokens = first.shape[0] if first.dim() else "T"
            errors.value_error(name, "parts", f"[{tokens}, blocks, {STATS_COLUMNS}] each", part)
        if part.dtype not in (torch.float32, torch.float64) or part.dtype != first.dtype:
            errors.type_error(name, "parts", "all float32, or all float64", part)
        errors.check_device(name, "parts", part, first, "the first")
        errors.check_not_differentiated(name, "it has no gradient", parts=part)
    logp, lse, entropy, argmax, *_ = merge_logprobs_fwd(torch.cat([*parts], 1))
    return logp, lse, entropy, argmax
