"""``fp8_grouped_matmul``: one block-scaled e4m3 matrix product per expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op
from ...packing import Weight, operand, refuse_packed
from .matmul import check_activation, check_out_dtype, weight_scale
from .quantize import CODES, only_standard_out

__all__ = ["fp8_grouped_matmul"]

_MODULE = "fp8/grouped_matmul"


def _fake(
    a: Tensor, _a_scale: Tensor | None, b: Tensor, _b_scale: Tensor, _offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _triton_refuses(
    _a: Tensor, _a_scale: Tensor | None, b: Tensor, _b_scale: Tensor, _offsets: Tensor, out_dtype: torch.dtype
) -> str | None:
    return refuse_packed(b, 3) or only_standard_out(out_dtype)


fp8_grouped_matmul_fwd = kernel(
    "fp8_grouped_matmul_fwd(Tensor a, Tensor? a_scale, Tensor b, Tensor b_scale, Tensor offsets, "
    "ScalarType out_dtype) -> Tensor",
    module=_MODULE,
    fake=_fake,
    dtypes={"cpu": (CODES, torch.bfloat16), "triton": (CODES,)},
    when={"cpu": only_standard_out, "triton": _triton_refuses},
)


@op(
    module=_MODULE,
    kernels=("fp8_grouped_matmul_fwd",),
    dtypes=(CODES, *errors.FLOATS),
)
def fp8_grouped_matmul(
    a: Tensor,
    a_scale: Tensor | None,
    b: Weight,
    b_scale: Tensor | None,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rows ``offsets[e]:offsets[e + 1]`` of ``a`` meet ``b[e]``: ``fp8_matmul`` for each expert, in one launch.

    Args:
        a: ``[T, K]`` float8_e4m3fn, rows sorted by expert (``moe_plan`` gives the order and the offsets); without
            ``a_scale`` bfloat16 (other floats on the reference backend).
        a_scale: ``[T, ceil(K / 128)]`` float32, any strides, or None (W8A16).
        b: ``[E, N, K]`` float8_e4m3fn, or what ``pack_weight`` made of it. E = 0 is legal.
        b_scale: ``[E, ceil(N / 128), ceil(K / 128)]`` or ``[E, N, ceil(K / 128)]`` float32, told apart by its shape;
            None takes a packed weight's own.
        offsets: ``[E + 1]`` int32 or int64, ascending, read on the device: nothing waits for the host. Groups may be
            empty and of any size. Values are clamped to [0, T]; they never lead out of the tensors.
        out_dtype: bfloat16, float16, float32, or float64 (reference backend).

    Returns:
        ``[T, N]``, contiguous; rows before ``offsets[0]`` and from ``offsets[E]`` on are zero.

    Arithmetic, strides and errors as in ``fp8_matmul``. Not differentiable. Deterministic; a row's result does not
    depend on the other rows or on the sizes of the groups.

    Source: DeepGEMM's m-grouped contiguous GEMM, without its alignment of group sizes.
    """
    name = "fp8_grouped_matmul"
    check_activation(name, a, a_scale, "[T, K]")
    errors.check_dtype(name, "b", b, (CODES,))
    if b.ndim != 3 or b.shape[2] != a.shape[1]:
        errors.value_error(name, "b", f"[E, N, {a.shape[1]}]", b)
    errors.check_device(name, "b", b, a, "a")
    b_scale = weight_scale(name, b, b_scale)
    if tuple(offsets.shape) != (b.shape[0] + 1,):
        errors.value_error(name, "offsets", f"[{b.shape[0] + 1}] int32 or int64", offsets)
    if offsets.dtype not in errors.INDEX_DTYPES:
        errors.type_error(name, "offsets", f"[{b.shape[0] + 1}] int32 or int64", offsets)
    errors.check_device(name, "offsets", offsets, a, "a")
    check_out_dtype(name, out_dtype)
    a = errors.check_last_dim_contiguous(a)
    return fp8_grouped_matmul_fwd(a, a_scale, operand(b), b_scale, offsets.contiguous(), out_dtype)
