"""``int8_matmul``: the product of 8-bit integers, exact until it is scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op
from ..fp8.matmul import check_out_dtype
from ..fp8.quantize import only_standard_out

__all__ = ["int8_matmul"]

_MODULE = "lowbit/int8_matmul"
CODES = (torch.int8, torch.uint8)
_NO_GRADIENT = "it has no gradient"


def check_row_values(name: str, arg: str, value: Tensor, rows: int, letter: str, like: Tensor, like_arg: str) -> int:
    """Checks float32 scales ``[rows]`` or ``[rows, G]``; returns G, 1 for the former."""
    if value.ndim not in (1, 2) or value.shape[0] != rows:
        errors.value_error(name, arg, f"[{letter}] or [{letter}, G] with {letter} = {rows}", value)
    errors.check_dtype(name, arg, value, (torch.float32,))
    errors.check_device(name, arg, value, like, like_arg)
    errors.check_not_differentiated(name, _NO_GRADIENT, **{arg: value})
    return value.shape[1] if value.ndim == 2 else 1


def check_groups(name: str, a_groups: int, b_groups: int, k: int) -> None:
    """Both scales count the same groups, or one of them a single one; all groups of K have the same size."""
    if a_groups != b_groups and a_groups != 1 and b_groups != 1:
        raise ValueError(
            f"tilefuse.{name}: b_scale must be of a_scale's {a_groups} groups or of one, got {b_groups} groups"
        )
    groups = b_groups if a_groups == 1 else a_groups
    if k % groups if groups else k:
        raise ValueError(f"tilefuse.{name}: K must be a multiple of the number of groups, {groups}, got {k}")


def _fake(
    a: Tensor,
    _a_scale: Tensor,
    b: Tensor,
    _b_scale: Tensor,
    _bias: Tensor | None,
    _a_zero: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


int8_matmul_fwd = kernel(
    "int8_matmul_fwd(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, Tensor? a_zero, "
    "ScalarType out_dtype) -> Tensor",
    module=_MODULE,
    fake=_fake,
    dtypes={"cpu": CODES, "triton": CODES},
    when={"cpu": only_standard_out, "triton": only_standard_out},
)


@op(module=_MODULE, kernels=("int8_matmul_fwd",), dtypes=CODES)
def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_zero: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``out[m, n] = sum_g (a_scale[m, g] * b_scale[n, g]) * sum_{k in g} (a[m, k] - a_zero[m]) * b[n, k] + bias[n]``.

    W8A8 with the same bits on every backend, instruction set and GPU, whatever the other rows are. The rule: the sum
    over a group's K is an exact integer, rounded once to float32; it is multiplied by the float32 product of its two
    scales; groups are added in float32 from the first to the last, starting at 0; then the bias is added, and the
    result is rounded once to ``out_dtype``. Every code is legal, -128 among them, and K has no limit.

    Args:
        a: ``[M, K]`` int8, or uint8 with ``a_zero``.
        a_scale: ``[M]`` or ``[M, G]`` float32.
        b: ``[N, K]`` int8 (a weight as ``torch.nn.Linear`` stores it).
        b_scale: ``[N]`` or ``[N, G]`` float32. Where one scale has several groups and the other has none or one, that
            one counts for all of them.
        bias: ``[N]`` of any float dtype, added in float32; None for none.
        a_zero: ``[M]`` or ``[M, 1]`` uint8, the code of 0 of each row; with a uint8 ``a``, and only then.
        out_dtype: bfloat16, float16, float32, or float64 (reference backend: the exact sums are scaled in float64).

    M, N and K are any sizes, also 0 (K = 0 gives the bias). Groups are of K / G elements, a whole number. All tensors
    may have any strides; a copy is made of a or b if its last dim is not contiguous.

    Returns:
        ``[M, N]``, contiguous.

    Not differentiable. Deterministic and batch-invariant, to the bit.

    Raises:
        ValueError: shapes that do not fit together, a K that the groups do not divide, a uint8 ``a`` without
            ``a_zero`` or an int8 one with it.
        TypeError: wrong dtypes.
        RuntimeError: a scale or the bias requires grad and grad mode is on.

    Example::

        a, b = (torch.randint(-127, 128, (rows, 64), dtype=torch.int8) for rows in (3, 8))
        y = tilefuse.int8_matmul(a, torch.rand(3), b, torch.rand(8))

    Source: the order of operations of int8 inference (Jacob et al., arXiv 1712.05877), with its rounding fixed.
    """
    name = "int8_matmul"
    errors.check_dtype(name, "a", a, CODES)
    if a.ndim != 2:
        errors.value_error(name, "a", "[M, K]", a)
    errors.check_dtype(name, "b", b, (torch.int8,))
    if b.ndim != 2 or b.shape[1] != a.shape[1]:
        errors.value_error(name, "b", f"[N, {a.shape[1]}]", b)
    errors.check_device(name, "b", b, a, "a")
    a_groups = check_row_values(name, "a_scale", a_scale, a.shape[0], "M", a, "a")
    b_groups = check_row_values(name, "b_scale", b_scale, b.shape[0], "N", a, "a")
    check_groups(name, a_groups, b_groups, a.shape[1])
    if bias is not None:
        if tuple(bias.shape) != (b.shape[0],):
            errors.value_error(name, "bias", f"[{b.shape[0]}]", bias)
        errors.check_dtype(name, "bias", bias, errors.FLOATS)
        errors.check_device(name, "bias", bias, a, "a")
        errors.check_not_differentiated(name, _NO_GRADIENT, bias=bias)
        bias = bias.to(torch.float64 if out_dtype == torch.float64 else torch.float32).contiguous()
    if a_zero is not None:
        errors.check_dtype(name, "a_zero", a_zero, (torch.uint8,))
        if a_zero.ndim not in (1, 2) or a_zero.shape[0] != a.shape[0] or (a_zero.ndim == 2 and a_zero.shape[1] != 1):
            errors.value_error(name, "a_zero", f"[{a.shape[0]}] or [{a.shape[0]}, 1]", a_zero)
        errors.check_device(name, "a_zero", a_zero, a, "a")
    if (a.dtype == torch.uint8) != (a_zero is not None):
        expected = "given with a uint8 a" if a_zero is None else "None with an int8 a"
        errors.value_error(name, "a_zero", expected, a_zero)
    check_out_dtype(name, out_dtype)
    a, b = errors.check_last_dim_contiguous(a), errors.check_last_dim_contiguous(b)
    return int8_matmul_fwd(a, a_scale, b, b_scale, bias, a_zero, out_dtype)
