"""Rotary embedding of queries and keys, and the write of keys and values into a paged cache, in one launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op
from ...overlap import check_in_place
from .rope import check_rope, contiguous_rows

__all__ = ["rope_append_kv"]

_MODULE = "rope/rope_append_kv"
_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32)


def _check(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, rotary_offset, k_scale, v_scale):
    name = "rope_append_kv"
    check_rope(name, "q", q, k, cos, sin, positions, None, rotary_offset)
    if v.ndim != k.ndim or v.shape[:-1] != k.shape[:-1]:
        errors.value_error(name, "v", f"of k's shape but for the head dim, {[*k.shape]}", v)
    if v.dtype != q.dtype:
        errors.type_error(name, "v", f"of q's dtype {errors.dtype_name(q.dtype)}", v)
    if slot_mapping.shape != q.shape[:-2]:
        errors.value_error(name, "slot_mapping", f"{[*q.shape[:-2]]} int32 or int64, one slot per token", slot_mapping)
    if slot_mapping.dtype not in errors.INDEX_DTYPES:
        errors.type_error(name, "slot_mapping", f"{[*q.shape[:-2]]} int32 or int64", slot_mapping)
    for arg, cache, x, scale in (("k_cache", k_cache, k, k_scale), ("v_cache", v_cache, v, v_scale)):
        if cache.ndim != 4 or cache.shape[2:] != x.shape[-2:]:
            errors.value_error(name, arg, f"[pages, page_size, {x.shape[-2]}, {x.shape[-1]}]", cache)
        if cache.dtype not in _CACHE_DTYPES and not (cache.dtype == q.dtype == torch.float64):
            errors.check_dtype(name, arg, cache, _CACHE_DTYPES)
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            errors.value_error(name, arg, "a cache with a contiguous last dim", f"strides {[*cache.stride()]}")
        # comparisons, which torch.compile can trace for a float that is an input of the graph
        if not 0 < scale < math.inf:
            errors.value_error(name, arg.replace("cache", "scale"), "positive and finite", scale)
        if scale != 1.0 and cache.dtype != torch.float8_e4m3fn:
            errors.value_error(name, arg.replace("cache", "scale"), "1 unless the cache is float8_e4m3fn", scale)
    if v_cache.shape[:2] != k_cache.shape[:2]:
        errors.value_error(name, "v_cache", f"of k_cache's pages and page size {[*k_cache.shape[:2]]}", v_cache)
    if v_cache.dtype != k_cache.dtype:
        errors.type_error(name, "v_cache", f"of k_cache's dtype {errors.dtype_name(k_cache.dtype)}", v_cache)
    for arg, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slot_mapping", slot_mapping)):
        if tensor.device != q.device:
            errors.check_device(name, arg, tensor, q, "q")


def _fake(q, k, v, cos, sin, positions, k_cache, v_cache, slots, _interleaved, rotary_offset, k_scale, v_scale):
    _check(q, k, v, cos, sin, positions, k_cache, v_cache, slots, rotary_offset, k_scale, v_scale)
    return q.new_empty(q.shape)


rope_append_kv_fwd = kernel(
    "rope_append_kv_fwd(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slot_mapping, bool interleaved, int rotary_offset, float k_scale, float v_scale)"
    " -> Tensor",
    module=_MODULE,
    fake=_fake,
    backends=("reference", "cpu", "triton", "cuda"),
)


@op(
    module=_MODULE,
    kernels=("rope_append_kv_fwd",),
    mutates=("k_cache", "v_cache"),
)
def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    rotary_offset: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Rotates q and k, writes k and v into a paged cache, returns the rotated q.

    ``k_cache[slot // page_size, slot % page_size] = rope(k) / k_scale`` and the same for v without the rotation. k is
    rotated in float32 and rounded once, straight to the cache's dtype: with an FP8 cache this is not always the
    result of rounding to bfloat16 first (one code apart at most).

    Args:
        q, k: ``[T, Hq, D]`` and ``[T, Hkv, D]`` (or ``[B, S, ..]``), float32, bfloat16 or float16, any strides.
        v: ``[T, Hkv, Dv]`` of the same dtype.
        cos, sin, interleaved, rotary_offset: as in ``rope``.
        positions: ``[T]`` (``[B, S]``) int32 or int64.
        k_cache, v_cache: ``[pages, page_size, Hkv, D]`` and ``[.., Dv]``, written in place; any page size, any
            strides with a contiguous last dim, and no memory in common. bfloat16, float16, float32 (scales must be 1),
            or float8_e4m3fn.
        slot_mapping: ``[T]`` (``[B, S]``) int32 or int64, ``page * page_size + offset``. A negative slot is skipped: q
            is rotated, nothing is written. Slots must be distinct: of two tokens for one slot either may win.
        k_scale, v_scale: dequantisation scales of an FP8 cache. A stored code is ``x / scale`` (correctly rounded
            division) clamped to +-448 and rounded to nearest even; NaN stays NaN.

    Returns:
        The rotated q, contiguous, of q's dtype.

    Not differentiable. Deterministic where slots are distinct, and batch-invariant.

    Raises:
        ValueError: wrong shapes, scales or combinations; on CPU also a position outside of the table or a slot past
            the cache, before anything is written. (A GPU clamps the position and skips the slot.)
        TypeError: wrong dtypes.
        RuntimeError: an input requires grad and grad mode is on.

    Source: the cache layout of vLLM's PagedAttention (arXiv 2309.06180).
    """
    _check(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, rotary_offset, k_scale, v_scale)
    check_in_place("rope_append_kv", k_cache=k_cache, v_cache=v_cache)
    errors.check_not_differentiated("rope_append_kv", "has no gradient", q=q, k=k, v=v)
    return rope_append_kv_fwd(
        contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), contiguous_rows(cos), contiguous_rows(sin),
        positions, k_cache, v_cache, slot_mapping, interleaved, rotary_offset, k_scale, v_scale,
    )  # fmt: skip
