"""Argument checks that several ops of this family share, for the public functions and the fakes alike."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ... import errors
from .layout import GROUP, LAYOUTS, RowLayout, row_layout

__all__: list[str] = []

_Tensor = TypeVar("_Tensor", Tensor, "Tensor | None")


def check_tables(
    name: str, arg: str, x: Tensor, rope_dim: int, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> None:
    """RoPE tables for the last ``rope_dim`` columns of ``x``, one position per row."""
    if rope_dim % 2:
        errors.value_error(name, arg, f"of an even RoPE width (its last dim less the rank), not {rope_dim}", x)
    for table, tensor in (("cos", cos), ("sin", sin)):
        if tensor.ndim != 2 or tensor.shape[1] != rope_dim // 2 or tensor.shape != cos.shape:
            errors.value_error(name, table, f"[P, {rope_dim // 2}] float32", tensor)
        if tensor.dtype != torch.float32:
            errors.type_error(name, table, f"[P, {rope_dim // 2}] float32", tensor)
        errors.check_device(name, table, tensor, x, arg)
    if positions is not None:
        check_index(name, "positions", positions, (x.shape[0],), x, arg)
    elif rope_dim and x.device.type == "cpu" and x.shape[0] > cos.shape[0]:
        errors.value_error(name, "cos", f"a table of at least {x.shape[0]} rows, one per position", cos)


def check_index(name: str, arg: str, index: Tensor, shape: tuple[int, ...], like: Tensor, like_arg: str) -> None:
    if tuple(index.shape) != shape:
        errors.value_error(name, arg, f"{[*shape]} int32 or int64", index)
    if index.dtype not in errors.INDEX_DTYPES:
        errors.type_error(name, arg, f"{[*shape]} int32 or int64", index)
    errors.check_device(name, arg, index, like, like_arg)


def check_like(name: str, arg: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, like_arg: str) -> None:
    """Same dtype and device as another argument, and this shape."""
    if tuple(tensor.shape) != shape:
        errors.value_error(name, arg, f"{[*shape]}", tensor)
    if tensor.dtype != like.dtype:
        errors.type_error(name, arg, f"of {like_arg}'s dtype {errors.dtype_name(like.dtype)}", tensor)
    errors.check_device(name, arg, tensor, like, like_arg)


def check_cache(name: str, cache: Tensor, kv_lora_rank: int, layout: str) -> RowLayout:
    if layout not in LAYOUTS:
        errors.value_error(name, "layout", f"one of {', '.join(LAYOUTS)}", layout)
    if cache.ndim != 3:
        errors.value_error(name, "cache", "[pages, page_size, width]", cache)
    if layout == "fp8" and (kv_lora_rank <= 0 or kv_lora_rank % GROUP):
        errors.value_error(name, "kv_lora_rank", f"a multiple of {GROUP} for layout fp8", kv_lora_rank)
    row = row_layout(layout, kv_lora_rank, cache.shape[-1])
    if row is None:
        width = "R + R / 32 + 2 r bytes" if layout == "fp8" else "R + r"
        errors.value_error(name, "cache", f"[pages, page_size, {width}] with R = {kv_lora_rank}", cache)
    dtypes = (torch.uint8,) if layout == "fp8" else errors.FLOATS
    errors.check_dtype(name, "cache", cache, dtypes)
    if cache.shape[-1] > 1 and cache.stride(-1) != 1:
        errors.value_error(name, "cache", f"contiguous in its last dim (strides {[*cache.stride()]})", cache)
    if layout == "fp8":
        # dynamo cannot trace storage_offset; the fake kernel checks it then
        offset = 0 if torch.compiler.is_dynamo_compiling() else cache.storage_offset()
        if any(n % 4 for n in (*cache.stride()[:2], offset)):
            rows = [*cache.stride()]
            errors.value_error(name, "cache", "made of rows that start at multiples of 4 bytes, by its strides", rows)
    return row


def rows_of(tensor: _Tensor) -> _Tensor:
    """Kernels take any strides but a contiguous last dim, also of an index or of one value per head."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
