"""What every launcher shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

# (major, minor) of the compiler
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def on_device(tensor: Tensor):
    """Launches go to the device of the arguments, also when another GPU is current."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@functools.lru_cache
def constants(config: Any) -> Mapping[str, Any]:
    """What a launch passes by name for a tile configuration: ``block_m`` as ``BLOCK_M``, ``num_warps`` as it is.

    Fields with a default are the launcher's own choices.
    """
    names = [field.name for field in dataclasses.fields(config) if field.default is dataclasses.MISSING]
    return {name if name.startswith("num_") else name.upper(): getattr(config, name) for name in names}


@functools.lru_cache
def launch_options(config: Any) -> Mapping[str, Any]:
    """The part of ``constants`` that is left where the kernel has its tiles among constants of its own."""
    return {name: value for name, value in constants(config).items() if name.startswith("num_")}


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Rows of one step of a program that holds them whole, and how it is launched."""

    block_t: int
    num_warps: int


@contextmanager
def scratch(device: torch.device, needed: bool = True) -> Iterator[None]:
    """Memory for tensor descriptors that a kernel makes on the device; another library's allocator comes back after."""
    if device.type != "cuda" or not needed:
        yield
        return
    from triton.runtime import _allocation

    previous = _allocation._allocator.get()
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    try:
        yield
    finally:
        triton.set_allocator(previous)


def vector_width(itemsize: int, *strides: int) -> int:
    """Elements per access, at most 16 bytes, that every one of these strides is a multiple of."""
    return gcd(16 // itemsize, *strides)
