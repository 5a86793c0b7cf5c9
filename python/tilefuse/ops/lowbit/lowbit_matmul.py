"""``lowbit_matmul``: floats times a weight of 8, 6 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import errors, library
from ...library import STANDARD_DTYPES, gradient_of, kernel, once_differentiable, op
from ..fp8.matmul import check_out_dtype
from ..fp8.quantize import as_rows, only_standard_out
from .fake_quantize import EPS
from .quantize import CODES, bytes_of, check_format, groups_of, int_dequantize_fwd, int_quantize_fwd

__all__ = ["lowbit_matmul"]

_MODULE = "lowbit/lowbit_matmul"
ACTIVATIONS = ("float", "int8")
ZEROS = (torch.uint8, *STANDARD_DTYPES)


def check_activation(name: str, activation: str, x: Tensor, zero: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        errors.value_error(name, "activation", " or ".join(map(repr, ACTIVATIONS)), activation)
    if activation == "int8":
        if zero is not None and zero.dtype != torch.uint8:
            errors.type_error(name, "zero", "uint8 with activation 'int8', whose sums are integers", zero)
        errors.check_not_differentiated(name, "activation 'int8' has no gradient ('float' has one)", x=x)


def check_weight(
    name: str, q: Tensor, scale: Tensor, zero: Tensor | None, k: int, bits: int, group_size: int, like: Tensor
) -> None:
    """Codes ``[.., N, bytes]`` of K columns with scales and zeros ``[.., N, G]``."""
    errors.check_dtype(name, "q", q, CODES if bits == 8 else CODES[:1])
    errors.check_device(name, "q", q, like, "x")
    groups = groups_of(k, group_size)
    if scale.ndim != q.ndim or scale.shape[:-1] != q.shape[:-1] or scale.shape[-1] != groups:
        errors.value_error(name, "scale", f"{[*q.shape[:-1], groups]}", scale)
    errors.check_dtype(name, "scale", scale, STANDARD_DTYPES)
    errors.check_device(name, "scale", scale, like, "x")
    if zero is not None:
        errors.check_dtype(name, "zero", zero, ZEROS)
        if zero.shape != scale.shape:
            errors.value_error(name, "zero", f"of scale's shape {[*scale.shape]}", zero)
        errors.check_device(name, "zero", zero, like, "x")
    elif bits == 8 and q.dtype == torch.uint8:
        errors.value_error(name, "zero", "given with uint8 codes of 8 bits", zero)
    errors.check_not_differentiated(name, "only x has a gradient", scale=scale, zero=zero)


def check_perm(name: str, perm: Tensor, k: int, like: Tensor) -> None:
    errors.check_dtype(name, "perm", perm, errors.INDEX_DTYPES)
    if tuple(perm.shape) != (k,):
        errors.value_error(name, "perm", f"[{k}]", perm)
    errors.check_device(name, "perm", perm, like, "x")


def check_bias(name: str, bias: Tensor, n: int, like: Tensor) -> None:
    errors.check_dtype(name, "bias", bias, errors.FLOATS)
    if tuple(bias.shape) != (n,):
        errors.value_error(name, "bias", f"[{n}]", bias)
    errors.check_device(name, "bias", bias, like, "x")
    errors.check_not_differentiated(name, "only x has a gradient", bias=bias)


def _fake(x: Tensor, q: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], q.shape[0]), dtype=rest[-1])


def _fake_int8(x: Tensor, _x_scale: Tensor, q: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], q.shape[0]), dtype=rest[-1])


_WEIGHT = "Tensor q, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, ScalarType out_dtype"
lowbit_matmul_fwd = kernel(
    f"lowbit_matmul_fwd(Tensor x, {_WEIGHT}) -> Tensor",
    module=_MODULE,
    fake=_fake,
    when={"cpu": only_standard_out, "triton": only_standard_out},
    linear=("x -bias",),
)
lowbit_matmul_int8 = kernel(
    f"lowbit_matmul_int8(Tensor x, Tensor x_scale, {_WEIGHT}) -> Tensor",
    module=_MODULE,
    fake=_fake_int8,
    dtypes={"cpu": (torch.int8,), "triton": (torch.int8,)},
    when={"cpu": only_standard_out, "triton": only_standard_out},
)


@gradient_of(lowbit_matmul_fwd)
class _LowbitMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, scale, zero, bias, bits, group_size, out_dtype):
        ctx.save_for_backward(q, scale, zero)
        ctx.weight = x.shape[1], x.dtype, bits, group_size
        return lowbit_matmul_fwd(x, q, scale, zero, bias, bits, group_size, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, scale, zero = ctx.saved_tensors
        k, dtype, bits, group_size = ctx.weight
        zero = zero if zero is None or zero.dtype == torch.uint8 else zero.to(torch.float32)
        weight = int_dequantize_fwd(q, scale.to(torch.float32), zero, bits, group_size, dtype)
        return dout.to(dtype) @ weight[:, :k], *(None,) * 7


@op(
    module=_MODULE,
    kernels=("lowbit_matmul_fwd", "lowbit_matmul_int8", "int_quantize_fwd", "int_dequantize_fwd"),
    differentiable=("x",),
    not_repeated="views of its arguments and results",
)
def lowbit_matmul(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    activation: str = "float",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[.., n] = sum_g scale[n, g] * sum_{k in g} x[.., perm[k]] * (code[n, k] - zero[n, g]) + bias[n]``.

    With ``activation="float"`` x keeps its values: ``code - zero`` is exact, products are summed in float32 within a
    group, the sum is multiplied by the group's scale and added to a float32 sum over the groups, from the first on; one
    rounding at the end.

    ``activation="int8"`` first quantises each row of x in the same groups, as ``int_quantize(x, group_size=...)`` does,
    to codes with scales ``s``. The sum over a group is then an exact integer, and the result
    ``sum_g float(sum) * (s[m, g] * scale[n, g]) + bias`` has the same bits on every backend and instruction set. It is
    the faster form on CPUs, and rounds x to 8 bits.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16 (float64 on the reference backend). Any strides; a copy is made if
            the last dim is not contiguous. Under autocast it is cast to its dtype.
        q: ``[N, bytes of K codes]`` as ``int_quantize`` stores them: of 8 bits int8 or uint8 ``[N, K]``; of 6 uint8
            ``[N, 3 ceil(K / 4)]``; of 4 uint8 ``[N, ceil(K / 2)]``, the even element in the low nibble.
        scale: ``[N, G]`` float32, bfloat16 or float16, taken as float32, with ``G = ceil(K / group_size)``; the last
            group may be shorter.
        zero: ``[N, G]`` uint8, or float (subtracted in float32; not with ``activation="int8"``). None: 0 of int8 codes,
            ``2^(bits-1)`` of 6 and 4 bits; uint8 codes of 8 bits need one.
        perm: ``[K]`` int32 or int64, the column of x for each code of a row (act-order); None for the identity.
        bias: ``[N]`` of any float dtype, added in float32.
        bits: 8, 6 or 4.
        group_size: elements of K that share a scale; 0: all of them.
        activation: ``"float"`` or ``"int8"``.
        out_dtype: bfloat16, float16, float32, or float64 (reference backend); None for x's.

    Returns:
        ``[..., N]``, contiguous.

    Any sizes, also 0 (K = 0 gives the bias). NaN and infinities of x stay in their row, with ``activation="int8"`` they
    are what ``int_quantize`` makes of them.

    Gradients: for x, once, with ``activation="float"``: the upstream gradient times the weight dequantised to x's
    dtype, which is held meanwhile. None for the weight, its scales and the bias, which must not require any.
    Deterministic; batch-invariant on the CPU, on GPUs for calls that take the same tile.

    Raises:
        ValueError: bits, group_size, activation or shapes, uint8 codes of 8 bits without a zero.
        TypeError: wrong dtypes, a float zero with ``activation="int8"``.
        RuntimeError: scale, zero or bias requires grad and grad mode is on, or x with ``activation="int8"``.

    Example::

        q, scale, zero = tilefuse.int_quantize(torch.randn(64, 256), bits=4, group_size=32)
        y = tilefuse.lowbit_matmul(torch.randn(3, 256), q, scale, group_size=32)

    Source: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978); integer sums as in Jacob et al. (arXiv 1712.05877).
    """
    name = "lowbit_matmul"
    check_format(name, bits, group_size)
    errors.check_dtype(name, "x", x, errors.FLOATS)
    if x.ndim < 1:
        errors.value_error(name, "x", "[..., K]", x)
    k = x.shape[-1]
    if q.ndim != 2 or q.shape[1] != bytes_of(k, bits):
        errors.value_error(name, "q", f"[N, {bytes_of(k, bits)}] for {k} columns of {bits} bits", q)
    check_weight(name, q, scale, zero, k, bits, group_size, x)
    if bias is not None:
        check_bias(name, bias, q.shape[0], x)
    check_activation(name, activation, x, zero)
    (x,) = library.autocast(x)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_out_dtype(name, out_dtype)
    if perm is not None:
        check_perm(name, perm, k, x)
        x = x.index_select(-1, perm)
    if bias is not None:
        bias = bias.to(torch.float64 if out_dtype == torch.float64 else torch.float32).contiguous()
    weight = (
        errors.check_last_dim_contiguous(q),
        errors.check_last_dim_contiguous(scale),
        None if zero is None else errors.check_last_dim_contiguous(zero),
        bias,
        bits,
        group_size,
        out_dtype,
    )
    rows = as_rows(x)
    if activation == "int8":
        codes, code_scale, _ = int_quantize_fwd(rows, 8, group_size, True, EPS)
        out = lowbit_matmul_int8(codes, code_scale, *weight)
    else:
        out = _LowbitMatmul.apply(rows, *weight) if errors.needs_grad(x) else lowbit_matmul_fwd(rows, *weight)
    return out.view(*x.shape[:-1], q.shape[0])
