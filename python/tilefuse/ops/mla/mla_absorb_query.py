"""Queries into the latent space, so that decode reads the latent cache as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_like, check_tables, rows_of

__all__ = ["mla_absorb_query"]

_NAME = "mla_absorb_query"
_MODULE = "mla/mla_absorb_query"


def _check(q, w_uk, cos, sin, positions) -> None:
    if q.ndim != 3:
        errors.value_error(_NAME, "q", "[T, H, P + r]", q)
    errors.check_dtype(_NAME, "q", q, errors.FLOATS)
    if w_uk.ndim != 3 or w_uk.shape[1] > q.shape[2]:
        errors.value_error(_NAME, "w_uk", f"[H, P, R] with P <= {q.shape[2]}", w_uk)
    check_like(_NAME, "w_uk", w_uk, (q.shape[1], *w_uk.shape[1:]), q, "q")
    check_tables(_NAME, "q", q, q.shape[2] - w_uk.shape[1], cos, sin, positions)


def _fake(q, w_uk, cos, sin, positions, interleaved):
    _check(q, w_uk, cos, sin, positions)
    return q.new_empty(*q.shape[:2], w_uk.shape[2] + q.shape[2] - w_uk.shape[1])


def _fake_backward(dout, q, w_uk, cos, sin, positions, interleaved):
    return q.new_empty(q.shape), w_uk.new_empty(w_uk.shape)


_ARGS = "Tensor q, Tensor w_uk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved"
mla_absorb_query_fwd = kernel(f"mla_absorb_query_fwd({_ARGS}) -> Tensor", module=_MODULE, fake=_fake, linear=("q",))
mla_absorb_query_bwd = kernel(
    f"mla_absorb_query_bwd(Tensor dout, {_ARGS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_backward,
)


@gradient_of(mla_absorb_query_fwd)
class _Absorb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, w_uk, cos, sin, positions, interleaved):
        ctx.save_for_backward(q, w_uk, cos, sin, positions)
        ctx.interleaved = interleaved
        return mla_absorb_query_fwd(q, w_uk, cos, sin, positions, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *mla_absorb_query_bwd(rows_of(dout), *ctx.saved_tensors, ctx.interleaved), None, None, None, None


@op(
    module=_MODULE,
    kernels=("mla_absorb_query_fwd", "mla_absorb_query_bwd"),
    differentiable=("q", "w_uk"),
)
def mla_absorb_query(
    q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = True
) -> Tensor:
    """Absorbed queries of multi-head latent attention: up-projection of keys folded into the query, RoPE on the rest.

    ``out[t, h] = [q[t, h, :P] @ w_uk[h] | rope(q[t, h, P:], positions[t])]``; products accumulate in float32, one
    rounding at the end. Then ``q . k`` over full keys equals ``out . row`` over latent rows, and ``mla_decode`` can
    read the latent cache as keys. The softmax scale stays that of width P + r.

    Args:
        q: ``[T, H, P + r]`` float32, bfloat16 or float16 (float64 on the reference backend), any strides.
        w_uk: ``[H, P, R]`` of q's dtype: ``kv_b_proj.weight.view(H, P + V, R)[:, :P]`` is such a view.
        cos, sin: ``[>= T or P, r / 2]`` float32. They get no gradient.
        positions: ``[T]`` int32 or int64; None counts 0, 1, ..
        interleaved: as in ``mla_compress_kv``; must be the same for queries and keys.

    Returns:
        ``[T, H, R + r]``, contiguous, q's dtype.

    Gradient: for q and w_uk. Deterministic. Batch-invariant up to the tile that the number of tokens chooses; float32
    accumulation runs over P in the same order in all of them.

    Raises:
        ValueError: wrong shapes, odd r; on CPU a position outside of the tables. TypeError: wrong dtypes.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
    """
    _check(q, w_uk, cos, sin, positions)
    errors.check_not_differentiated(_NAME, "tables get no gradient", cos=cos, sin=sin)
    args = (rows_of(q), rows_of(w_uk), rows_of(cos), rows_of(sin), rows_of(positions), interleaved)
    return _Absorb.apply(*args) if errors.needs_grad(q, w_uk) else mla_absorb_query_fwd(*args)
