"""Show what tilefuse found on this machine, and what is missing for full speed.

Prints versions, devices, the state of the compiled libraries and of Triton, and the GPU architectures on which
kernels were verified. Exits with 1 when something is broken (not merely absent).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tilefuse
from tilefuse import arch, backends, library, native

from . import FAILED, OK
from ._console import Console

LIBRARIES = ("triton", "numpy", "transformers", "ml_dtypes", "rich", "matplotlib", "ninja")


@dataclass(frozen=True)
class Finding:
    """Something that costs speed or function here, and what to do about it."""

    what: str
    costs: str
    fix: str
    broken: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "tilefuse": tilefuse.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "HIP of torch": torch.version.hip,
    }
    return found | {name: _version(name) for name in LIBRARIES}


def devices() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    found = [{"device": "cpu", "name": f"{platform.machine()}, {capability}, {threads} threads", "arch": "cpu"}]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.device("cuda", i)
            memory = torch.cuda.get_device_properties(device).total_memory
            name = f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
            found.append({"device": str(device), "name": name, "arch": arch.of(device)})
    return found


def findings() -> list[Finding]:
    """Everything that is not as good as it could be here."""
    out = []
    gpu = torch.cuda.is_available()
    in_checkout = (Path(tilefuse.__file__).parents[2] / "setup.py").exists()
    rebuild = "make native" if in_checkout else "in a source tree: pip install --no-build-isolation ."
    cpu, cuda = native.load("cpu"), native.load("cuda")
    if cpu.missing:
        needs = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None and _version(tool) is None]
        first = f"install {' and '.join(needs)}, then " if needs else ""
        broken = cpu.path.exists()
        out.append(
            Finding(f"no compiled CPU library: {cpu.missing}", "CPU ops run as plain PyTorch", first + rebuild, broken)
        )
    if gpu and not torch.version.hip and cuda.missing:
        first = "" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "install the CUDA toolkit (nvcc), then "
        broken = cuda.path.exists()
        out.append(
            Finding(
                f"no compiled CUDA library: {cuda.missing}",
                "small ops pay Triton's launch cost",
                first + rebuild,
                broken,
            )
        )
    if missing := backends.triton_missing():
        costs = "GPU ops run as plain PyTorch" if gpu else "GPU kernels cannot be compiled or interpreted here"
        out.append(Finding(missing, costs, "pip install 'triton>=3.6'", broken=gpu))
    if not gpu:
        if torch.version.cuda or torch.version.hip:
            out.append(
                Finding(
                    "torch sees no GPU", "only the CPU backends run", "check the driver with nvidia-smi or rocm-smi"
                )
            )
        else:
            out.append(
                Finding(
                    "this torch is a CPU build",
                    "only the CPU backends run",
                    "on a machine with a GPU, install a CUDA or ROCm build of torch",
                )
            )
    elif not torch.version.hip:
        for device in devices()[1:]:
            if device["arch"] not in backends.verified():
                out.append(
                    Finding(
                        f"kernels were never verified on {device['arch']}",
                        "the CUDA C++ backend is not a default there",
                        "python -m tilefuse verify --record",
                    )
                )
    for name, what in (("rich", "plain text tables"), ("matplotlib", "benchmarks draw no plots")):
        if _version(name) is None:
            out.append(Finding(f"{name} is not installed", what, f"pip install {name}"))
    return out


def run(args: argparse.Namespace) -> int:
    console = Console(args.json)
    found = findings()
    libraries = {name: native.load(name) for name in ("cpu", "cuda")}
    console.table(
        "Versions",
        ["package", "version"],
        [(k, v or "not installed") for k, v in versions().items() if v or k in LIBRARIES],
    )
    console.table("Devices", ["device", "name", "architecture"], [d.values() for d in devices()])
    rows = []
    for name, entry in libraries.items():
        built = ", ".join(f"{k}: {v}" for k, v in entry.info.items())
        rows.append((f"compiled {name} library", "missing" if entry.missing else "ok", entry.missing or built))
    triton = backends.triton_missing()
    rows.append(("Triton", "missing" if triton else "ok", triton or f"{_version('triton')}"))
    rows.append(("backend", tilefuse.backend(), "TILEFUSE_BACKEND or tilefuse.backend() sets it"))
    console.table("Backends", ["part", "state", "detail"], rows)
    verified = {a: sorted(kernels) for a, kernels in backends.verified().items()}
    kernels = len(library.kernels())
    if verified:
        console.table(
            "Verified GPUs",
            ["architecture", "kernels"],
            [(a, f"{len(names)} of {kernels}") for a, names in verified.items()],
        )
    else:
        console.say(f"Verified GPUs: none; {kernels} kernels have not run on any GPU yet.")
    if found:
        console.table(
            "What is missing for full speed",
            ["what", "costs", "fix"],
            [(("failed: " if f.broken else "") + f.what, f.costs, f.fix) for f in found],
        )
    else:
        console.say("Nothing is missing for full speed.")
    console.result(
        {
            "versions": versions(),
            "devices": devices(),
            "native": {
                name: {"path": str(entry.path), "missing": entry.missing, "info": dict(entry.info)}
                for name, entry in libraries.items()
            },
            "triton_missing": triton,
            "backend": tilefuse.backend(),
            "ops": len(tilefuse.ops()),
            "verified": verified,
            "findings": [asdict(f) for f in found],
        }
    )
    return FAILED if any(f.broken for f in found) else OK
