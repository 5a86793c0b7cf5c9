"""Matmul of consecutive row groups with one matrix each."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from ...packing import PackedWeight, Weight, check_inference, refuse_packed

__all__ = ["grouped_matmul"]

_MODULE = "moe/grouped_matmul"


def check_offsets(name: str, offsets: Tensor, experts: int, like: Tensor, like_arg: str) -> None:
    if offsets.shape != (experts + 1,):
        errors.value_error(name, "offsets", f"[{experts + 1}] int32 or int64", offsets)
    errors.check_dtype(name, "offsets", offsets, errors.INDEX_DTYPES)
    errors.check_device(name, "offsets", offsets, like, like_arg)


def _check(
    a: Tensor, b: Weight, offsets: Tensor, a_index: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    name = "grouped_matmul"
    if a.dim() != 2:
        errors.value_error(name, "a", "[rows, K]", a)
    errors.check_dtype(name, "a", a, errors.FLOATS)
    if b.dim() != 3 or b.shape[2] != a.shape[1]:
        errors.value_error(name, "b", f"[E, N, {a.shape[1]}]", b)
    if b.dtype != a.dtype:
        errors.type_error(name, "b", f"of a's dtype {a.dtype}", b)
    errors.check_device(name, "b", b, a, "a")
    check_offsets(name, offsets, b.shape[0], a, "a")
    if a_index is not None:
        if a_index.dim() != 1:
            errors.value_error(name, "a_index", "[rows of the output] int32 or int64", a_index)
        errors.check_dtype(name, "a_index", a_index, errors.INDEX_DTYPES)
        errors.check_device(name, "a_index", a_index, a, "a")
    if bias is not None:
        if bias.shape != b.shape[:2]:
            errors.value_error(name, "bias", f"{[*b.shape[:2]]} of a's dtype", bias)
        if bias.dtype != a.dtype:
            errors.type_error(name, "bias", f"of a's dtype {a.dtype}", bias)
        errors.check_device(name, "bias", bias, a, "a")
    if out_dtype not in (None, a.dtype, torch.float32):
        errors.type_error(name, "out_dtype", f"{a.dtype} or torch.float32", out_dtype)


def either_contiguous(b: Weight) -> Tensor:
    """b with a contiguous last or middle dim: transposed weights are read in place, packed ones as they are."""
    if isinstance(b, PackedWeight):
        return b.data
    return b if 1 in b.stride()[1:] or b.numel() == 0 else b.contiguous()


def not_triton(b: Tensor, b_scale: Tensor | None) -> str | None:
    """What the GPU kernels leave to the CPU and to the reference."""
    if b_scale is not None:
        return "float activations times e4m3 weights are for the CPU"
    return refuse_packed(b, 3)


def only_bfloat16(a: Tensor, b_scale: Tensor | None) -> str | None:
    """What the CPU kernels take with e4m3 weights."""
    return "e4m3 weights meet bfloat16 activations" if b_scale is not None and a.dtype != torch.bfloat16 else None


def _fwd_fake(a, b, offsets, a_index, bias, index_div, out_dtype, b_scale):
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    return a.new_empty((rows, b.shape[1]), dtype=out_dtype)


grouped_matmul_fwd = kernel(
    "grouped_matmul_fwd(Tensor a, Tensor b, Tensor offsets, Tensor? a_index, Tensor? bias, int index_div,"
    " ScalarType out_dtype, Tensor? b_scale) -> Tensor",
    module=_MODULE,
    fake=_fwd_fake,
    when={
        "cpu": lambda a, b, offsets, a_index, bias, index_div, out_dtype, b_scale: only_bfloat16(a, b_scale),
        "triton": lambda a, b, offsets, a_index, bias, index_div, out_dtype, b_scale: not_triton(b, b_scale),
    },
    linear=("a -bias", "b bias"),
)
grouped_matmul_wgrad = kernel(
    "grouped_matmul_wgrad(Tensor a, Tensor dout, Tensor offsets, Tensor? a_index, Tensor? dout_index, int index_div,"
    " ScalarType out_dtype) -> Tensor",
    module=_MODULE,
    fake=lambda a, dout, offsets, a_index, dout_index, index_div, out_dtype: a.new_empty(
        (offsets.shape[0] - 1, dout.shape[1], a.shape[1]), dtype=out_dtype
    ),
    linear=("a", "dout"),
)


def grouped_bias_grad(dout: Tensor, offsets: Tensor, dout_index: Tensor | None, index_div: int, dtype: torch.dtype):
    """Sum of each group's rows of dout ``[E, N]``: a weight gradient against a column of ones."""
    rows = dout.shape[0] if dout_index is None else dout_index.shape[0]
    ones = dout.new_ones((rows, 1))
    return grouped_matmul_wgrad(ones, dout, offsets, None, dout_index, index_div, dtype)[..., 0]


def scatter_rows(rows: Tensor, index: Tensor, offsets: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Sums rows ``[P, K]`` float32 into ``out[index[p]]``; positions outside the groups are not read."""
    at = torch.arange(index.shape[0], device=index.device)
    use = (at >= offsets[0]) & (at < offsets[-1]) & (index >= 0) & (index < size)
    # one spare row takes what nobody owns; index_put accumulates in a fixed order
    target = torch.where(use, index, size)
    return rows.new_zeros((size + 1, rows.shape[1])).index_put((target,), rows, accumulate=True)[:size].to(dtype)


@gradient_of(grouped_matmul_fwd)
class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, offsets, a_index, bias, index_div, out_dtype, b_scale):
        if b_scale is not None or b.ndim > 3:
            raise NotImplementedError("tilefuse.grouped_matmul: packed and e4m3 weights have no derivative")
        ctx.save_for_backward(a, b, offsets, a_index)
        ctx.has_bias, ctx.index_div = bias is not None, index_div
        return grouped_matmul_fwd(a, b, offsets, a_index, bias, index_div, out_dtype, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        a, b, offsets, a_index = ctx.saved_tensors
        da = db = dbias = None
        dout = dout.to(a.dtype).contiguous()
        if ctx.needs_input_grad[0]:
            if a_index is None:
                da = grouped_matmul_fwd(dout, b.transpose(1, 2), offsets, None, None, 1, a.dtype, None)
            else:
                compute = torch.float64 if a.dtype == torch.float64 else torch.float32
                rows = grouped_matmul_fwd(dout, b.transpose(1, 2), offsets, None, None, 1, compute, None)
                index = a_index if ctx.index_div == 1 else a_index // ctx.index_div
                da = scatter_rows(rows, index, offsets, a.shape[0], a.dtype)
        if ctx.needs_input_grad[1]:
            db = grouped_matmul_wgrad(a, dout, offsets, a_index, None, ctx.index_div, b.dtype)
        if ctx.has_bias and ctx.needs_input_grad[4]:
            dbias = grouped_bias_grad(dout, offsets, None, 1, dout.dtype)
        return da, db, None, None, dbias, None, None, None


@op(
    module=_MODULE,
    kernels=("grouped_matmul_fwd", "grouped_matmul_wgrad"),
    differentiable=("a", "b", "bias"),
)
def grouped_matmul(
    a: Tensor,
    b: Weight,
    offsets: Tensor,
    a_index: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One matrix per group of consecutive rows, rows optionally gathered.

    Formula: ``out[p] = a[a_index[p] if given else p] @ b[e].T (+ bias[e])`` for ``offsets[e] <= p < offsets[e + 1]``.
    Every other row of the output is zero, also those before ``offsets[0]``, and ``a_index`` is not read there.

    Args:
        a: ``[rows, K]`` float32, bfloat16 or float16 (float64 on the reference backend).
        b: ``[E, N, K]`` of a's dtype; K or N may be the contiguous dim (a transposed view is read in place).
            Any E (0 too), N, K; no alignment is asked for. Or what ``pack_weight`` made of it: the same bits.
        offsets: ``[E + 1]`` int32 or int64, not decreasing. They stay on the device: no host synchronisation.
        a_index: ``[P]`` int32 or int64; an index outside of a counts as a row of zeros.
        bias: ``[E, N]`` of a's dtype.
        out_dtype: a's dtype (default) or float32.

    Returns:
        ``[P, N]``, or ``[rows, N]`` without ``a_index``. Products accumulate in float32 and round once.

    Gradients: for ``a``, ``b`` (exactly 0 for an empty group) and ``bias``. Deterministic; a row does not depend on
    the other rows, on a GPU among calls of as many rows (their number per group chooses the tile).

    Raises:
        ValueError: a wrong shape. TypeError: a wrong dtype. RuntimeError: a packed b, and a gradient is wanted.

    Example::

        order, inverse, offsets = tilefuse.moe_plan(ids, num_experts)
        y = tilefuse.grouped_matmul(x, w, offsets, order // ids.shape[1])

    Source: MegaBlocks (2211.15841); gathered rows as in ScatterMoE (2403.08245).
    """
    _check(a, b, offsets, a_index, bias, out_dtype)
    check_inference("grouped_matmul", (b,), a=a, bias=bias)
    a, b, offsets = errors.check_last_dim_contiguous(a), either_contiguous(b), offsets.contiguous()
    a_index = None if a_index is None else a_index.contiguous()
    bias = None if bias is None else bias.contiguous()
    out_dtype = out_dtype or a.dtype
    args = (a, b, offsets, a_index, bias, 1, out_dtype, None)
    return _GroupedMatmul.apply(*args) if errors.needs_grad(a, b, bias) else grouped_matmul_fwd(*args)
