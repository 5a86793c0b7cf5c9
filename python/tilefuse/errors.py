"""Argument checks shared by every op and its fake kernel.

All raise before anything runs, and every message names the op, the argument, what was expected and what
came: ``tilefuse.rope: cos must be [P, rotary_dim / 2] float32, got [128, 64] bfloat16``. A message that holds a size is
written where it is raised and nowhere before: the text of a symbolic size makes torch.compile specialise on it.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


class Typed(Protocol):
    """A tensor, or what stands for one, such as a packed weight."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def describe(value: object) -> str:
    """How a message shows an argument: ``[128, 64] bfloat16`` for a tensor, its repr otherwise."""
    if isinstance(value, Tensor):
        return f"{[*value.shape]} {dtype_name(value.dtype)}"
    return repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def value_error(op: str, arg: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"tilefuse.{op}: {arg} must be {expected}, got {describe(got)}")


def type_error(op: str, arg: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"tilefuse.{op}: {arg} must be {expected}, got {describe(got)}")


def check_dtype(op: str, arg: str, tensor: Typed, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        type_error(op, arg, " or ".join(dtype_name(d) for d in dtypes), tensor)


def check_device(op: str, arg: str, tensor: Typed, like: Typed, like_arg: str) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"tilefuse.{op}: {arg} must be on the device of {like_arg} ({like.device}), got {tensor.device}"
        )


def check_last_dim_contiguous(tensor: Tensor) -> Tensor:
    """Any strides are accepted if the last dim is contiguous; otherwise one copy is made."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether the op must apply its ``autograd.Function``. Under a transform of torch.func the kernel op does it."""
    if torch.is_grad_enabled():
        # a loop: any() over a generator costs three times as much
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    return False


def check_not_differentiated(op: str, why: str, **tensors: Tensor | None) -> None:
    """For ops without a backward and for in-place ops: raise where a gradient would be lost silently."""
    if not torch.is_grad_enabled():
        return
    for arg, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"tilefuse.{op}: {why}, but {arg} requires grad; detach it or use torch.no_grad()")
