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


def check_target(name: str, target: Tensor, shape: torch.Size, like: Tensor, like_arg: str) -> None:
    if target.shape != shape:
        errors.value_error(name, "target", f"{[*shape]} int32 or int64", target)
    errors.check_dtype(name, "target", target, errors.INDEX_DTYPES)
    errors.check_device(name, "target", target, like, like_arg)


def check_head(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor | None = None, prefix: str = ""
) -> None:
    """Hidden states, the weight of a head and its bias; ``prefix`` of their names for a second one, beside ``like``."""
    if x.dim() < 1:
        errors.value_error(name, f"{prefix}x", "[..., H]", x)
    errors.check_dtype(name, f"{prefix}x", x, errors.FLOATS)
    if like is not None:
        errors.check_device(name, f"{prefix}x", x, like, "x")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        errors.value_error(name, f"{prefix}weight", f"[V, {x.shape[-1]}] with V >= 1", weight)
    if weight.dtype != x.dtype:
        errors.type_error(name, f"{prefix}weight", f"of {prefix}x's dtype {errors.dtype_name(x.dtype)}", weight)
    errors.check_device(name, f"{prefix}weight", weight, x, f"{prefix}x")
    if bias is not None:
        check_vocabulary(name, f"{prefix}bias", bias, weight.shape[0], x, f"{prefix}x")


def check_linear(name: str, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """A head, and one target per hidden state."""
    check_head(name, x, weight, bias)
    check_target(name, target, x.shape[:-1], x, "x")


def check_logits(name: str, logits: Tensor, target: Tensor) -> None:
    """Logits over a vocabulary and one target per row of them."""
    if logits.dim() < 1 or logits.shape[-1] == 0:
        errors.value_error(name, "logits", "[..., V] with V >= 1", logits)
    errors.check_dtype(name, "logits", logits, errors.FLOATS)
    check_target(name, target, logits.shape[:-1], logits, "logits")


def check_vocabulary(name: str, arg: str, values: Tensor, vocabulary: int, like: Tensor, like_arg: str) -> None:
    """One float per token of the vocabulary."""
    if values.dim() != 1 or values.shape[0] != vocabulary:
        errors.value_error(name, arg, f"[{vocabulary}]", values)
    errors.check_dtype(name, arg, values, errors.FLOATS)
    errors.check_device(name, arg, values, like, like_arg)


def check_transform(name: str, softcap: float, temperature: float = 1.0) -> None:
    if not softcap >= 0:
        errors.value_error(name, "softcap", "at least 0 (0: none)", softcap)
    if not temperature > 0:
        errors.value_error(name, "temperature", "above 0", temperature)


def check_beta(name: str, beta: float) -> None:
    if not 0 <= beta <= 1:
        errors.value_error(name, "beta", "in [0, 1]", beta)


def places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence of each packed token ``[T]`` int64 (0 outside of all) and whether it is inside of one."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    inside = (sequence >= 0) & (sequence < cu_seqlens.shape[0] - 1)
    return torch.where(inside, sequence, 0), inside
