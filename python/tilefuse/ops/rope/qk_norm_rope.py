"""RMSNorm of query and key heads, then rotary embedding, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .rope import check_rope, contiguous_rows, rest_of

__all__ = ["qk_norm_rope"]

_MODULE = "rope/qk_norm_rope"
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? positions, "
    "Tensor? cu_seqlens, float eps, float weight_offset, bool interleaved, int rotary_offset"
)


def _check(q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, rotary_offset):
    name = "qk_norm_rope"
    check_rope(name, "q", q, k, cos, sin, positions, cu_seqlens, rotary_offset)
    for arg, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[-1:]:
            errors.value_error(name, arg, f"[D] with D = {q.shape[-1]}", weight)
        wide = weight.dtype == torch.float64 and q.dtype != torch.float64
        if weight.dtype not in errors.FLOATS or wide:
            errors.type_error(name, arg, "float32, bfloat16 or float16", weight)
        if weight.device != q.device:
            errors.check_device(name, arg, weight, q, "q")
    if k_weight.dtype != q_weight.dtype:
        errors.type_error(name, "k_weight", f"of q_weight's dtype {errors.dtype_name(q_weight.dtype)}", k_weight)
    if not eps >= 0:
        errors.value_error(name, "eps", "at least 0", eps)


def _fake(q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, _offset, _interleaved, rotary_offset):
    _check(q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, rotary_offset)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_bwd(dq_out, dk_out, q, k, q_weight, k_weight, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), q_weight.new_empty(q.shape[-1]), k_weight.new_empty(q.shape[-1])


def _cuda_refuses(*args: Any) -> str | None:
    # the CUDA kernels keep four rows of partial weight gradients for q and k in 48 KiB of shared memory
    return "takes head dims up to 1024" if args[0].shape[-1] > 1024 else None


_BACKENDS = ("reference", "cpu", "triton", "cuda")
qk_norm_rope_fwd = kernel(
    f"qk_norm_rope_fwd({_ARGUMENTS}) -> (Tensor, Tensor)", module=_MODULE, fake=_fake, backends=_BACKENDS
)
qk_norm_rope_bwd = kernel(
    f"qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_bwd,
    backends=_BACKENDS,
    when={"cuda": _cuda_refuses},
)


@gradient_of(qk_norm_rope_fwd)
class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args: Any):
        ctx.save_for_backward(*args[:8])
        ctx.options = args[8:]
        return qk_norm_rope_fwd(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        given = (contiguous_rows(dq_out), contiguous_rows(dk_out))
        gradients = qk_norm_rope_bwd(*given, *ctx.saved_tensors, *ctx.options)
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), *(None,) * 8


@op(
    module=_MODULE,
    kernels=("qk_norm_rope_fwd", "qk_norm_rope_bwd"),
    differentiable=("q", "k", "q_weight", "k_weight"),
)
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    rotary_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head of q and k, then rotary embedding (Qwen3, Gemma 3).

    ``rope(x * rsqrt(mean(x ** 2) + eps) * (weight + weight_offset))`` with the mean over the head dim, all in
    float32 with one rounding at the end. (Separate modules round up to three times.)

    Args:
        q, k: ``[B, S, H, D]`` or packed ``[T, H, D]``, as in ``rope_qk``.
        q_weight, k_weight: ``[D]``, float32, bfloat16 or float16, both of one dtype.
        cos, sin, positions, cu_seqlens: as in ``rope``. Dims outside of the rotary slice are normalised only.
        eps: added to the mean square.
        weight_offset: added to both weights; Gemma stores ``weight - 1`` and needs 1.0.
        interleaved, rotary_offset: as in ``rope``.

    Returns:
        ``(q', k')``, contiguous, of q's dtype.

    Gradients: for q, k and both weights, once. The weights' are summed in float32 in a fixed order: two runs are
    bit-equal. Batch-invariant but for the weight gradients, which are sums over the batch.

    Raises:
        ValueError, TypeError: as ``rope_qk``, and for weights that are not ``[D]`` of one dtype, or a negative eps.
        RuntimeError: cos or sin require grad and grad mode is on.

    Source: Zhang and Sennrich, RMSNorm (arXiv 1910.07467); Qwen3 (arXiv 2505.09388).
    """
    _check(q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, rotary_offset)
    args = (
        contiguous_rows(q),
        contiguous_rows(k),
        contiguous_rows(q_weight),
        contiguous_rows(k_weight),
        *rest_of(cos, sin, positions, cu_seqlens, eps, weight_offset, interleaved, rotary_offset),
    )
    if errors.needs_grad(q, k, q_weight, k_weight):
        return _QKNormRope.apply(*args)
    return qk_norm_rope_fwd(*args)
