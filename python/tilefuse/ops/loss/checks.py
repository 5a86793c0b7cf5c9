"""Argument checks, and the place of a packed token, that the losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors

__all__: list[str] = []


def check_cu_seqlens(name: str, cu_seqlens: Tensor, like: Tensor, like_arg: str) -> None:
    """Bounds of packed documents, for a tensor ``[T]``."""
    if like.dim() != 1:
        errors.value_error(name, "cu_seqlens", f"None unless {like_arg} is packed [T]", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        errors.value_error(name, "cu_seqlens", "[B + 1] int32 or int64", cu_seqlens)
    errors.check_dtype(name, "cu_seqlens", cu_seqlens, errors.INDEX_DTYPES)
    errors.check_device(name, "cu_seqlens", cu_seqlens, like, like_arg)


def check_like(name: str, arg: str, tensor: Tensor, like: Tensor, like_arg: str) -> None:
    """A float tensor of the shape and on the device of another."""
    if tensor.shape != like.shape:
        errors.value_error(name, arg, f"of {like_arg}'s shape {[*like.shape]}", tensor)
    errors.check_dtype(name, arg, tensor, errors.FLOATS)
    errors.check_device(name, arg, tensor, like, like_arg)


def places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence of each packed token ``[T]`` int64 (0 outside of all) and whether it is inside of one."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    inside = (sequence >= 0) & (sequence < cu_seqlens.shape[0] - 1)
    return torch.where(inside, sequence, 0), inside
