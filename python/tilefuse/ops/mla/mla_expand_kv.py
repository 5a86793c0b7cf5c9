"""Full keys and values from latent rows, for training and prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_like, rows_of

__all__ = ["mla_expand_kv"]

_NAME = "mla_expand_kv"
_MODULE = "mla/mla_expand_kv"


def _check(latent, w_ukv, kv_lora_rank, nope_dim, v_dim) -> None:
    if latent.ndim != 2:
        errors.value_error(_NAME, "latent", "[T, R + r]", latent)
    errors.check_dtype(_NAME, "latent", latent, errors.FLOATS)
    if not 0 < kv_lora_rank <= latent.shape[1]:
        errors.value_error(_NAME, "kv_lora_rank", f"in (0, {latent.shape[1]}]", kv_lora_rank)
    if nope_dim < 0:
        errors.value_error(_NAME, "nope_dim", ">= 0", nope_dim)
    if v_dim <= 0:
        errors.value_error(_NAME, "v_dim", "> 0", v_dim)
    if w_ukv.ndim != 2 or w_ukv.shape[0] % (nope_dim + v_dim):
        errors.value_error(_NAME, "w_ukv", f"[H * {nope_dim + v_dim}, {kv_lora_rank}]", w_ukv)
    check_like(_NAME, "w_ukv", w_ukv, (w_ukv.shape[0], kv_lora_rank), latent, "latent")


def _fake(latent, w_ukv, kv_lora_rank, nope_dim, v_dim):
    _check(latent, w_ukv, kv_lora_rank, nope_dim, v_dim)
    heads, tokens = w_ukv.shape[0] // (nope_dim + v_dim), latent.shape[0]
    rope_dim = latent.shape[1] - kv_lora_rank
    return latent.new_empty(tokens, heads, nope_dim + rope_dim), latent.new_empty(tokens, heads, v_dim)


def _fake_backward(dk, dv, latent, w_ukv, kv_lora_rank, nope_dim, v_dim):
    return latent.new_empty(latent.shape), w_ukv.new_empty(w_ukv.shape)


_ARGS = "Tensor latent, Tensor w_ukv, int kv_lora_rank, int nope_dim, int v_dim"
mla_expand_kv_fwd = kernel(
    f"mla_expand_kv_fwd({_ARGS}) -> (Tensor, Tensor)", module=_MODULE, fake=_fake, linear=("latent",)
)
mla_expand_kv_bwd = kernel(
    f"mla_expand_kv_bwd(Tensor dk, Tensor dv, {_ARGS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_backward,
)


@gradient_of(mla_expand_kv_fwd)
class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent, w_ukv, kv_lora_rank, nope_dim, v_dim):
        ctx.save_for_backward(latent, w_ukv)
        ctx.options = (kv_lora_rank, nope_dim, v_dim)
        return mla_expand_kv_fwd(latent, w_ukv, kv_lora_rank, nope_dim, v_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, dv):
        grads = mla_expand_kv_bwd(rows_of(dk), rows_of(dv), *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None


@op(
    module=_MODULE,
    kernels=("mla_expand_kv_fwd", "mla_expand_kv_bwd"),
    differentiable=("latent", "w_ukv"),
)
def mla_expand_kv(
    latent: Tensor, w_ukv: Tensor, *, kv_lora_rank: int, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of every head from latent rows.

    With ``w = w_ukv.view(H, P + V, R)``: ``k[t, h] = [w[h, :P] @ latent[t, :R] | latent[t, R:]]`` (the rotated part is
    shared by all heads) and ``v[t, h] = w[h, P:] @ latent[t, :R]``. Products accumulate in float32, one rounding. On a
    GPU the product writes k and v directly; nothing is concatenated afterwards.

    Args:
        latent: ``[T, R + r]`` rows of ``mla_compress_kv`` or ``mla_gather_kv``; float32, bfloat16 or float16 (float64
            on the reference backend), any strides.
        w_ukv: ``[H * (P + V), R]`` of latent's dtype, as Hugging Face's ``kv_b_proj.weight``.
        kv_lora_rank, nope_dim, v_dim: R, P and V.

    Returns:
        ``k [T, H, P + r]`` and ``v [T, H, V]``, contiguous, latent's dtype.

    Gradient: for latent (the shared part sums over heads in float32) and w_ukv. Deterministic; no row depends on
    another.

    Raises:
        ValueError: wrong shapes or widths. TypeError: wrong dtypes.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """
    _check(latent, w_ukv, kv_lora_rank, nope_dim, v_dim)
    args = (rows_of(latent), rows_of(w_ukv), kv_lora_rank, nope_dim, v_dim)
    return _Expand.apply(*args) if errors.needs_grad(latent, w_ukv) else mla_expand_kv_fwd(*args)
