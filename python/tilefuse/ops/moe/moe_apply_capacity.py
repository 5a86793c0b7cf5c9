"""Drops what exceeds an expert's capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import op
from .moe_plan import moe_plan_fwd

__all__ = ["moe_apply_capacity"]

_MODULE = "moe/moe_apply_capacity"
POLICIES = ("position", "weight")


def _check(ids: Tensor, weights: Tensor, num_experts: int, capacity: int, policy: str) -> None:
    name = "moe_apply_capacity"
    if ids.dim() != 2 or ids.shape[1] == 0:
        errors.value_error(name, "ids", "[T, k] int32 or int64 with k >= 1", ids)
    errors.check_dtype(name, "ids", ids, errors.INDEX_DTYPES)
    if weights.shape != ids.shape:
        errors.value_error(name, "weights", f"{[*ids.shape]} float32", weights)
    if not weights.dtype.is_floating_point:
        errors.type_error(name, "weights", f"{[*ids.shape]} float32", weights)
    errors.check_device(name, "weights", weights, ids, "ids")
    if num_experts < 1:
        errors.value_error(name, "num_experts", ">= 1", num_experts)
    if capacity < 0:
        errors.value_error(name, "capacity", ">= 0", capacity)
    if policy not in POLICIES:
        errors.value_error(name, "policy", f"one of {', '.join(POLICIES)}", policy)


@op(
    module=_MODULE,
    kernels=("moe_plan_fwd",),
    differentiable=("weights",),
    not_repeated="PyTorch works on what the kernel made",
)
def moe_apply_capacity(
    ids: Tensor, weights: Tensor, num_experts: int, capacity: int, *, policy: str = "position"
) -> tuple[Tensor, Tensor]:
    """Keeps at most ``capacity`` slots per expert.

    Args:
        ids: ``[T, k]`` int32 or int64; ids outside ``[0, num_experts)`` are dropped already and take no place.
        weights: ``[T, k]``, any float dtype.
        num_experts: E.
        capacity: slots per expert, usually ``ceil(capacity_factor * T * k / E)``; 0 drops everything.
        policy: ``"position"`` keeps all first choices of every token before any second choice, in token order
            (GShard, Switch); ``"weight"`` keeps the largest weights, ties by lower flat slot ``t * k + j``, NaN last.

    Returns:
        ``(ids, weights)``: ``[T, k]`` int32 with -1 where dropped, ``[T, k]`` of weights' dtype with 0 there. Weights
        are not renormalised.

    Gradients: for ``weights``, to the kept ones. Deterministic. No host synchronisation.

    Raises:
        ValueError: a wrong shape, a negative capacity, an unknown policy. TypeError: a wrong dtype.

    Example::

        ids, weights = tilefuse.moe_apply_capacity(ids, weights, 64, capacity=math.ceil(1.25 * tokens * 2 / 64))

    Sources: GShard (2006.16668), Switch (2101.03961).
    """
    _check(ids, weights, num_experts, capacity, policy)
    tokens, top_k = ids.shape
    if policy == "position":
        # slots in the order in which they claim places: choice by choice, then by token
        claims = ids.T.contiguous()
        places = _places(claims, num_experts).view(top_k, tokens).T.contiguous()
    else:
        flat = ids.flatten()
        key = weights.detach().flatten().float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        first = key.sort(descending=True, stable=True).indices
        places = torch.empty_like(first).scatter_(0, first, _places(flat[first][None], num_experts))
        places = places.view(tokens, top_k)
    kept = (places >= 0) & (places < capacity)
    return torch.where(kept, ids, -1).int(), torch.where(kept, weights, torch.zeros_like(weights))


def _places(claims: Tensor, num_experts: int) -> Tensor:
    """How many earlier claims on the same expert there are, flat; -1 for a dropped id."""
    _, inverse, offsets = moe_plan_fwd(claims, num_experts)
    flat = claims.flatten().long()
    dropped = inverse < 0
    start = offsets.long()[flat.masked_fill(dropped, 0)]
    return (inverse.long() - start).masked_fill(dropped, -1)
