"""Attention over a paged key/value cache: decoding and chunked prefill, with windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op
from .checks import check_heads, check_index, check_scale, check_softcap, check_window
from .window_attention import lse_dtype

__all__ = ["paged_attention"]

_MODULE = "attention/paged_attention"


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, sq, heads = q.shape[:3]
    return q.new_empty(batch, sq, heads, v_cache.shape[-1]), q.new_empty(batch, heads, sq, dtype=lse_dtype(q))


paged_attention_fwd = kernel(
    "paged_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? sinks, "
    "Tensor? alibi_slopes, SymInt left, SymInt right, float scale, float softcap, float k_scale, float v_scale) "
    "-> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
)


@op(
    module=_MODULE,
    kernels=("paged_attention_fwd",),
)
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    window: Sequence[int] = (-1, 0),
    scale: float | None = None,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the last Sq tokens of each sequence over its pages of a key/value cache.

    Query j of sequence b stands at position ``p = seq_lens[b] - Sq + j`` (its own key is in the cache already) and
    sees positions ``p - left .. p + right`` below ``seq_lens[b]``. Only that span is read, in fixed chunks that run
    in parallel and are merged by their log-sum-exp (split-KV), so the work per token is O(window).

    Args:
        q: ``[B, Sq, Hq, D]`` float32, bfloat16 or float16.
        k_cache: ``[pages, page_size, Hkv, D]`` in q's dtype or ``float8_e4m3fn``; any page size.
        v_cache: ``[pages, page_size, Hkv, Dv]``, like k_cache.
        block_table: ``[B, max_pages]`` int32 or int64: page of positions ``i * page_size ..``. Entries past a
            sequence's length are never dereferenced; one outside of the cache hides its keys.
        seq_lens: ``[B]`` int32 or int64, keys of each sequence with the queries' own; clamped to
            ``max_pages * page_size``.
        sinks: ``[Hq]`` learned logits that enter the denominator only.
        alibi_slopes: ``[Hq]`` float32, bias ``-slope * |p - j|``.
        window: ``(left, right)`` as in ``window_attention``; the default is causal.
        scale: None is ``D ** -0.5``.
        softcap: 0 is off; applied after scale, before ALiBi.
        k_scale, v_scale: what a stored float8 value is multiplied with; 1 for other caches.

    Returns:
        ``out [B, Sq, Hq, Dv]`` in q's dtype and ``lse [B, Hq, Sq]`` float32, natural log, sinks included. A row
        without a visible key has out 0 and lse -inf (the sink's logit with sinks).

    Not differentiable. Deterministic and batch-invariant, on a GPU among calls with block tables of one width: one that
    is no wider than a chunk needs no merge, which rounds lse, and out with sinks, once more. Rules: PagedAttention
    (arXiv:2309.06180), split over keys as in Flash-Decoding, the window of FlashAttention-2.

    Raises:
        ValueError: shapes, window, scale, softcap, or scales with a cache that is not float8.
        TypeError: dtypes.
        RuntimeError: a float argument requires grad.
    """
    name = "paged_attention"
    if q.dim() != 4:
        errors.value_error(name, "q", "[B, Sq, Hq, D]", q)
    errors.check_dtype(name, "q", q, errors.FLOATS)
    if q.shape[-1] < 1:
        errors.value_error(name, "q", "of a head dim >= 1", q)
    caches = (q.dtype, torch.float8_e4m3fn)
    for arg, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[1] < 1 or cache.shape[2] < 1 or cache.shape[3] < 1:
            errors.value_error(name, arg, "[pages, page_size, Hkv, D]", cache)
        errors.check_dtype(name, arg, cache, caches)
        errors.check_device(name, arg, cache, q, "q")
    if k_cache.shape[-1] != q.shape[-1]:
        errors.value_error(name, "k_cache", f"of q's head dim {q.shape[-1]}", k_cache)
    if q.shape[2] % k_cache.shape[2]:
        errors.value_error(name, "k_cache", f"of a head count that divides q's {q.shape[2]}", k_cache)
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        errors.value_error(name, "v_cache", f"{[*k_cache.shape[:-1], 'Dv']} like k_cache", v_cache)
    if v_cache.dtype != k_cache.dtype:
        errors.type_error(name, "v_cache", f"{errors.dtype_name(k_cache.dtype)} like k_cache", v_cache)
    check_index(name, "block_table", block_table, q, 2, "[B, max_pages]")
    check_index(name, "seq_lens", seq_lens, q, 1, "[B]")
    for arg, tensor in (("block_table", block_table), ("seq_lens", seq_lens)):
        if tensor.shape[0] != q.shape[0]:
            errors.value_error(name, arg, f"of q's batch {q.shape[0]}", tensor)
    check_heads(name, "sinks", sinks, q, dtypes=errors.FLOATS)
    check_heads(name, "alibi_slopes", alibi_slopes, q, dtypes=(torch.float32, torch.float64))
    left, right = check_window(name, window)
    scale, softcap = check_scale(name, scale, q), check_softcap(name, softcap)
    for arg, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not 0 < value < float("inf"):
            errors.value_error(name, arg, "finite and > 0", value)
        if value != 1 and k_cache.dtype != torch.float8_e4m3fn:
            errors.value_error(name, arg, "1 unless the cache is float8_e4m3fn", value)
    errors.check_not_differentiated(
        name, "it has no backward", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks, alibi_slopes=alibi_slopes
    )
    tensors = (q, k_cache, v_cache, block_table, seq_lens, sinks, alibi_slopes)
    tensors = (None if x is None else errors.check_last_dim_contiguous(x) for x in tensors)
    return paged_attention_fwd(*tensors, left, right, scale, softcap, float(k_scale), float(v_scale))
