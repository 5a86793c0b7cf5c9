"""Attention of absorbed queries over the paged latent cache: ``mla_decode`` and ``mla_sparse_decode``."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import arch, errors
from ...library import kernel, op
from .checks import check_cache, check_index, rows_of

__all__ = ["mla_decode", "mla_sparse_decode"]

_MODULE = "mla/mla_decode"


def _check_common(name, q, cache, sinks, softmax_scale, kv_lora_rank, layout) -> None:
    if q.ndim != 4:
        errors.value_error(name, "q", "[B, Sq, H, R + r], absorbed", q)
    errors.check_dtype(name, "q", q, errors.FLOATS)
    row = check_cache(name, cache, kv_lora_rank, layout)
    if q.shape[-1] != row.rank + row.rope_dim:
        errors.value_error(name, "q", f"[B, Sq, H, {row.rank} + {row.rope_dim}] for this cache, absorbed", q)
    if layout == "bf16" and cache.dtype != q.dtype:
        errors.type_error(name, "cache", f"of q's dtype {errors.dtype_name(q.dtype)}", cache)
    errors.check_device(name, "cache", cache, q, "q")
    if sinks is not None:
        if tuple(sinks.shape) != (q.shape[2],):
            errors.value_error(name, "sinks", f"[{q.shape[2]}] float32", sinks)
        if sinks.dtype != torch.float32:
            errors.type_error(name, "sinks", f"[{q.shape[2]}] float32", sinks)
        errors.check_device(name, "sinks", sinks, q, "q")
    if not softmax_scale > 0:
        errors.value_error(name, "softmax_scale", "positive: (P + r) ** -0.5 * mscale ** 2", softmax_scale)


def _check_decode(q, cache, block_table, seq_lens, sinks, softmax_scale, kv_lora_rank, window, layout, num_splits):
    _check_common("mla_decode", q, cache, sinks, softmax_scale, kv_lora_rank, layout)
    batch = q.shape[0]
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        errors.value_error("mla_decode", "block_table", f"[{batch}, max_pages] int32 or int64", block_table)
    check_index("mla_decode", "block_table", block_table, tuple(block_table.shape), q, "q")
    check_index("mla_decode", "seq_lens", seq_lens, (batch,), q, "q")
    if window < -1:
        errors.value_error("mla_decode", "window", ">= -1", window)
    if num_splits < 0:
        errors.value_error("mla_decode", "num_splits", ">= 0", num_splits)


def _check_sparse(q, cache, indices, sinks, softmax_scale, kv_lora_rank, layout) -> None:
    _check_common("mla_sparse_decode", q, cache, sinks, softmax_scale, kv_lora_rank, layout)
    if indices.ndim != 3:
        errors.value_error("mla_sparse_decode", "indices", f"[{q.shape[0]}, {q.shape[1]}, topk]", indices)
    check_index("mla_sparse_decode", "indices", indices, (*q.shape[:2], indices.shape[2]), q, "q")


def _outputs(q: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(batch, queries, heads, kv_lora_rank), q.new_empty(batch, heads, queries, dtype=torch.float32)


def _fake_decode(
    q, cache, block_table, seq_lens, sinks, softmax_scale, kv_lora_rank, causal, window, layout, num_splits
):
    _check_decode(q, cache, block_table, seq_lens, sinks, softmax_scale, kv_lora_rank, window, layout, num_splits)
    return _outputs(q, kv_lora_rank)


def _fake_sparse(q, cache, indices, sinks, softmax_scale, kv_lora_rank, layout):
    _check_sparse(q, cache, indices, sinks, softmax_scale, kv_lora_rank, layout)
    return _outputs(q, kv_lora_rank)


def _too_wide(q: Tensor, kv_lora_rank: int) -> str | None:
    """A program of the Triton kernel keeps whole latent rows in shared memory."""
    if kv_lora_rank <= 512 or q.device.type != "cuda":
        return None
    if kv_lora_rank > 1024:
        return f"takes kv_lora_rank up to 1024, got {kv_lora_rank}"
    if q.dtype == torch.float32 and arch.shared_memory(q.device) < 136 * 1024:
        return f"takes kv_lora_rank up to 512 in float32 on {arch.of(q.device)}, got {kv_lora_rank}"
    return None


mla_decode_fwd = kernel(
    "mla_decode_fwd(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, Tensor? sinks, float softmax_scale, "
    "int kv_lora_rank, bool causal, int window, str layout, int num_splits) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_decode,
    when={"triton": lambda *args: _too_wide(args[0], args[6])},
)
mla_sparse_decode_fwd = kernel(
    "mla_sparse_decode_fwd(Tensor q, Tensor cache, Tensor indices, Tensor? sinks, float softmax_scale, "
    "int kv_lora_rank, str layout) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_sparse,
    when={"triton": lambda *args: _too_wide(args[0], args[5])},
)


@op(
    module=_MODULE,
    kernels=("mla_decode_fwd",),
)
def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    *,
    softmax_scale: float,
    kv_lora_rank: int = 512,
    causal: bool = True,
    window: int = -1,
    layout: str = "bf16",
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of absorbed queries over the paged latent cache.

    A cache row is the key of every head, its first R values are the value: ``s = softmax_scale * q . row``,
    ``out = softmax(s) @ rows[:, :R]``, to be multiplied by each head's value up-projection afterwards. Scores, softmax
    and sums in float32, one rounding at the end (the weights are rounded to q's dtype for the second product on a
    GPU, as in every flash kernel).

    Args:
        q: ``[B, Sq, H, R + r]`` of ``mla_absorb_query``; bfloat16, float16 or float32 (float64 on the reference
            backend), any strides. Any H and any Sq; made for Sq up to 16.
        cache: ``[pages, page_size, width]`` as in ``mla_append_kv``, of q's dtype for layout ``"bf16"``, uint8 for
            ``"fp8"`` (scales may be any float32; with one that is no power of two, keys are rounded to q's dtype).
        block_table: ``[B, max_pages]`` int32 or int64 page numbers. Entries past a sequence's last page are never
            used; an entry outside of the cache counts as a page without keys and is never read.
        seq_lens: ``[B]`` int32 or int64, keys of each sequence, this step's included. Clamped to
            ``[0, max_pages * page_size]``.
        sinks: ``[H]`` float32 logits that enter the softmax denominator only; +-inf are legal.
        softmax_scale: no default, because guessing it is this family's best-known bug:
            ``(P + r) ** -0.5 * mscale ** 2`` (192 ** -0.5 * 1.36889 ** 2 = 0.1352338 for DeepSeek-V3), not the latent
            width's ``576 ** -0.5``.
        kv_lora_rank: R.
        causal: query row j sees keys ``< seq_len - (Sq - 1 - j)``: the last row is the newest token.
        window: ``>= 0`` limits each row to that many keys before its own, on the left only.
        layout: ``"bf16"`` or ``"fp8"``.
        num_splits: parts that each sequence's keys are cut into. 0: chosen on the device from ``seq_lens``, so that
            the batch fills the GPU; then a result may depend, in its last bits, on what else is in the batch. A fixed
            value makes it batch-invariant. The CPU backend is batch-invariant either way.

    Returns:
        ``out [B, Sq, H, R]`` of q's dtype and ``lse [B, H, Sq]`` float32, natural logarithm, without the sinks. A row
        that sees no key gives 0 and -inf. NaN in pages, rows or table entries past a sequence's length has no effect.

    Not differentiable: raises where q would need a gradient. Deterministic: splits are combined in a fixed order.

    Raises:
        ValueError: wrong shapes, widths or options. TypeError: wrong dtypes.

    Source: DeepSeek-V2 (arXiv 2405.04434); the interface follows FlashMLA's ``flash_mla_with_kvcache``.
    """
    _check_decode(q, cache, block_table, seq_lens, sinks, softmax_scale, kv_lora_rank, window, layout, num_splits)
    errors.check_not_differentiated("mla_decode", "decode has no backward", q=q, sinks=sinks)
    tensors = (rows_of(q), cache.detach(), block_table.contiguous(), seq_lens.contiguous(), rows_of(sinks))
    return mla_decode_fwd(*tensors, softmax_scale, kv_lora_rank, causal, window, layout, num_splits)


@op(
    module=_MODULE,
    kernels=("mla_sparse_decode_fwd",),
)
def mla_sparse_decode(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    sinks: Tensor | None = None,
    *,
    softmax_scale: float,
    kv_lora_rank: int = 512,
    layout: str = "bf16",
) -> tuple[Tensor, Tensor]:
    """Attention of absorbed queries over listed rows of the latent cache (the sparse attention of DeepSeek-V3.2).

    As ``mla_decode``, but each query row has its own list of keys.

    Args:
        q, cache, sinks, softmax_scale, kv_lora_rank, layout: as in ``mla_decode``.
        indices: ``[B, Sq, topk]`` int32 or int64 slots ``page * page_size + row``; a slot outside of the cache, any
            negative one first of all, is no key. A slot listed twice counts twice. The order does not matter
            beyond float32 rounding; causality is the caller's.

    Returns:
        ``out [B, Sq, H, R]`` and ``lse [B, H, Sq]`` as in ``mla_decode``.

    Not differentiable: raises where q would need a gradient. Deterministic and batch-invariant.

    Raises:
        ValueError: wrong shapes, widths or options. TypeError: wrong dtypes.

    Source: DeepSeek-AI, DeepSeek-V3.2; the interface follows FlashMLA's ``indices``.
    """
    _check_sparse(q, cache, indices, sinks, softmax_scale, kv_lora_rank, layout)
    errors.check_not_differentiated("mla_sparse_decode", "decode has no backward", q=q, sinks=sinks)
    return mla_sparse_decode_fwd(
        rows_of(q), cache.detach(), rows_of(indices), rows_of(sinks), softmax_scale, kv_lora_rank, layout
    )
