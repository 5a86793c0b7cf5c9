"""``fp8_matmul``: block-scaled e4m3 matrix product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ... import arch, errors
from ...library import kernel, op
from ...packing import PackedWeight, Weight, check_weight_scale, operand, refuse_packed
from .quantize import CODES, blocks_of, check_scale, only_standard_out

__all__ = ["fp8_matmul"]

_MODULE = "fp8/matmul"


def check_out_dtype(name: str, out_dtype: torch.dtype) -> None:
    if out_dtype not in errors.FLOATS:
        errors.type_error(name, "out_dtype", " or ".join(map(errors.dtype_name, errors.FLOATS)), out_dtype)


def weight_scale(name: str, b: Weight, b_scale: Tensor | None) -> Tensor:
    """The checked scales of ``b [.., N, K]``; a packed weight holds its own."""
    if b_scale is None and isinstance(b, PackedWeight):
        b_scale = b.scale
    return check_weight_scale(name, "b_scale", b_scale, b, b, "b")


def check_activation(name: str, a: Tensor, a_scale: Tensor | None, shape: str) -> None:
    """a: e4m3 codes with 1 x 128 scales, or floats without."""
    errors.check_dtype(name, "a", a, (CODES,) if a_scale is not None else errors.FLOATS)
    if a.ndim != 2:
        errors.value_error(name, "a", shape, a)
    if a_scale is None:
        errors.check_not_differentiated(name, "it has no gradient (fp8_linear has one)", a=a)
    else:
        check_scale(name, "a_scale", a_scale, (a.shape[0], blocks_of(a.shape[1])), a, "a")


def _fake(
    a: Tensor, _a_scale: Tensor | None, b: Tensor, _b_scale: Tensor, _bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _starts_at_16(t: Tensor) -> bool:
    """Whether the data starts at a multiple of 16 bytes; the base of a fake tensor has no address and counts as one."""
    start = t.storage_offset() * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()
    return start % 16 == 0


def _triton_refuses(
    _a: Tensor, _a_scale: Tensor | None, b: Tensor, _b_scale: Tensor, _bias: Tensor | None, out_dtype: torch.dtype
) -> str | None:
    return refuse_packed(b, 2) or only_standard_out(out_dtype)


def _hopper_refuses(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, _bias: Tensor | None, out_dtype: torch.dtype
) -> str | None:
    """What the TMA copies of csrc/fp8/matmul_sm90.cu ask for; everything else is Triton's."""
    if b.ndim > 2:
        return refuse_packed(b, 2)
    (m, k), n = a.shape, b.shape[0]
    if arch.of(a.device) != "sm_90":
        return "needs a Hopper GPU (sm_90)"
    if m <= 64:
        return "is for M > 64: small M streams the weight, which Triton's operand order does better"
    if b_scale.shape[0] != blocks_of(n) or n == 1:
        return "takes (128, 128) weight scales"
    if k == 0 or any(t.stride(0) % 16 or not _starts_at_16(t) for t in (a, b)):
        return "rows of a and b must be multiples of 16 bytes and start at one"
    # a tensor map has no rows that overlap, such as an expanded row's
    if any(t.stride(0) < k for t in (a, b)):
        return "rows of a and b must not overlap"
    if a_scale.stride(0) != 1 or not _starts_at_16(a_scale):
        return "a_scale must be M-major and start at a multiple of 16 bytes"
    if a_scale.shape[1] > 1 and (a_scale.stride(1) % 4 or a_scale.stride(1) < m):
        return "a_scale must have a K-block stride of at least M that is a multiple of 4"
    if b_scale.stride(1) != 1:
        return "b_scale must be row-major"
    if out_dtype != torch.float32 and n % 8:
        return "16-bit output rows must be multiples of 16 bytes"
    return only_standard_out(a, a_scale, b, b_scale, _bias, out_dtype)


fp8_matmul_fwd = kernel(
    "fp8_matmul_fwd(Tensor a, Tensor? a_scale, Tensor b, Tensor b_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    module=_MODULE,
    fake=_fake,
    backends=("reference", "cpu", "triton", "cuda"),
    # float activations meet e4m3 weights where products are bfloat16 anyway
    dtypes={"cpu": (CODES, torch.bfloat16), "triton": (CODES,), "cuda": (CODES,)},
    when={"cpu": only_standard_out, "triton": _triton_refuses, "cuda": _hopper_refuses},
)


@op(
    module=_MODULE,
    kernels=("fp8_matmul_fwd",),
    dtypes=(CODES, *errors.FLOATS),
)
def fp8_matmul(
    a: Tensor,
    a_scale: Tensor | None,
    b: Weight,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``out[m, n] = sum_k a[m, k] * a_scale[m, k / 128] * b[n, k] * b_scale[n or n / 128, k / 128] + bias[n]``.

    Codes are multiplied exactly, products accumulate in float32 over at most 128 of K before the scales are applied
    in float32 and the result joins a float32 sum (Hopper's FP8 tensor cores alone keep about 14 bits). One rounding
    to ``out_dtype`` at the end.

    Without ``a_scale`` (W8A16) a keeps its own dtype, and its scales count as 1: 13 times less error than with
    quantised activations and, on a CPU, whose products are bfloat16 either way, the faster form. A GPU multiplies codes
    faster, and there this form is the reference's.

    Args:
        a: ``[M, K]`` float8_e4m3fn; without ``a_scale`` bfloat16 (or float32, float16, float64 on the reference
            backend).
        a_scale: ``[M, ceil(K / 128)]`` float32 dequantisation scales, as from ``fp8_quantize(x)``; any strides, fastest
            in the layout that function returns. Or None.
        b: ``[N, K]`` float8_e4m3fn (a weight as ``torch.nn.Linear`` stores it), or what ``pack_weight`` made of it: the
            same bits, sooner with few rows.
        b_scale: ``[ceil(N / 128), ceil(K / 128)]`` (128 x 128 blocks) or ``[N, ceil(K / 128)]`` (1 x 128 blocks, the
            weight gradient's form) float32, told apart by its shape; any strides. None takes a packed weight's own.
        bias: ``[N]`` of any float dtype, added in float32; None for none.
        out_dtype: bfloat16, float16, float32, or float64 (reference backend, exact up to float64 rounding).

    M, N and K are any sizes, also 0 (K = 0 gives the bias). a and b may have any strides; a copy is made if the last
    dim is not contiguous.

    Returns:
        ``[M, N]``, contiguous.

    Not differentiable (``fp8_linear`` is). Deterministic and batch-invariant: on the CPU to the bit whatever M is; on
    GPUs for calls that take the same tile (M <= 64 and M > 64 differ in the order of operands and of sums: for few
    rows K may be split among programs, whose sums are added in a fixed order).

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: wrong dtypes.
        RuntimeError: a, a scale or the bias requires grad and grad mode is on.

    Example::

        q, s = tilefuse.fp8_quantize(x)
        w, ws = tilefuse.fp8_quantize(weight, block=(128, 128))
        y = tilefuse.fp8_matmul(q, s, w, ws)

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3), DeepGEMM.
    """
    name = "fp8_matmul"
    check_activation(name, a, a_scale, "[M, K]")
    errors.check_dtype(name, "b", b, (CODES,))
    if b.ndim != 2 or b.shape[1] != a.shape[1]:
        errors.value_error(name, "b", f"[N, {a.shape[1]}]", b)
    errors.check_device(name, "b", b, a, "a")
    b_scale = weight_scale(name, b, b_scale)
    if bias is not None:
        if tuple(bias.shape) != (b.shape[0],):
            errors.value_error(name, "bias", f"[{b.shape[0]}]", bias)
        errors.check_dtype(name, "bias", bias, errors.FLOATS)
        errors.check_device(name, "bias", bias, a, "a")
        errors.check_not_differentiated(name, "it has no gradient (fp8_linear has one)", bias=bias)
    check_out_dtype(name, out_dtype)
    return matmul(a, a_scale, b, b_scale, bias, out_dtype)


def matmul(
    a: Tensor, a_scale: Tensor | None, b: Weight, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The kernel on checked arguments of any strides."""
    if bias is not None:
        bias = bias.to(torch.float64 if out_dtype == torch.float64 else torch.float32).contiguous()
    return fp8_matmul_fwd(errors.check_last_dim_contiguous(a), a_scale, operand(b), b_scale, bias, out_dtype)
