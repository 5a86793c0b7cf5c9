"""The dispatch plan: slots sorted by expert, without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op

__all__ = ["moe_plan"]

_MODULE = "moe/moe_plan"


def _fake(ids, num_experts):
    slots = ids.shape[0] * ids.shape[1]
    return (
        ids.new_empty((slots,), dtype=torch.int32),
        ids.new_empty((slots,), dtype=torch.int32),
        ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


def _decode_sized(ids, num_experts):
    if num_experts > 1024 or ids.shape[0] * ids.shape[1] > 16384:
        return "takes at most 1024 experts and 16384 slots"
    return None


moe_plan_fwd = kernel(
    "moe_plan_fwd(Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
    backends=("reference", "cpu", "triton", "cuda"),
    dtypes=dict.fromkeys(("cpu", "triton", "cuda"), errors.INDEX_DTYPES),
    when={"cuda": _decode_sized},
)


@op(
    module=_MODULE,
    kernels=("moe_plan_fwd",),
    dtypes=errors.INDEX_DTYPES,
)
def moe_plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots of ``ids`` by expert, stably.

    Slot ``f = t * k + j`` is choice j of token t; a row's token is ``order // k``.

    Args:
        ids: ``[T, k]`` int32 or int64. Any id outside ``[0, num_experts)`` means *dropped*.
        num_experts: E >= 1.

    Returns:
        ``(order, inverse, offsets)``, all int32:

        * ``order [T * k]``: slots sorted by expert, inside an expert by slot; dropped slots last, by slot.
        * ``inverse [T * k]``: position of each slot in ``order``, -1 if dropped.
        * ``offsets [E + 1]``: rows ``offsets[e]:offsets[e + 1]`` belong to expert e; ``offsets[E]`` = kept slots.

    Not differentiable. Deterministic: a counting sort without atomics in the order. No host synchronisation.

    Raises:
        ValueError: ``ids`` not 2-D or with 2^31 slots or more, ``num_experts < 1``.
        TypeError: ``ids`` neither int32 nor int64.

    Example::

        order, inverse, offsets = tilefuse.moe_plan(ids, num_experts)
        rows = x[order // ids.shape[1]]          # what grouped_matmul(x, w, offsets, order // k) gathers

    Source: the dispatch of MegaBlocks (2211.15841) and vLLM's ``moe_align_block_size``, without padding.
    """
    if ids.dim() != 2:
        errors.value_error("moe_plan", "ids", "[T, k] int32 or int64", ids)
    errors.check_dtype("moe_plan", "ids", ids, errors.INDEX_DTYPES)
    if num_experts < 1:
        errors.value_error("moe_plan", "num_experts", ">= 1", num_experts)
    if ids.shape[0] * ids.shape[1] >= 2**31:
        errors.value_error("moe_plan", "ids", "[T, k] with T * k < 2^31", ids)
    return moe_plan_fwd(ids.contiguous(), num_experts)
