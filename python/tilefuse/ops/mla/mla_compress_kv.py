"""From the raw down-projection to the latent row: RMSNorm of the first part, RoPE of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_tables, rows_of

__all__ = ["mla_compress_kv"]

_MODULE = "mla/mla_compress_kv"


def check_kv_a(name: str, kv_a: Tensor, weight: Tensor) -> int:
    """Checks the down-projection and the norm's weight; returns the RoPE width."""
    if kv_a.ndim != 2:
        errors.value_error(name, "kv_a", "[T, R + r]", kv_a)
    errors.check_dtype(name, "kv_a", kv_a, errors.FLOATS)
    if weight.ndim != 1 or weight.shape[0] == 0 or weight.shape[0] > kv_a.shape[1]:
        errors.value_error(name, "weight", f"[R] with 0 < R <= {kv_a.shape[1]}", weight)
    errors.check_dtype(name, "weight", weight, errors.FLOATS)
    errors.check_device(name, "weight", weight, kv_a, "kv_a")
    return kv_a.shape[1] - weight.shape[0]


def _check(kv_a, weight, cos, sin, positions, eps) -> None:
    rope_dim = check_kv_a("mla_compress_kv", kv_a, weight)
    check_tables("mla_compress_kv", "kv_a", kv_a, rope_dim, cos, sin, positions)
    if not eps > 0:
        errors.value_error("mla_compress_kv", "eps", "positive", eps)


def _fake(kv_a, weight, cos, sin, positions, eps, interleaved):
    _check(kv_a, weight, cos, sin, positions, eps)
    return kv_a.new_empty(kv_a.shape)


def _fake_backward(dout, kv_a, weight, cos, sin, positions, eps, interleaved):
    return kv_a.new_empty(kv_a.shape), weight.new_empty(weight.shape)


_ARGS = "Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor? positions, float eps, bool interleaved"
mla_compress_kv_fwd = kernel(f"mla_compress_kv_fwd({_ARGS}) -> Tensor", module=_MODULE, fake=_fake)
mla_compress_kv_bwd = kernel(
    f"mla_compress_kv_bwd(Tensor dout, {_ARGS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_backward,
)


@gradient_of(mla_compress_kv_fwd)
class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv_a, weight, cos, sin, positions, eps, interleaved):
        ctx.save_for_backward(kv_a, weight, cos, sin, positions)
        ctx.options = (eps, interleaved)
        return mla_compress_kv_fwd(kv_a, weight, cos, sin, positions, eps, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dkv_a, dweight = mla_compress_kv_bwd(rows_of(dout), *ctx.saved_tensors, *ctx.options)
        return dkv_a, dweight, None, None, None, None, None


@op(
    module=_MODULE,
    kernels=("mla_compress_kv_fwd", "mla_compress_kv_bwd"),
    differentiable=("kv_a", "weight"),
)
def mla_compress_kv(
    kv_a: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> Tensor:
    """Latent rows of multi-head latent attention from the raw down-projection ``h @ W_DKV``.

    ``out[t] = [kv_a[t, :R] * weight / sqrt(mean(kv_a[t, :R]^2) + eps) | rope(kv_a[t, R:], positions[t])]``, computed
    in float32 with one rounding at the end. The sum of squares is taken in float64, so that every backend stores the
    same bits.

    Args:
        kv_a: ``[T, R + r]`` float32, bfloat16 or float16 (float64 on the reference backend), any strides. DeepSeek:
            R = 512, r = 64; any R > 0 and even r >= 0 work.
        weight: ``[R]`` of the norm, any of these dtypes.
        cos, sin: ``[P, r / 2]`` float32 (see ``rope_tables``). They get no gradient.
        positions: ``[T]`` int32 or int64; None counts 0, 1, ..
        eps: of the norm. DeepSeek's is 1e-6 whatever ``rms_norm_eps`` says; there is no safe guess for other models.
        interleaved: pairs are ``(2i, 2i + 1)``, as DeepSeek's own code has them. False: ``(i, i + r / 2)``. Hugging
            Face's ``apply_rotary_pos_emb_interleave`` permutes the pairs apart: same scores, other bytes.

    Returns:
        ``[T, R + r]`` of kv_a's dtype, contiguous: what a cache row holds (``mla_append_kv`` stores it directly).

    Gradient: for kv_a and weight; the weight's is summed in float32 in a fixed order. Deterministic, batch-invariant
    (but for the weight's gradient, which is a sum over the batch).

    Raises:
        ValueError: wrong shapes, odd r, eps <= 0; on CPU a position outside of the tables (clamped on a GPU).
        TypeError: wrong dtypes.

    Source: DeepSeek-AI, DeepSeek-V2 (arXiv 2405.04434) and the inference code of DeepSeek-V3.
    """
    _check(kv_a, weight, cos, sin, positions, eps)
    errors.check_not_differentiated("mla_compress_kv", "tables get no gradient", cos=cos, sin=sin)
    args = (rows_of(kv_a), weight.contiguous(), rows_of(cos), rows_of(sin), rows_of(positions), eps, interleaved)
    return _Compress.apply(*args) if errors.needs_grad(kv_a, weight) else mla_compress_kv_fwd(*args)
