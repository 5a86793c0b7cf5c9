"""Paged latent rows to one packed tensor, for chunked prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op
from .checks import check_cache, check_index

__all__ = ["mla_gather_kv"]

_NAME = "mla_gather_kv"
_MODULE = "mla/mla_gather_kv"


def _check(cache, block_table, cu_seqlens, total_tokens, kv_lora_rank, layout, out_dtype):
    row = check_cache(_NAME, cache, kv_lora_rank, layout)
    if block_table.ndim != 2:
        errors.value_error(_NAME, "block_table", "[B, max_pages] int32 or int64", block_table)
    check_index(_NAME, "block_table", block_table, tuple(block_table.shape), cache, "cache")
    check_index(_NAME, "cu_seqlens", cu_seqlens, (block_table.shape[0] + 1,), cache, "cache")
    if total_tokens < 0:
        errors.value_error(_NAME, "total_tokens", ">= 0", total_tokens)
    if out_dtype not in errors.FLOATS:
        errors.type_error(_NAME, "out_dtype", "a floating dtype", out_dtype)
    return row


def _fake(cache, block_table, cu_seqlens, total_tokens, kv_lora_rank, layout, out_dtype):
    row = _check(cache, block_table, cu_seqlens, total_tokens, kv_lora_rank, layout, out_dtype)
    return cache.new_empty(total_tokens, row.rank + row.rope_dim, dtype=out_dtype)


def _not_float64(cache, block_table, cu_seqlens, total_tokens, kv_lora_rank, layout, out_dtype):
    return "does not write float64" if out_dtype == torch.float64 else None


_CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
mla_gather_kv_fwd = kernel(
    "mla_gather_kv_fwd(Tensor cache, Tensor block_table, Tensor cu_seqlens, SymInt total_tokens, int kv_lora_rank, "
    "str layout, ScalarType out_dtype) -> Tensor",
    module=_MODULE,
    fake=_fake,
    dtypes={"cpu": _CACHES, "triton": _CACHES},
    when={"cpu": _not_float64, "triton": _not_float64},
)


@op(
    module=_MODULE,
    kernels=("mla_gather_kv_fwd",),
)
def mla_gather_kv(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    *,
    total_tokens: int,
    kv_lora_rank: int = 512,
    layout: str = "bf16",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The first tokens of each sequence out of the paged cache, packed and dequantised.

    Row ``cu_seqlens[b] + i`` of the result is token ``i`` of sequence b, ``cache[block_table[b, i // page_size],
    i % page_size]``; codes times scales in float32, one rounding to ``out_dtype``. Chunked prefill is this, then
    ``mla_expand_kv``, ``mla_attention(causal=False)`` and ``merge_attention``.

    Args:
        cache: ``[pages, page_size, width]`` as in ``mla_append_kv``.
        block_table: ``[B, max_pages]`` int32 or int64 page numbers. Entries past a sequence's end are never read from
            the cache.
        cu_seqlens: ``[B + 1]`` int32 or int64, where each sequence's rows begin in the result.
        total_tokens: rows of the result; given, because reading ``cu_seqlens[-1]`` would wait for the device.
        kv_lora_rank: R.
        layout: ``"bf16"`` or ``"fp8"``.
        out_dtype: dtype of the result.

    Returns:
        ``[total_tokens, R + r]``. Rows outside of ``cu_seqlens`` and rows whose page lies outside of the cache are 0.

    Not differentiable (the cache is data). Deterministic, batch-invariant.

    Raises:
        ValueError: wrong shapes, layout or widths. TypeError: wrong dtypes.

    Source: the chunked-context prefill of vLLM's latent attention (``gather_cache``).
    """
    _check(cache, block_table, cu_seqlens, total_tokens, kv_lora_rank, layout, out_dtype)
    return mla_gather_kv_fwd(
        cache.detach(), block_table.contiguous(), cu_seqlens.contiguous(), total_tokens, kv_lora_rank, layout, out_dtype
    )
