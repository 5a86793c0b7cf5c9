"""Targets of multi-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from .checks import check_cu_seqlens, places

__all__ = ["mtp_targets"]


def mtp_targets(target: Tensor, depth: int, cu_seqlens: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
    """What each prediction head of multi-token prediction has to predict.

    Row k is the target ``k + 1`` further: ``out[k, t] = target[t + k + 1]`` inside of a document, and ``ignore_index``
    at its last ``k + 1`` tokens: no head predicts across a document's end. An ignored target stays ignored wherever it
    moves.

    The main loss and those of all heads are then one call over hidden states stacked to ``[(1 + depth) * T, H]``, which
    reads the weight once and rounds its gradient once: ``tilefuse.nn.MTPLoss``.

    Args:
        target: ``[T]``, one document or packed ones, or ``[B, S]``, a document in each row; int32 or int64, the targets
            of the main head (labels as the loss takes them, already shifted).
        depth: number of heads D, 0 or more.
        cu_seqlens: ``[B + 1]`` int32 or int64, the documents' bounds in ``[T]``. Tokens outside of them are ignored.
        ignore_index: what marks a token without target.

    Returns:
        ``[depth, T]`` or ``[depth, B, S]`` in target's dtype. Nothing is read on the host. No gradient.

    Raises:
        ValueError: a wrong shape, a negative depth, ``cu_seqlens`` with ``[B, S]``. TypeError: a wrong dtype.

    Example::

        heads = tilefuse.mtp_targets(target, 2, cu_seqlens)

    Source: DeepSeek-V3 (2412.19437) section 2.2.
    """
    name = "mtp_targets"
    if target.dim() not in (1, 2):
        errors.value_error(name, "target", "[T] or [B, S]", target)
    errors.check_dtype(name, "target", target, errors.INDEX_DTYPES)
    if depth < 0:
        errors.value_error(name, "depth", "at least 0", depth)
    length = target.shape[-1]
    at = torch.arange(length, device=target.device)
    if cu_seqlens is None:
        inside, end = None, length
    else:
        check_cu_seqlens(name, cu_seqlens, target, "target")
        sequence, inside = places(cu_seqlens, length)
        end = cu_seqlens.long()[sequence + 1] if cu_seqlens.shape[0] > 1 else at
    further = at + torch.arange(1, depth + 1, device=target.device)[:, None]  # [depth, T]
    shown = further < end
    if inside is not None:
        shown = shown & inside
    if length == 0:
        return target.new_empty((depth, *target.shape))
    moved = target[..., further.clamp(max=length - 1)]  # [.., depth, T]
    if target.dim() == 2:
        moved = moved.movedim(1, 0)
        shown = shown[:, None]
    return torch.where(shown, moved, ignore_index).to(target.dtype)
