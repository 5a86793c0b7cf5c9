"""The relative position bias of T5, by distance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import errors
from ...library import op

__all__ = ["t5_distance_bias"]

_NAME = "t5_distance_bias"


def _check(weight: Tensor, length: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Checks the arguments; returns the number of distances that have a bucket of their own."""
    errors.check_dtype(_NAME, "weight", weight, errors.FLOATS)
    if weight.ndim != 2 or weight.shape[0] != num_buckets:
        errors.value_error(_NAME, "weight", f"[{num_buckets}, H]", weight)
    if length < 1:
        errors.value_error(_NAME, "length", "at least 1", length)
    exact = num_buckets // (4 if bidirectional else 2)
    if exact < 1:
        errors.value_error(_NAME, "num_buckets", f"at least {4 if bidirectional else 2}", num_buckets)
    if max_distance <= exact:
        errors.value_error(_NAME, "max_distance", f"above {exact}", max_distance)
    return exact


@op(
    module="attention/t5_distance_bias",
    kernels=(),
    differentiable=("weight",),
)
def t5_distance_bias(
    weight: Tensor, length: int, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """T5's relative position bias of every distance: ``bias[h, query - key + length - 1]``, O(H length) memory.

    ``bias[h, i] = weight[bucket(i - (length - 1)), h]``. Half of the buckets (of each sign, where ``bidirectional``)
    hold one distance each, the others grow logarithmically up to ``max_distance``; what is further shares the last.
    Where not ``bidirectional``, later keys share the bucket of distance 0. The arithmetic is Hugging Face's, in
    float32.

    Args:
        weight: ``[num_buckets, H]``, ``relative_attention_bias.weight`` of a checkpoint; float32, bfloat16, float16 or
            float64, any strides.
        length: of the longer sequence, at least 1.
        bidirectional: True in encoders, False in decoders.
        num_buckets: number of buckets, at least 4 (2 where not bidirectional).
        max_distance: distance from which on all share a bucket.

    Returns:
        ``[H, 2 * length - 1]`` in weight's dtype. ``bias[:, (q - k) + length - 1]`` is Hugging Face's ``[H, Sq, Sk]``.

    Gradient: for weight. Deterministic. ``window_attention`` takes it as ``distance_bias``; T5 itself does not scale
    its scores: attention with this bias takes ``scale=1.0``.

    Raises:
        ValueError: a weight that is not ``[num_buckets, H]``, a length below 1, too few buckets, a ``max_distance``
            that is not above the distances with buckets of their own.
        TypeError: weight is not a float tensor.

    Example::

        bias = tilefuse.t5_distance_bias(torch.randn(32, 8), 512)  # [8, 1023]
        q, k, v = (torch.randn(1, 512, 8, 64) for _ in range(3))
        out, _ = tilefuse.window_attention(q, k, v, distance_bias=bias, scale=1.0)

    Source: Raffel et al., T5 (arXiv 1910.10683).
    """
    exact = _check(weight, length, bidirectional, num_buckets, max_distance)
    # of the key, seen from the query
    ahead = length - 1 - torch.arange(2 * length - 1, device=weight.device)
    if bidirectional:
        side, distance = num_buckets // 2, ahead.abs()
        first = (ahead > 0) * side
    else:
        side, distance = num_buckets, (-ahead).clamp(min=0)
        first = torch.zeros_like(ahead)
    # distance 0 has a bucket of its own, and no logarithm
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (side - exact)
    far = (exact + growth.to(torch.long)).clamp(max=side - 1)
    bucket = first + torch.where(distance < exact, distance, far)
    # its backward adds in a fixed order, that of indexing does not
    return F.embedding(bucket, weight).t().contiguous()
