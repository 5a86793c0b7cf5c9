"""Names of the hardware that kernels are compiled, verified and tuned for."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# every architecture that the resource gate compiles for
COMPILE_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# the most shared memory that one block can have there; asking for more compiles but does not launch
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
# multiprocessors of a typical GPU: A100, L40S, H100, B200, RTX 5090, MI300X
_MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
# the target that every CUDA device passes for, while the resource gate records launches
_pretended: str | None = None


@functools.cache
def _cuda_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def of(device: torch.device) -> str:
    """``"cpu"``, ``"sm_90"``, ``"gfx942"``: the architecture of a device."""
    if device.type != "cuda":
        return device.type
    if _pretended is not None:
        return _pretended
    if not torch.cuda.is_available():
        # fake tensors carry CUDA devices on machines without one
        return "none"
    return _cuda_arch(device.index if device.index is not None else torch.cuda.current_device())


@contextmanager
def pretend(target: str) -> Iterator[None]:
    """Lets every CUDA device pass for a typical GPU of a compile target; fake tensors live on such devices."""
    global _pretended
    previous, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = previous


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    if _pretended is not None:
        return _MULTIPROCESSORS[_pretended]
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block on a CUDA device can have."""
    if _pretended is not None:
        return SHARED_MEMORY[_pretended]
    if torch.version.hip:
        return SHARED_MEMORY["gfx942"]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def capability(arch: str) -> int:
    """90 for ``sm_90`` and ``sm_90a``; 0 for anything that is not NVIDIA."""
    match = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    return int(match.group(1)) if match else 0


def device_key(device: torch.device) -> str:
    """File-name form of a device's marketing name: ``nvidia_h200``; tuned configurations and results use it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
