"""Two attention results over disjoint keys made into one."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from .checks import check_like, rows_of

__all__ = ["merge_attention"]

_NAME = "merge_attention"
_MODULE = "mla/merge_attention"


def _check(out_a, lse_a, out_b, lse_b) -> None:
    if out_a.ndim not in (3, 4):
        errors.value_error(_NAME, "out_a", "[B, S, H, D] or [T, H, D]", out_a)
    errors.check_dtype(_NAME, "out_a", out_a, errors.FLOATS)
    check_like(_NAME, "out_b", out_b, tuple(out_a.shape), out_a, "out_a")
    *lead, rows, heads, _ = out_a.shape
    expected = (*lead, heads, rows)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(lse.shape) != expected:
            errors.value_error(_NAME, name, f"{[*expected]} float32", lse)
        if lse.dtype not in (torch.float32, torch.float64 if out_a.dtype == torch.float64 else torch.float32):
            errors.type_error(_NAME, name, f"{[*expected]} float32", lse)
        errors.check_device(_NAME, name, lse, out_a, "out_a")


def _fake(out_a, lse_a, out_b, lse_b):
    _check(out_a, lse_a, out_b, lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _fake_backward(dout, dlse, out_a, lse_a, out_b, lse_b):
    return tuple(x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))


merge_attention_fwd = kernel(
    "merge_attention_fwd(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
)
merge_attention_bwd = kernel(
    "merge_attention_bwd(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_backward,
)


@gradient_of(merge_attention_fwd)
class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_a, lse_a, out_b, lse_b):
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b)
        return merge_attention_fwd(out_a, lse_a, out_b, lse_b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return merge_attention_bwd(rows_of(dout), dlse, *ctx.saved_tensors)


@op(
    module=_MODULE,
    kernels=("merge_attention_fwd", "merge_attention_bwd"),
    differentiable=("out_a", "lse_a", "out_b", "lse_b"),
)
def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from the results over each.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b``, in float32
    with one rounding.

    Args:
        out_a, out_b: ``[B, S, H, D]`` or packed ``[T, H, D]``, each with its own strides; float32, bfloat16 or float16
            (float64 on the reference backend).
        lse_a, lse_b: ``[B, H, S]`` or packed ``[H, T]`` float32, natural logarithm. -inf (and +inf, which some kernels
            write) marks a side without keys: its ``out`` may hold anything.

    Returns:
        ``(out, lse)``, contiguous; two empty sides give 0 and -inf.

    Gradient: for all four arguments; 0 for a side without keys. Deterministic and batch-invariant.

    Raises:
        ValueError: wrong shapes. TypeError: wrong dtypes.

    Source: split softmax, e.g. Dao et al., Flash-Decoding (2023).
    """
    _check(out_a, lse_a, out_b, lse_b)
    args = (rows_of(out_a), lse_a, rows_of(out_b), lse_b)
    return _Merge.apply(*args) if errors.needs_grad(out_a, lse_a, out_b, lse_b) else merge_attention_fwd(*args)
