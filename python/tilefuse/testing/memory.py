"""Memory that shows whether a kernel wrote what it must and nothing else, and how much of it something takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import native

GUARD_BYTES = 256
GUARD_VALUE = 0xA5


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialised allocation with NaN (floats, FP8 too) or the largest value (integers).

    Covers ``torch.empty``, ``empty_like``, ``empty_strided``, ``new_empty`` and ``resize_`` from Python and from
    C++, on every device: an output element that a kernel leaves unwritten shows up as NaN. uint8 is filled with 0xFF,
    which is NaN in e4m3 bytes. The kernels of the CPU library fill integers with -1.

    The mechanism is torch's own ``fill_uninitialized_memory``, which works only under deterministic algorithms:
    these are switched on for the duration (warnings only, for operations that have none). It does not reach what the
    CPU library allocates past the dispatcher: that does the same for itself.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only if enabled else True)
    deterministic.fill_uninitialized_memory = True
    filled = native.fill_memory(True)
    try:
        yield
    finally:
        native.fill_memory(filled)
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@dataclass(frozen=True)
class Canary:
    """A contiguous tensor between two guard areas of ``GUARD_BYTES``; ``check()`` finds writes outside it."""

    tensor: Tensor
    memory: Tensor  # uint8, guards included

    def check(self) -> None:
        """Raises AssertionError where a guard byte changed."""
        size = self.tensor.numel() * self.tensor.element_size()
        guards = torch.ones(self.memory.numel(), dtype=torch.bool, device=self.memory.device)
        guards[GUARD_BYTES : GUARD_BYTES + size] = False
        touched = (guards & (self.memory != GUARD_VALUE)).nonzero().flatten() - GUARD_BYTES
        if touched.numel():
            first, last = int(touched[0]), int(touched[-1])
            raise AssertionError(
                f"{touched.numel()} guard bytes were overwritten, from byte {first} to byte {last} of a tensor of"
                f" {size} bytes ({[*self.tensor.shape]} {self.tensor.dtype})"
            )


def canary(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Canary:
    """A NaN-filled (integers: 0xFF bytes) contiguous tensor surrounded by guard bytes, 256-byte aligned."""
    shape = tuple(shape)
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.full((size + 3 * GUARD_BYTES,), GUARD_VALUE, dtype=torch.uint8, device=device)
    # the allocator promises 64 bytes on the CPU
    start = -raw.data_ptr() % GUARD_BYTES
    memory = raw[start : start + size + 2 * GUARD_BYTES]
    inside = memory[GUARD_BYTES : GUARD_BYTES + size]
    # all ones is NaN in every IEEE format, in e4m3fn and in e5m2
    inside.fill_(0xFF)
    tensor = inside.view(dtype).view(shape) if dtype is not torch.bool else inside.view(shape).view(dtype)
    return Canary(tensor, memory)


class Allocation(NamedTuple):
    """A tensor that an operator of PyTorch made."""

    address: int
    nbytes: int  # of its storage
    numel: int
    dtype: torch.dtype


def _is_plain(x: Any) -> bool:
    """A tensor with memory, not what stands for one."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


class _Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made: list[Allocation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _is_plain(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            # a view, or an argument written in place, is nothing new
            if _is_plain(x) and x.untyped_storage().data_ptr() not in given:
                self.made.append(
                    Allocation(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), x.numel(), x.dtype)
                )
        return out


@contextmanager
def allocations() -> Iterator[list[Allocation]]:
    """Lists the new memory that PyTorch's operators return inside of it.

    What a kernel of the CPU library makes for itself is not seen; ``peak_bytes`` sees all.
    """
    with _Recorded() as recorded:
        yield recorded.made


_PEAK = """
import re, torch, tilefuse
torch.set_num_threads(1)
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
{prepare}
# a process starts with its parent's peak: begin again
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
{call}
print((kilobytes("VmHWM") - before) * 1024)
"""


def can_measure_peaks() -> bool:
    return os.path.exists("/proc/self/clear_refs")


def peak_bytes(prepare: str, call: str, **environment: str) -> int:
    """By how much a fresh process on one thread grows, at most, while it runs ``call`` after ``prepare`` (Linux)."""
    code = _PEAK.format(prepare=prepare, call=call)
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return int(ran.stdout.split()[-1])
