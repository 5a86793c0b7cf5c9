"""Sliding-window attention: causal or bidirectional, with sinks, biases by distance, soft cap, dilation, GQA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_distance_bias, check_heads, check_index, check_qkv, check_scale, check_softcap, check_window

__all__ = ["window_attention", "window_from"]

_MODULE = "attention/window_attention"
_OPTIONS = (
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? distance_bias, "
    "SymInt left, SymInt right, SymInt dilation, float scale, float softcap, SymInt sink_tokens"
)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_lse(q: Tensor) -> Tensor:
    """[B, H, S], packed [H, T]."""
    return q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=lse_dtype(q))


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), _empty_lse(q)


def _bwd_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _bwd_bias_fake(*args: Any) -> Tensor:
    distance_bias = args[11]
    return distance_bias.new_empty(distance_bias.shape)


window_attention_fwd = kernel(
    f"window_attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fwd_fake,
)
_BACKWARD = f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
window_attention_bwd = kernel(
    f"window_attention_bwd{_BACKWARD} -> (Tensor, Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_bwd_fake,
)
# a pass of its own, for the calls that ask for it
window_attention_bwd_bias = kernel(
    f"window_attention_bwd_bias{_BACKWARD} -> Tensor",
    module=_MODULE,
    fake=_bwd_bias_fake,
)


@gradient_of(window_attention_fwd)
class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = window_attention_fwd(q, k, v, sinks, *options)
        *tensors, ctx.options = *options[:4], options[4:]
        ctx.save_for_backward(q, k, v, out, lse, sinks, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (8 + len(ctx.options))
        if dout is None:
            dout = torch.zeros_like(out)
        dout = errors.check_last_dim_contiguous(dout)
        args = dout, dlse, q, k, v, out, lse, *rest, *ctx.options
        dq, dk, dv, dsinks = window_attention_bwd(*args)
        dsinks = None if rest[0] is None else dsinks
        dbias = window_attention_bwd_bias(*args) if ctx.needs_input_grad[7] else None
        return dq, dk, dv, dsinks, None, None, None, dbias, *(None,) * len(ctx.options)


@op(
    module=_MODULE,
    kernels=("window_attention_fwd", "window_attention_bwd", "window_attention_bwd_bias"),
    differentiable=("q", "k", "v", "sinks", "distance_bias"),
)
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    distance_bias: Tensor | None = None,
    *,
    window: Sequence[int] = (-1, -1),
    dilation: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which every query sees the keys of a window around it; O(S * window) time and memory.

    With ``delta = Sk - Sq`` (the last query stands at the last key), query i sees key j when
    ``i + delta - left <= j <= i + delta + right``, ends included, -1 = unbounded. ``(-1, -1)`` is full attention,
    ``(-1, 0)`` causal, ``(W - 1, 0)`` the last W keys with its own, ``(w, w)`` both sides. No mask is ever
    built, and windows are run-time values: changing them compiles nothing.

        x_ij = scale * q_i . k_j;  x = softcap * tanh(x / softcap);  x -= slope_h * |i + delta - j|
        x += distance_bias[h, clamp(i + delta - j + (L - 1) / 2, 0, L - 1)]
        out_i = sum_j exp(x_ij) v_j / (sum_j exp(x_ij) + exp(sink_h)),  lse_i = log of that denominator

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[Tq, Hq, D]``. float32, bfloat16, float16 (float64 on the reference
            backend).
        k: ``[B, Sk, Hkv, D]`` or ``[Tk, Hkv, D]``. Query head h reads head ``h // (Hq // Hkv)``.
        v: ``[B, Sk, Hkv, Dv]`` or ``[Tk, Hkv, Dv]``; Dv may differ from D.
        sinks: ``[Hq]`` learned logits that enter the denominator only (gpt-oss); any float dtype.
        alibi_slopes: ``[Hq]`` float32, not differentiable. The bias is symmetric; FlashAttention's causal kernel
            differs from it by a constant per row in lse only.
        cu_seqlens_q: ``[N + 1]`` int32 or int64, starts of the packed sequences of q. Tokens outside of
            ``[cu[0], cu[N])`` get 0 and -inf.
        cu_seqlens_k: the same for k and v; None = ``cu_seqlens_q``.
        distance_bias: ``[Hq, L]`` float32, L odd, added to the score of each distance, query minus key; its middle is
            distance 0, and what lies past an end takes that end's. T5's (``tilefuse.t5_distance_bias``, with
            ``scale=1.0``), learned ALiBi, clipped relative positions.
        window: ``(left, right)``, each >= -1. ``tilefuse.window_from`` converts other libraries' conventions.
        dilation: d > 1 keeps only keys at distances divisible by d; left and right then count steps of d. Runs as
            d independent windows over the residue classes, without wasted work.
        scale: multiplies the scores; None is ``D ** -0.5``.
        softcap: 0 is off.
        sink_tokens: n > 0 keeps the first n keys of a sequence visible to every row whose right bound reaches
            them (StreamingLLM), whatever the dilation.
        max_seqlen_q, max_seqlen_k: accepted for code written for FlashAttention. Lengths are read on the device,
            so they are not needed.

    Returns:
        ``out`` in q's dtype, ``[B, Sq, Hq, Dv]`` or ``[Tq, Hq, Dv]``, and ``lse`` float32 natural log,
        ``[B, Hq, Sq]`` or ``[Hq, Tq]``. A row without a visible key has out 0 and lse -inf (the sink's logit with
        sinks), and zero gradients. NaN in keys or values past a sequence's end never reaches an output; a NaN
        value inside a window's tile may reach the tile's other rows, as in every flash kernel.

    Differentiable once, in q, k, v, sinks and distance_bias, through out and lse. Two-pass backward without atomics:
    deterministic and batch-invariant. The gradient of distance_bias, the sums of the scores' gradients along their
    diagonals in float32, is a third pass, for calls that need it. Rules: FlashAttention-2 (window, ALiBi), Gemma-2
    (soft cap), gpt-oss (sinks), T5 (bias by distance).

    Raises:
        ValueError: shapes, window, dilation, scale, softcap or sink_tokens out of range, packed input without
            cu_seqlens_q, or cu_seqlens with unpacked input.
        TypeError: dtypes.
        RuntimeError: alibi_slopes require grad and grad mode is on.
    """
    name = "window_attention"
    packed = q.dim() == 3
    check_qkv(name, q, k, v, packed=packed)
    check_heads(name, "sinks", sinks, q, dtypes=errors.FLOATS)
    check_heads(name, "alibi_slopes", alibi_slopes, q, dtypes=(torch.float32, torch.float64))
    errors.check_not_differentiated(name, "alibi_slopes are not differentiable", alibi_slopes=alibi_slopes)
    check_distance_bias(name, distance_bias, q)
    if packed and cu_seqlens_q is None:
        errors.value_error(name, "cu_seqlens_q", "given with packed [T, H, D] input", cu_seqlens_q)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    for arg, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is not None:
            if not packed or cu_seqlens_q is None:
                errors.value_error(name, arg, "None unless q is packed [T, H, D]", cu)
            check_index(name, arg, cu, q, 1, "[N + 1]")
            if cu.shape[0] < 1 or cu.shape != cu_seqlens_q.shape:
                errors.value_error(name, arg, f"[N + 1] like cu_seqlens_q {[*cu_seqlens_q.shape]}", cu)
    left, right = check_window(name, window)
    if dilation < 1:
        errors.value_error(name, "dilation", ">= 1", dilation)
    for arg, count in (
        ("sink_tokens", sink_tokens),
        ("max_seqlen_q", max_seqlen_q),
        ("max_seqlen_k", max_seqlen_k),
    ):
        if count < 0:
            errors.value_error(name, arg, ">= 0", count)
    scale, softcap = check_scale(name, scale, q), check_softcap(name, softcap)
    tensors = (q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, distance_bias)
    tensors = (None if x is None else errors.check_last_dim_contiguous(x) for x in tensors)
    args = *tensors, left, right, dilation, scale, softcap, sink_tokens
    if errors.needs_grad(q, k, v, sinks, distance_bias):
        return _WindowAttention.apply(*args)
    return window_attention_fwd(*args)


# source -> window(size); the docs print this table
_CONVERTERS = {
    # (left, right) pairs, inclusive
    "flash_attention": lambda w: (int(w[0]), int(w[1])),
    # i - W < j <= i: the last W keys with the query's own
    "hf": lambda w: (w - 1, 0),
    "gpt_oss": lambda w: (w - 1, 0),
    "mistral": lambda w: (w - 1, 0),
    "xformers": lambda w: (w - 1, 0),
    # |i - j| <= W
    "hf_bidirectional": lambda w: (w, w),
    # the flash path of the same models excludes distance W
    "hf_bidirectional_flash": lambda w: (w - 1, w - 1),
    # |i - j| < W // 2 + 1 after the config's own adjustment
    "gemma3_bidirectional": lambda w: (w // 2, w // 2),
    # attention_window is the total, without the query itself
    "longformer": lambda w: (w // 2, w // 2),
    # allenai's own code counts one side
    "longformer_one_sided": lambda w: (w, w),
    # i - j <= W
    "attention_gym": lambda w: (w, 0),
    # window_left is inclusive
    "flashinfer": lambda w: (w, 0),
}


def window_from(source: str, size: int | Sequence[int]) -> tuple[int, int]:
    """Converts another library's window size to the ``(left, right)`` of this package, both inclusive.

    =========================  ======================================  ======================  =============
    source                     rule there                              ``(left, right)``       keys per row
    =========================  ======================================  ======================  =============
    ``flash_attention``        ``(L, R)``, i - L <= j <= i + R         ``(L, R)``              L + R + 1
    ``hf``, ``mistral``,       i - W < j <= i                          ``(W - 1, 0)``          W
    ``gpt_oss``, ``xformers``
    ``hf_bidirectional``       abs(i - j) <= W (mask path)             ``(W, W)``              2 W + 1
    ``hf_bidirectional_flash`` abs(i - j) < W (flash path)             ``(W - 1, W - 1)``      2 W - 1
    ``gemma3_bidirectional``   abs(i - j) <= W // 2                    ``(W // 2, W // 2)``    2 (W // 2) + 1
    ``longformer``             total W, abs(i - j) <= W // 2           ``(W // 2, W // 2)``    2 (W // 2) + 1
    ``longformer_one_sided``   abs(i - j) <= w (allenai's code)        ``(w, w)``              2 w + 1
    ``attention_gym``          0 <= i - j <= W                         ``(W, 0)``              W + 1
    ``flashinfer``             window_left = L, inclusive              ``(L, 0)``              L + 1
    =========================  ======================================  ======================  =============

    Args:
        source: one of the names above.
        size: the window there; a pair for ``flash_attention``. -1 (unbounded) stays -1 on the sides that the
            source bounds.

    Raises:
        ValueError: an unknown source, a size that is empty there (0 where W counts the query itself) or < -1.
    """
    if source not in _CONVERTERS:
        errors.value_error("window_from", "source", f"one of {sorted(_CONVERTERS)}", source)
    if source == "flash_attention":
        if isinstance(size, int) or len(size) != 2 or min(size) < -1:
            errors.value_error("window_from", "size", "a pair (left, right), each >= -1", size)
        return _CONVERTERS[source](size)
    if not isinstance(size, int) or isinstance(size, bool):
        errors.type_error("window_from", "size", "an int", size)
    probe = _CONVERTERS[source](1 << 20)
    if size == -1:
        return -1, (-1 if probe[1] else 0)
    window = _CONVERTERS[source](size)
    if size < 0 or min(window) < 0:
        errors.value_error("window_from", "size", f"-1 or a window of at least one key in {source!r}", size)
    return window
