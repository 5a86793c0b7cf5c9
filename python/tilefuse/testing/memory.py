"""Memory that shows whether a kernel wrote what it must and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

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
