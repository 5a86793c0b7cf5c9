"""Integer codes of 8, 6 and 4 bits with one scale per group: ``int_quantize`` and ``int_dequantize``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import errors
from ...library import STANDARD_DTYPES, kernel, op
from ..fp8.quantize import FLOAT32_MAX, as_rows, only_standard_out

__all__ = ["int_dequantize", "int_quantize"]

_MODULE = "lowbit/quantize"
BITS = (8, 6, 4)
# elements that fill whole bytes, and the bytes
UNITS = {8: (1, 1), 6: (4, 3), 4: (2, 1)}
CODES = (torch.uint8, torch.int8)
_NOT_DIFFERENTIABLE = "quantisation has no gradient (fake_quantize has one)"


def code_dtype(bits: int, symmetric: bool) -> torch.dtype:
    return torch.int8 if bits == 8 and symmetric else torch.uint8


def bytes_of(columns: int, bits: int) -> int:
    """Bytes of a row of codes, filling included."""
    elements, size = UNITS[bits]
    return (columns + elements - 1) // elements * size


def columns_of(size: int, bits: int) -> int:
    """Elements that so many bytes of a row hold, filling included."""
    elements, unit = UNITS[bits]
    return size // unit * elements


def groups_of(columns: int, group_size: int) -> int:
    """Groups of a row; the last one may be shorter."""
    return 1 if group_size == 0 else (columns + group_size - 1) // group_size


def check_format(name: str, bits: int, group_size: int) -> None:
    if bits not in BITS:
        errors.value_error(name, "bits", "8, 6 or 4", bits)
    if group_size < 0:
        errors.value_error(name, "group_size", "at least 1, or 0 for the whole last dim", group_size)


def check_values(name: str, arg: str, x: Tensor) -> None:
    errors.check_dtype(name, arg, x, errors.FLOATS)
    if x.ndim < 1:
        errors.value_error(name, arg, "[..., K]", x)


def check_eps(name: str, eps: float, bits: int) -> None:
    """Kernels round eps to float32; the smallest scale that it gives is a normal number."""
    least = (2**bits - 1) * 2.0**-126
    if not least <= eps <= FLOAT32_MAX:
        errors.value_error(name, "eps", f"in [{least:.4g}, {FLOAT32_MAX:.4g}] (eps / {2**bits - 1} normal)", eps)


def as_groups(x: Tensor) -> Tensor:
    """Values of groups, ``[..., G]``, as ``[rows, G]``."""
    return errors.check_last_dim_contiguous(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _fake_quantize(
    x: Tensor, bits: int, group_size: int, symmetric: bool, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, k = x.shape
    groups = groups_of(k, group_size)
    return (
        x.new_empty((rows, bytes_of(k, bits)), dtype=code_dtype(bits, symmetric)),
        x.new_empty((rows, groups), dtype=torch.float32),
        x.new_empty((rows, groups), dtype=torch.uint8),
    )


def _fake_dequantize(
    q: Tensor, _scale: Tensor, _zero: Tensor | None, bits: int, _group_size: int, out_dtype: torch.dtype
) -> Tensor:
    return q.new_empty((q.shape[0], columns_of(q.shape[1], bits)), dtype=out_dtype)


def shared_bytes(columns: int, bits: int, group_size: int) -> str | None:
    """Why a kernel whose programs have groups of their own cannot store such codes."""
    if group_size % UNITS[bits][0] and groups_of(columns, group_size) > 1:
        return "groups that share a byte"
    return None


int_quantize_fwd = kernel(
    "int_quantize_fwd(Tensor x, int bits, int group_size, bool symmetric, float eps) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_quantize,
    when={"triton": lambda x, bits, group_size, *_: shared_bytes(x.shape[1], bits, group_size)},
)
int_dequantize_fwd = kernel(
    "int_dequantize_fwd(Tensor q, Tensor scale, Tensor? zero, int bits, int group_size, ScalarType out_dtype) "
    "-> Tensor",
    module=_MODULE,
    fake=_fake_dequantize,
    dtypes={b: CODES for b in ("cpu", "triton")},
    when={b: only_standard_out for b in ("cpu", "triton")},
)


@op(module=_MODULE, kernels=("int_quantize_fwd",), not_repeated="views of its arguments and results")
def int_quantize(
    x: Tensor, *, bits: int = 8, group_size: int = 0, symmetric: bool = True, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises groups of ``x`` to integer codes with one scale and zero each: ``x ~= (code - zero) * scale``.

    The rule, in float32 and with the same bits on every backend. The extremes are those of a group's finite elements,
    divisions are correctly rounded, ``round`` goes to the nearest integer, ties to even:

    * symmetric, with ``qmax = 2^(bits-1) - 1``: ``scale = max(amax, eps) / qmax``, and 1 where ``amax`` is 0;
      ``code - zero = round(clamp(x / scale, -qmax, qmax))``, so that -128 and -8 do not occur;
    * asymmetric, with ``low = min(0, min)``, ``high = max(0, max)`` and ``top = 2^bits - 1``:
      ``scale = max(high - low, eps) / top``, and 1 where ``high == low`` (a difference past float32 is its maximum);
      ``zero = clamp(round(-low / scale), 0, top)``, ``code = clamp(round(x / scale) + zero, 0, top)``.

    NaN becomes the code of 0 in its own element only, infinities the code at their end. The sign of a zero is lost.

    Args:
        x: ``[..., K]`` of rank 1 or more; float32, bfloat16 or float16 (float64 on the reference backend, rounded to
            float32 first). Any strides; a copy is made if the last dim is not contiguous. Any size, also 0.
        bits: 8, 6 or 4.
        group_size: elements of a group along the last dim, whose last group may be shorter; 0: all of them.
        symmetric: see above.
        eps: lower bound of a range that is not 0, rounded to float32; ``eps / (2^bits - 1)`` must be a normal number.

    Returns:
        ``(q, scale, zero)``, all contiguous:

        * q: of 8 bits ``[..., K]``, int8 (symmetric) or uint8. Below, uint8: of 4 bits ``[..., ceil(K / 2)]`` with the
          even element in the low nibble; of 6 bits ``[..., 3 ceil(K / 4)]``, for each 32 elements 16 bytes of low
          nibbles, the even element low, and 8 bytes of the upper pairs of bits, element 4i lowest; a last block of t
          elements, a multiple of 4, is t / 2 + t / 4 bytes. What fills the last byte up is the zero of the last group.
        * scale: ``[..., G]`` float32, ``G = ceil(K / group_size)``; 1 with ``group_size=0``, where K is 0 too.
        * zero: ``[..., G]`` uint8, the code of 0: of symmetric codes 0 (8 bits) or ``2^(bits-1)``.

    Not differentiable (``fake_quantize`` is). Deterministic and batch-invariant. Triton leaves groups that share a byte
    (an odd ``group_size`` of 4 bits) to the reference.

    Raises:
        ValueError: bits, group_size or eps out of range, x without dims.
        TypeError: x is not a float tensor.
        RuntimeError: x requires grad and grad mode is on.

    Example::

        q, scale, zero = tilefuse.int_quantize(torch.randn(64, 256), bits=4, group_size=32)

    Source: Jacob et al. (arXiv 1712.05877), section 2.1; groups as in GPTQ (arXiv 2210.17323).
    """
    name = "int_quantize"
    check_format(name, bits, group_size)
    check_values(name, "x", x)
    check_eps(name, eps, bits)
    errors.check_not_differentiated(name, _NOT_DIFFERENTIABLE, x=x)
    q, scale, zero = int_quantize_fwd(as_rows(x), bits, group_size, symmetric, eps)
    lead = x.shape[:-1]
    return q.view(*lead, q.shape[1]), scale.view(*lead, scale.shape[1]), zero.view(*lead, zero.shape[1])


def check_codes(name: str, q: Tensor, bits: int) -> None:
    """Codes as ``int_quantize`` stores them: dtype and whole bytes."""
    errors.check_dtype(name, "q", q, CODES if bits == 8 else CODES[:1])
    if q.ndim < 1:
        errors.value_error(name, "q", "[..., bytes of K codes]", q)
    unit = UNITS[bits][1]
    if q.shape[-1] % unit:
        errors.value_error(name, "q", f"[..., a multiple of {unit} bytes] with {bits} bits", q)


def check_groups(name: str, arg: str, x: Tensor, q: Tensor, bits: int, group_size: int) -> None:
    """One value for each group of the codes, whose number of columns is known but for the filling."""
    columns = columns_of(q.shape[-1], bits)
    most = groups_of(columns, group_size)
    least = groups_of(max(columns - UNITS[bits][0] + 1, 0), group_size)
    if x.ndim != q.ndim or x.shape[:-1] != q.shape[:-1] or not least <= x.shape[-1] <= most:
        count = f"{least}" if least == most else f"{least} to {most}"
        errors.value_error(name, arg, f"{[*q.shape[:-1]]} with {count} groups", x)


@op(
    module=_MODULE,
    kernels=("int_dequantize_fwd",),
    dtypes=CODES,
    not_repeated="views of its arguments and results",
)
def int_dequantize(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int = 8,
    group_size: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``(code - zero) * scale`` of each group: a product in float32, rounded to ``out_dtype``.

    Args:
        q: codes as ``int_quantize`` stores them, any strides: ``[..., K]`` int8 or uint8 of 8 bits, else uint8
            ``[..., bytes]``, of 6 bits a multiple of 3.
        scale: ``[..., G]`` float32, bfloat16 or float16, the last two read as float32.
        zero: ``[..., G]`` uint8 or float32 (subtracted in float32). None: 0 of int8 codes, ``2^(bits-1)`` of 6 and 4
            bits; 8-bit uint8 codes need one.
        bits, group_size: as in ``int_quantize``.
        out_dtype: float32, bfloat16, float16, or float64 (reference backend; the product is then exact).

    Returns:
        ``[..., columns]``, contiguous: all that the bytes hold, ``K`` rounded up to 2 (4 bits) or 4 (6 bits). What
        ``int_quantize`` filled up with is 0.

    Not differentiable. Deterministic and batch-invariant, the same bits on every backend.

    Raises:
        ValueError: bits, group_size, shapes, uint8 codes of 8 bits without a zero.
        TypeError: wrong dtypes.
        RuntimeError: scale or zero requires grad and grad mode is on.

    Example::

        q, scale, zero = tilefuse.int_quantize(torch.randn(64, 256), bits=4, group_size=32)
        w = tilefuse.int_dequantize(q, scale, zero, bits=4, group_size=32)

    Source: Jacob et al. (arXiv 1712.05877), equation 1; the inverse of ``int_quantize`` up to its rounding.
    """
    name = "int_dequantize"
    check_format(name, bits, group_size)
    check_codes(name, q, bits)
    errors.check_dtype(name, "scale", scale, STANDARD_DTYPES)
    check_groups(name, "scale", scale, q, bits, group_size)
    errors.check_device(name, "scale", scale, q, "q")
    if zero is not None:
        errors.check_dtype(name, "zero", zero, (torch.uint8, torch.float32))
        if zero.shape != scale.shape:
            errors.value_error(name, "zero", f"of scale's shape {[*scale.shape]}", zero)
        errors.check_device(name, "zero", zero, q, "q")
    elif bits == 8 and q.dtype == torch.uint8:
        errors.value_error(name, "zero", "given with uint8 codes of 8 bits", zero)
    if out_dtype not in errors.FLOATS:
        errors.type_error(name, "out_dtype", " or ".join(map(errors.dtype_name, errors.FLOATS)), out_dtype)
    errors.check_not_differentiated(name, "scales and zeros get no gradient", scale=scale, zero=zero)
    out = int_dequantize_fwd(
        as_rows(q),
        as_groups(scale.to(torch.float32)),
        None if zero is None else as_groups(zero),
        bits,
        group_size,
        out_dtype,
    )
    return out.view(*q.shape[:-1], out.shape[1])
