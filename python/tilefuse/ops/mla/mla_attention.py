"""Attention over full keys and values of different widths, for training and prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_index, rows_of

__all__ = ["mla_attention"]

_NAME = "mla_attention"
_MODULE = "mla/mla_attention"


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale) -> None:
    if q.ndim not in (3, 4):
        errors.value_error(_NAME, "q", "[B, Sq, H, D] or [Tq, H, D]", q)
    errors.check_dtype(_NAME, "q", q, errors.FLOATS)
    *lead, _, heads, dim = q.shape
    for name, x, width in (("k", k, dim), ("v", v, None)):
        if x.ndim != q.ndim or (*x.shape[:-3], x.shape[-2]) != (*lead, heads) or width not in (None, x.shape[-1]):
            # written here alone: the text of a symbolic size would make torch.compile specialise on it
            shape = ", ".join([*map(str, lead), "Sk", str(heads), "V" if width is None else str(width)])
            # grouped queries are not a feature of latent attention: every head has its own key
            errors.value_error(_NAME, name, f"[{shape}] with as many heads as q", x)
        if x.dtype != q.dtype:
            errors.type_error(_NAME, name, f"of q's dtype {errors.dtype_name(q.dtype)}", x)
        errors.check_device(_NAME, name, x, q, "q")
    if v.shape[-3] != k.shape[-3]:
        errors.value_error(_NAME, "v", f"of as many rows as k, {k.shape[-3]}", v)
    if dim == 0 or v.shape[-1] == 0:
        errors.value_error(_NAME, "q" if dim == 0 else "v", "of a head dim > 0", q if dim == 0 else v)
    packed = q.ndim == 3
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not packed and bounds is not None:
            errors.value_error(_NAME, name, "None unless q is packed [Tq, H, D]", bounds)
        if packed:
            if bounds is None or cu_seqlens_q is None or bounds.ndim != 1 or bounds.shape[0] == 0:
                errors.value_error(_NAME, name, "[B + 1] int32 or int64 with packed q", bounds)
            check_index(_NAME, name, bounds, tuple(cu_seqlens_q.shape), q, "q")
    if not softmax_scale > 0:
        errors.value_error(_NAME, "softmax_scale", "positive: (P + r) ** -0.5 * mscale ** 2", softmax_scale)


def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    *lead, rows, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*lead, rows, heads, v.shape[-1]), q.new_empty(*lead, heads, rows, dtype=wide)


def _fake_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_ARGS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, bool causal"
mla_attention_fwd = kernel(
    f"mla_attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
)
mla_attention_bwd = kernel(
    "mla_attention_bwd(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ARGS}) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_backward,
)


@gradient_of(mla_attention_fwd)
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        out, lse = mla_attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = (softmax_scale, causal)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        grads = mla_attention_bwd(rows_of(dout), dlse, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None


@op(
    module=_MODULE,
    kernels=("mla_attention_fwd", "mla_attention_bwd"),
    differentiable=("q", "k", "v"),
)
def mla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention whose keys are wider than its values, as the full (not absorbed) form of latent attention needs it.

    ``out = softmax(softmax_scale * q k^T) v`` per head, in blocks: the score matrix is never stored. Scores and sums in
    float32, one rounding at the end (the weights are rounded to q's dtype for the second product on a GPU and on CPUs
    with AVX512-BF16).

    Args:
        q: ``[B, Sq, H, D]`` or packed ``[Tq, H, D]`` with D = P + r; float32, bfloat16 or float16 (float64 on the
            reference backend), any strides.
        k: ``[B, Sk, H, D]`` or ``[Tk, H, D]``. v: ``[B, Sk, H, V]`` or ``[Tk, H, V]``. As many heads as q.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` int32 or int64, with packed input and only then. Any of the sequences
            may be empty on either side.
        softmax_scale: no default: ``(P + r) ** -0.5 * mscale ** 2`` (see ``mla_decode``).
        causal: bottom-right aligned: query row i of a sequence sees keys ``<= i + Sk - Sq``.

    Returns:
        ``out`` of q's shape with last dim V, and ``lse`` ``[B, H, Sq]`` or ``[H, Tq]`` float32 (float64 for float64),
        natural logarithm. A row that sees no key, and a packed row that belongs to no sequence, gives 0 and -inf.

    Gradient: for q, k and v, from ``out`` and from ``lse``; a pass over keys and a pass over queries, no atomics, so
    two runs are bit-equal. Batch-invariant.

    Raises:
        ValueError: wrong shapes or combinations, fewer key heads than query heads. TypeError: wrong dtypes.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691); DeepSeek-V2 (arXiv 2405.04434).
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    args = (*map(rows_of, (q, k, v, cu_seqlens_q, cu_seqlens_k)), softmax_scale, causal)
    return _Attention.apply(*args) if errors.needs_grad(q, k, v) else mla_attention_fwd(*args)
