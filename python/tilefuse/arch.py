"""Names of the hardware that kernels are compiled, verified and tuned for."""

from __future__ import annotations

import functools
import re

import torch

# every architecture that the resource gate compiles for
COMPILE_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


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
    if not torch.cuda.is_available():
        # fake tensors carry CUDA devices on machines without one
        return "none"
    return _cuda_arch(device.index if device.index is not None else torch.cuda.current_device())


def capability(arch: str) -> int:
    """90 for ``sm_90`` and ``sm_90a``; 0 for anything that is not NVIDIA."""
    match = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    return int(match.group(1)) if match else 0


def device_key(device: torch.device) -> str:
    """File-name form of a device's marketing name: ``nvidia_h200``; tuned configurations and results use it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
