"""Argument checks shared by the ops of this family."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import errors

__all__: list[str] = []


def check_qkv(
    op: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], or without B when packed."""
    qn, kn, vn = names
    dims, shape = (3, "[T, H, D]") if packed else (4, "[B, S, H, D]")
    for name, tensor in zip(names, (q, k, v)):
        if tensor.dim() != dims:
            errors.value_error(op, name, shape, tensor)
    errors.check_dtype(op, qn, q, errors.FLOATS)
    for name, tensor in ((kn, k), (vn, v)):
        if tensor.dtype != q.dtype:
            errors.type_error(op, name, f"{errors.dtype_name(q.dtype)} like {qn}", tensor)
        errors.check_device(op, name, tensor, q, qn)
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        errors.value_error(op, qn if q.shape[-1] < 1 else vn, "of a head dim >= 1", q if q.shape[-1] < 1 else v)
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        batch = "" if packed else f"{q.shape[0]}, "
        errors.value_error(op, kn, f"[{batch}Sk, Hkv, {q.shape[-1]}] like {qn}", k)
    if v.shape[:-1] != k.shape[:-1]:
        errors.value_error(op, vn, f"{[*k.shape[:-1], 'Dv']} like {kn}", v)
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        errors.value_error(op, kn, f"of a head count that divides {qn}'s {q.shape[-2]}", k)


def check_heads(op: str, name: str, tensor: Tensor | None, q: Tensor, *, dtypes: tuple) -> None:
    """A per-query-head vector [Hq]."""
    if tensor is None:
        return
    if tensor.dim() != 1 or tensor.shape[0] != q.shape[-2]:
        errors.value_error(op, name, f"[{q.shape[-2]}], one value per query head", tensor)
    errors.check_dtype(op, name, tensor, dtypes)
    errors.check_device(op, name, tensor, q, "q")


def check_distance_bias(op: str, bias: Tensor | None, q: Tensor) -> None:
    """[Hq, L] float32, L odd."""
    if bias is None:
        return
    if bias.dim() != 2 or bias.shape[0] != q.shape[-2] or bias.shape[1] % 2 != 1:
        errors.value_error(op, "distance_bias", f"[{q.shape[-2]}, L] with L odd", bias)
    errors.check_dtype(op, "distance_bias", bias, (torch.float32, torch.float64))
    errors.check_device(op, "distance_bias", bias, q, "q")


def check_index(op: str, name: str, tensor: Tensor, q: Tensor, dim: int, shape: str) -> None:
    if tensor.dim() != dim:
        errors.value_error(op, name, shape, tensor)
    errors.check_dtype(op, name, tensor, errors.INDEX_DTYPES)
    errors.check_device(op, name, tensor, q, "q")


def check_window(op: str, window: Sequence[int]) -> tuple[int, int]:
    if len(window) != 2 or window[0] < -1 or window[1] < -1:
        errors.value_error(op, "window", "(left, right), each >= 0 or -1 for unbounded", tuple(window))
    return window[0], window[1]


def check_scale(op: str, scale: float | None, q: Tensor) -> float:
    """None is D ** -0.5."""
    if scale is None:
        return q.shape[-1] ** -0.5
    # comparisons, which torch.compile can trace for a float that is an input of the graph; math.isfinite is not
    if not abs(scale) < math.inf:
        errors.value_error(op, "scale", "finite", scale)
    return float(scale)


def check_softcap(op: str, softcap: float) -> float:
    if not 0 <= softcap < math.inf:
        errors.value_error(op, "softcap", "finite and >= 0 (0 is off)", softcap)
    return float(softcap)


def check_key_mask(op: str, key_mask: Tensor | None, k: Tensor) -> None:
    """bool [B, Sk], False hides a key."""
    if key_mask is None:
        return
    if key_mask.shape != k.shape[:2]:
        errors.value_error(op, "key_mask", f"{[*k.shape[:2]]} bool", key_mask)
    errors.check_dtype(op, "key_mask", key_mask, (torch.bool,))
    errors.check_device(op, "key_mask", key_mask, k, "k")
