"""Scale layouts of other FP8 libraries, to and from tilefuse's.

tilefuse's own: (1, 128) scales are ``[..., ceil(K / 128)]`` float32 with rows contiguous and blocks
``round_up(rows, 4)`` elements apart; (128, 128) scales are ``[..., ceil(N / 128), ceil(K / 128)]`` row-major. All are
dequantisation scales: ``x ~= q * scale``. ``fp8_matmul`` takes scales of any strides, so only the values matter to it;
these functions copy only where the other library's layout asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import errors
from .ops.fp8.quantize import blocks_of, check_block, empty_row_scale, split_rows

__all__ = [
    "from_deepgemm",
    "from_huggingface",
    "from_scaled_mm",
    "to_deepgemm",
    "to_huggingface",
    "to_scaled_mm",
]


def _check(name: str, scale: Tensor, dims: int | None = 2) -> None:
    if scale.dtype != torch.float32:
        errors.type_error(name, "scale", "float32", scale)
    if dims is not None and scale.ndim != dims:
        errors.value_error(name, "scale", "2-D", scale)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def row_layout(scale: Tensor) -> Tensor:
    """(1, 128) scales ``[..., KB]`` of any strides in tilefuse's layout; no copy if they are in it already."""
    _check("fp8_layout.row_layout", scale, None)
    rows = math.prod(scale.shape[:-1])
    # a reshape may make up another stride for a single row
    flat = scale if scale.ndim == 2 else scale.reshape(rows, scale.shape[-1])
    if flat.stride() != (1, max(_round_up(rows, 4), 4)):
        flat = empty_row_scale(scale, rows, scale.shape[-1]).copy_(flat)
    return split_rows(flat, scale.shape[:-1])


def to_deepgemm(scale: Tensor, block: Sequence[int] = (1, 128), *, packed: bool = False) -> Tensor:
    """Scales as DeepGEMM's ``fp8_gemm_*`` take them.

    Args:
        scale: ``[M, KB]`` or ``[NB, KB]`` float32.
        block: ``(1, 128)`` gives MN-major with a K-block stride of ``round_up(M, 4)`` (TMA), ``(128, 128)`` row-major.
        packed: the form for sm_100: four UE8M0 exponents per int32 along K, ``[MN, ceil(KB / 4)]`` MN-major, stride
            ``round_up(MN, 4)``. Needs powers of two (``scale_format="pow2"``); the check reads the scales on the host.
            (128, 128) scales are repeated for each of their 128 rows by the caller, as DeepGEMM does.

    Raises:
        ValueError: wrong number of dims or block, or packed scales that are not powers of two.
        TypeError: scale is not float32.
    """
    name = "fp8_layout.to_deepgemm"
    _check(name, scale)
    rows = check_block(name, block)
    if not packed:
        return row_layout(scale) if rows == 1 else scale.contiguous()
    bits = scale.contiguous().view(torch.int32)
    if bool(((bits & 0x7FFFFF) != 0).any()) or bool(((bits <= 0) | (bits >= 0x7F800000)).any()):
        errors.value_error(name, "scale", "positive powers of two to be packed", scale)
    mn, blocks = scale.shape
    exponents = bits.new_zeros((mn, _round_up(blocks, 4)))
    exponents[:, :blocks] = bits >> 23
    # little endian: the first block is the low byte
    words = exponents.to(torch.uint8).contiguous().view(torch.int32)
    out = words.new_empty_strided(words.shape, (1, max(_round_up(mn, 4), 4)))
    return out.copy_(words)


def from_deepgemm(scale: Tensor, block: Sequence[int] = (1, 128), *, k: int | None = None) -> Tensor:
    """The inverse of ``to_deepgemm``; packed int32 scales need ``k``, the elements of K.

    Raises:
        ValueError: wrong number of dims or block, or packed scales without a k that fits them.
        TypeError: scale is neither float32 nor int32.
    """
    name = "fp8_layout.from_deepgemm"
    rows = check_block(name, block)
    if scale.dtype == torch.int32:
        if scale.ndim != 2:
            errors.value_error(name, "scale", "2-D", scale)
        if k is None or blocks_of(k) > 4 * scale.shape[1]:
            errors.value_error(name, "k", "the K that packed scales belong to", k)
        # one column counts as contiguous whatever its stride is
        words = scale.clone(memory_format=torch.contiguous_format)
        exponents = words.view(torch.uint8)[:, : blocks_of(k)]
        scale = (exponents.to(torch.int32) << 23).view(torch.float32)
    _check(name, scale)
    return row_layout(scale) if rows == 1 else scale.contiguous()


def to_scaled_mm(scale: Tensor, block: Sequence[int] = (1, 128)) -> Tensor:
    """Scales as ``torch.nn.functional.scaled_mm`` takes them.

    ``(1, 128)`` (``ScalingType.BlockWise1x128``): ``[M, KB]`` with strides ``[1, M]``. ``(128, 128)``
    (``ScalingType.BlockWise128x128``): ``[L4, NB]`` with strides ``[1, L4]``, the K-blocks padded with zeros to
    ``L4 = round_up(KB, 4)`` (unpadded ones are read wrong without an error, pytorch#166752).

    Raises:
        ValueError: wrong number of dims or block.
        TypeError: scale is not float32.
    """
    name = "fp8_layout.to_scaled_mm"
    _check(name, scale)
    if check_block(name, block) == 1:
        return scale.new_empty_strided(scale.shape, (1, max(scale.shape[0], 1))).copy_(scale)
    padded = scale.new_zeros((scale.shape[0], _round_up(scale.shape[1], 4)))
    padded[:, : scale.shape[1]] = scale
    return padded.t()


def from_scaled_mm(scale: Tensor, block: Sequence[int] = (1, 128), *, k: int) -> Tensor:
    """The inverse of ``to_scaled_mm`` for operands with ``k`` elements along K.

    Raises:
        ValueError: wrong number of dims or block, or fewer K-blocks than k has.
        TypeError: scale is not float32.
    """
    name = "fp8_layout.from_scaled_mm"
    _check(name, scale)
    if check_block(name, block) == 1:
        return row_layout(scale)
    if scale.shape[0] < blocks_of(k):
        errors.value_error(name, "scale", f"[{_round_up(blocks_of(k), 4)}, ceil(N / 128)]", scale)
    return scale[: blocks_of(k)].t().contiguous()


def to_huggingface(scale: Tensor) -> Tensor:
    """``weight_scale_inv`` of a (128, 128)-quantised weight: despite its name the dequantisation scale, row-major.

    Raises:
        TypeError: scale is not float32.
    """
    _check("fp8_layout.to_huggingface", scale, None)
    return scale.contiguous()


def from_huggingface(weight_scale_inv: Tensor, shape: Sequence[int]) -> Tensor:
    """(128, 128) scales of a weight of this shape from a checkpoint's ``weight_scale_inv`` (float32 or bfloat16).

    Raises:
        ValueError: the grid does not belong to that shape.
        TypeError: not a float tensor.
    """
    name = "fp8_layout.from_huggingface"
    *lead, n, k = shape
    grid = (*lead, blocks_of(n), blocks_of(k))
    if tuple(weight_scale_inv.shape) != grid:
        errors.value_error(name, "weight_scale_inv", f"{[*grid]}", weight_scale_inv)
    errors.check_dtype(name, "weight_scale_inv", weight_scale_inv, errors.FLOATS)
    return weight_scale_inv.to(torch.float32).contiguous()
