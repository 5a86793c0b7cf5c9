"""Window attention with global tokens at arbitrary positions (Longformer, ETC)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_index, check_key_mask, check_qkv, check_scale, check_window
from .window_attention import lse_dtype

__all__ = ["global_attention"]

_MODULE = "attention/global_attention"
_OPTIONS = (
    "Tensor global_index, Tensor? q_global, Tensor? k_global, Tensor? v_global, Tensor? key_mask, SymInt left, "
    "SymInt right, SymInt dilation, bool causal, float scale"
)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _dim = q.shape
    return q.new_empty(batch, seq, heads, v.shape[-1]), q.new_empty(batch, heads, seq, dtype=lse_dtype(q))


def _bwd_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    global_index: Tensor,
    q_global: Tensor | None,
    k_global: Tensor | None,
    v_global: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    of_globals = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q_global, k_global, v_global))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *of_globals


global_attention_fwd = kernel(
    f"global_attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fwd_fake,
)
global_attention_bwd = kernel(
    "global_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_bwd_fake,
)


@gradient_of(global_attention_fwd)
class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = global_attention_fwd(q, k, v, *options)
        tensors, ctx.options = options[:5], options[5:]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 13
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else errors.check_last_dim_contiguous(dout)
        dq, dk, dv, *of_globals = global_attention_bwd(dout, dlse, q, k, v, out, lse, *tensors, *ctx.options)
        of_globals = (None if x is None else g for x, g in zip(tensors[1:4], of_globals))
        return dq, dk, dv, None, *of_globals, *(None,) * 6


@op(
    module=_MODULE,
    kernels=("global_attention_fwd", "global_attention_bwd"),
    differentiable=("q", "k", "v", "q_global", "k_global", "v_global"),
)
def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_index: Tensor,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    window: Sequence[int],
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sliding-window attention plus tokens that see, and are seen by, the whole sequence; O(S * (window + G)).

    A local row attends in one softmax to the keys of its window and to all global keys, none counted twice. A
    global row attends to every key, with the ``*_global`` projections where given, and that result is its output.

    Args:
        q: ``[B, S, Hq, D]`` float32, bfloat16, float16 (float64 on the reference backend).
        k: ``[B, S, Hkv, D]``; query head h reads head ``h // (Hq // Hkv)``.
        v: ``[B, S, Hkv, Dv]``.
        global_index: ``[B, G]`` int32 or int64: positions in any order, padded with -1. A repeated one counts once;
            one that is out of range or hidden by key_mask is ignored.
        q_global, k_global, v_global: like q, k, v: the projections of the global rows' own attention
            (Longformer); each defaults to its plain one. Of q_global only the global rows are read.
        key_mask: ``[B, S]`` bool. False is padding: never attended, its row's out is 0 and its lse -inf.
        window: ``(left, right)``, inclusive, -1 = unbounded, as in ``window_attention``.
        dilation: as in ``window_attention``; concerns the window only.
        causal: nobody sees a later key: right becomes 0, globals are seen from their own position on, and a
            global row sees the keys up to itself.
        scale: None is ``D ** -0.5``.

    Returns:
        ``out [B, S, Hq, Dv]`` in q's dtype, ``lse [B, Hq, S]`` float32, natural log. NaN in padded tokens never
        reaches another row.

    Differentiable once, in q, k, v and the global projections, through out and lse: deterministic, batch-invariant,
    no atomics. Rule: Longformer (arXiv:2004.05150), ETC (arXiv:2004.08483).

    Raises:
        ValueError: shapes, window, dilation or scale.
        TypeError: dtypes.
    """
    name = "global_attention"
    check_qkv(name, q, k, v, packed=False)
    if k.shape[1] != q.shape[1]:
        errors.value_error(name, "k", f"of q's length {q.shape[1]}", k)
    for arg, tensor, like in (("q_global", q_global, q), ("k_global", k_global, k), ("v_global", v_global, v)):
        if tensor is not None:
            if tensor.shape != like.shape:
                errors.value_error(name, arg, f"{[*like.shape]} like {arg[0]}", tensor)
            errors.check_dtype(name, arg, tensor, (q.dtype,))
            errors.check_device(name, arg, tensor, q, "q")
    check_index(name, "global_index", global_index, q, 2, "[B, G]")
    if global_index.shape[0] != q.shape[0]:
        errors.value_error(name, "global_index", f"[{q.shape[0]}, G]", global_index)
    check_key_mask(name, key_mask, k)
    left, right = check_window(name, window)
    if dilation < 1:
        errors.value_error(name, "dilation", ">= 1", dilation)
    scale = check_scale(name, scale, q)
    q, k, v = (errors.check_last_dim_contiguous(x) for x in (q, k, v))
    q_global, k_global, v_global = (
        None if x is None else errors.check_last_dim_contiguous(x) for x in (q_global, k_global, v_global)
    )
    if causal:
        right = 0
    args = q, k, v, global_index, q_global, k_global, v_global, key_mask, left, right, dilation, causal, scale
    if errors.needs_grad(q, k, v, q_global, k_global, v_global):
        return _GlobalAttention.apply(*args)
    return global_attention_fwd(*args)
