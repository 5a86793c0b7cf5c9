"""Attention over lists of blocks: BigBird, Sparse Transformer, any user mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_index, check_key_mask, check_qkv, check_scale
from .window_attention import lse_dtype

__all__ = ["block_sparse_attention"]

_MODULE = "attention/block_sparse_attention"
_OPTIONS = "Tensor row_offsets, Tensor col_index, Tensor? key_mask, SymInt block_size, bool causal, float scale"


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, sq, heads, _dim = q.shape
    return q.new_empty(batch, sq, heads, v.shape[-1]), q.new_empty(batch, heads, sq, dtype=lse_dtype(q))


def _bwd_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


block_sparse_attention_fwd = kernel(
    f"block_sparse_attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fwd_fake,
)
block_sparse_attention_bwd = kernel(
    "block_sparse_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_bwd_fake,
)


@gradient_of(block_sparse_attention_fwd)
class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention_fwd(q, k, v, *options)
        *lists, ctx.block_size, ctx.causal, ctx.scale = options
        ctx.save_for_backward(q, k, v, out, lse, *lists)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 9
        q, k, v, out, lse, *lists = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else errors.check_last_dim_contiguous(dout)
        grads = block_sparse_attention_bwd(dout, dlse, q, k, v, out, lse, *lists, ctx.block_size, ctx.causal, ctx.scale)
        return *grads, *(None,) * 6


@op(
    module=_MODULE,
    kernels=("block_sparse_attention_fwd", "block_sparse_attention_bwd"),
    differentiable=("q", "k", "v"),
)
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    col_index: Tensor,
    key_mask: Tensor | None = None,
    *,
    block_size: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which each block of queries sees the blocks of keys on its list; O(listed blocks).

    Block i of queries (tokens ``i * block_size ..``) attends to blocks
    ``col_index[row_offsets[b, h, i] : row_offsets[b, h, i + 1]]`` of keys, in one softmax. A block that is listed
    twice counts twice (BigBird's evaluation mode needs that); lists need no order. ``tilefuse.block_pattern`` builds
    them.

    Args:
        q: ``[B, Sq, Hq, D]`` float32, bfloat16, float16 (float64 on the reference backend).
        k: ``[B, Sk, Hkv, D]``; query head h reads head ``h // (Hq // Hkv)``.
        v: ``[B, Sk, Hkv, Dv]``.
        row_offsets: ``[B or 1, Hq or 1, ceil(Sq / block_size) + 1]`` int32 or int64, absolute offsets into
            col_index, non-decreasing over the flattened tensor (as CSR is: two heads that share lists share them by
            a dimension of 1 or by ``expand``). Offsets past col_index are clamped.
        col_index: ``[nnz]`` int32 or int64; a block that does not exist is skipped.
        key_mask: ``[B, Sk]`` bool, False hides a key from everybody.
        block_size: tokens of a block, any size >= 1; the last blocks may be ragged. 64 and 128 are fastest.
        causal: also hides keys after the query, bottom-right aligned: key j is seen if ``j <= i + Sk - Sq``.
        scale: None is ``D ** -0.5``.

    Returns:
        ``out [B, Sq, Hq, Dv]`` in q's dtype and ``lse [B, Hq, Sq]`` float32, natural log. A row without a visible
        key has out 0 and lse -inf. NaN in hidden keys and unlisted blocks never reaches an output.

    Differentiable once, in q, k and v, through out and lse. The backward walks the lists for q and the transposed
    lists for k and v, without atomics: deterministic and batch-invariant. Rules: Sparse Transformer
    (arXiv:1904.10509), BigBird (arXiv:2007.14062).

    Raises:
        ValueError: shapes, block_size or scale.
        TypeError: dtypes.
    """
    name = "block_sparse_attention"
    check_qkv(name, q, k, v, packed=False)
    if block_size < 1:
        errors.value_error(name, "block_size", ">= 1", block_size)
    rows = -(-q.shape[1] // block_size)
    check_index(name, "row_offsets", row_offsets, q, 3, "[B or 1, H or 1, blocks of q + 1]")
    fits = row_offsets.shape[0] in (1, q.shape[0]) and row_offsets.shape[1] in (1, q.shape[2])
    if not fits or row_offsets.shape[2] != rows + 1:
        errors.value_error(name, "row_offsets", f"[{q.shape[0]} or 1, {q.shape[2]} or 1, {rows + 1}]", row_offsets)
    check_index(name, "col_index", col_index, q, 1, "[nnz]")
    check_key_mask(name, key_mask, k)
    scale = check_scale(name, scale, q)
    q, k, v = (errors.check_last_dim_contiguous(x) for x in (q, k, v))
    args = q, k, v, row_offsets, col_index, key_mask, block_size, causal, scale
    if errors.needs_grad(q, k, v):
        return _BlockSparseAttention.apply(*args)
    return block_sparse_attention_fwd(*args)
