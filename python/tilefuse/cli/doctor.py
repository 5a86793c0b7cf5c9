"""Say in plain words whether tilefuse runs at full speed here, what is missing, and the command that brings it.

Then come the details: versions, devices, the state of the compiled libraries and of Triton, and the GPU
architectures on which kernels were verified. Exits with 1 when something is broken (not merely absent).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tilefuse
from tilefuse import arch, backends, direct, library, native

from . import FAILED, OK
from ._console import Console

LIBRARIES = ("triton", "numpy", "transformers", "ml_dtypes", "rich", "matplotlib", "ninja")
OLDEST_TORCH = (2, 11)
OLDEST_TRANSFORMERS = (5, 23)
CUDA_TOOLKIT = "install the CUDA toolkit, 12.8 or newer (developer.nvidia.com/cuda-downloads), then: "


@dataclass(frozen=True)
class Finding:
    """Something that costs speed or function here, and what to do about it. A ``note`` costs neither."""

    what: str
    costs: str
    fix: str
    broken: bool = False
    note: bool = False


@dataclass(frozen=True)
class Machine:
    """All that the findings depend on, as plain values."""

    torch: str  # version
    torch_build: str  # "cuda", "hip" or "cpu"
    gpus: tuple[tuple[str, str], ...]  # (name, architecture) that torch sees
    hardware: str | None  # maker of a GPU that the system has, whatever torch says
    cpu_missing: str | None
    cuda_missing: str | None
    unloadable: frozenset[str]  # native libraries that are there and cannot be loaded
    cuda_archs: tuple[str, ...]  # that the CUDA library was built for
    triton_missing: str | None
    tools: frozenset[str]  # of g++, ninja and nvcc, those found
    cxx: str  # command of the C++ compiler that a build would use
    cxx_runs: bool
    packages: dict[str, str | None]
    verified: frozenset[str]  # architectures
    backend: str = "auto"
    interpreting: bool = False
    in_checkout: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str, than: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < than


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


def _hardware() -> str | None:
    """The maker of a GPU whose driver is loaded, seen without torch."""
    if Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*")):
        return "NVIDIA"
    return "AMD" if Path("/dev/kfd").exists() else None


def compiler() -> tuple[str, str | None]:
    """The command of the C++ compiler that setup.py would use, and what it says of itself: None if it does not run."""
    command = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = shlex.split(command)
        ran = subprocess.run([*words, "--version"], capture_output=True, text=True)
    except (OSError, ValueError):
        # there is no such program, or a quote is left open
        return command, None
    lines = ran.stdout.splitlines() or [command]
    return command, lines[0] if ran.returncode == 0 else None


def machine() -> Machine:
    """What there is here."""
    cxx, cxx_version = compiler()
    cpu, cuda = native.load("cpu"), native.load("cuda")
    home = os.environ.get("CUDA_HOME")
    tools = {tool for tool in ("g++", "ninja", "nvcc") if shutil.which(tool)}
    tools |= {"ninja"} if _version("ninja") else set()
    tools |= {"nvcc"} if home and (Path(home) / "bin/nvcc").exists() else set()
    return Machine(
        torch=torch.__version__,
        torch_build="hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu",
        gpus=tuple((d["name"], d["arch"]) for d in devices()[1:]),
        hardware=_hardware(),
        cpu_missing=cpu.missing,
        cuda_missing=cuda.missing,
        unloadable=frozenset(entry.name for entry in (cpu, cuda) if entry.missing and entry.path.exists()),
        cuda_archs=tuple(cuda.info.get("architectures", ())),
        triton_missing=backends.triton_missing(),
        tools=frozenset(tools),
        cxx=cxx,
        cxx_runs=cxx_version is not None,
        packages={name: _version(name) for name in LIBRARIES},
        verified=frozenset(backends.verified()),
        backend=tilefuse.backend(),
        interpreting=backends.interpreting(),
        in_checkout=(Path(tilefuse.__file__).parents[2] / "setup.py").exists(),
    )


def built_for(gpu: str, built: Sequence[str]) -> bool:
    """Whether code for the architectures ``built`` runs on a GPU as it is: the same one, or an older minor."""
    for name in built:
        same_major = arch.capability(name) // 10 == arch.capability(gpu) // 10
        plain = name[-1].isdigit()
        if arch.capability(name) == arch.capability(gpu) or (
            plain and same_major and arch.capability(name) < arch.capability(gpu)
        ):
            return True
    return False


def findings(m: Machine) -> list[Finding]:
    """Everything that is not as good as it could be here: what costs most first, notes last."""
    gpu = bool(m.gpus)
    nvidia = gpu and m.torch_build == "cuda"
    rebuild = "make native" if m.in_checkout else "pip install --no-build-isolation .   (in tilefuse's source tree)"
    found = []
    if _older(m.torch, OLDEST_TORCH):
        found.append(
            Finding(
                f"torch {m.torch} is too old: tilefuse needs 2.11 or newer.",
                "ops may fail or give errors that nobody has looked at",
                "pip install -U 'torch>=2.11'",
                broken=True,
            )
        )
    if not gpu and m.hardware:
        if m.torch_build == "cpu":
            what = f"This machine has an {m.hardware} GPU, but this torch ({m.torch}) is a build for CPUs only."
            fix = "pip install --force-reinstall torch" if m.hardware == "NVIDIA" else "install a ROCm build of torch"
        else:
            what = f"This machine has an {m.hardware} GPU, but torch cannot use it (driver, container or permissions)."
            fix = "nvidia-smi" if m.hardware == "NVIDIA" else "rocm-smi"
            fix += "   (where it shows the GPU, update the driver or choose a torch built for an older CUDA)"
        found.append(Finding(what, "everything runs on the CPU, many times slower", fix))
    if gpu and m.triton_missing:
        found.append(
            Finding(
                f"The Triton kernels cannot run: {m.triton_missing}.",
                "most GPU ops run as plain PyTorch, several times slower",
                "pip install -U 'triton>=3.6'",
                broken=True,
            )
        )
    if gpu and m.interpreting:
        found.append(
            Finding(
                "TRITON_INTERPRET is set: Triton kernels run in an interpreter, which is for tests.",
                "GPU ops take seconds instead of microseconds",
                "unset TRITON_INTERPRET",
            )
        )
    if m.backend != "auto":
        found.append(
            Finding(
                f"The backend {m.backend!r} is forced, so the fastest one is not chosen.",
                "ops that another backend runs faster stay slow, and those it lacks raise an error",
                "unset TILEFUSE_BACKEND   (or tilefuse.backend('auto') in the program)",
            )
        )
    if m.cpu_missing:
        first = []
        if not m.cxx_runs and m.cxx != "g++":
            first.append("unset CXX")
        if not m.cxx_runs and "g++" not in m.tools:
            first.append("sudo apt-get install g++")
        if "ninja" not in m.tools:
            first.append("pip install ninja")
        broken = "cpu" in m.unloadable
        what = "The compiled C++ kernels for the CPU " + (
            f"do not load: {m.cpu_missing}" if broken else "were not built."
        )
        if not m.cxx_runs and m.cxx != "g++":
            what += f" CXX names a compiler that does not run: {m.cxx}."
        costs = "CPU ops run as plain PyTorch, several times slower" + ("; GPU ops do not notice" if gpu else "")
        found.append(Finding(what, costs, " && ".join([*first, rebuild]), broken))
    if nvidia and m.cuda_missing:
        broken = "cuda" in m.unloadable
        what = "The compiled CUDA kernels " + (f"do not load: {m.cuda_missing}" if broken else "were not built.")
        first = "" if "nvcc" in m.tools else CUDA_TOOLKIT
        found.append(Finding(what, "small ops pay Triton's launch cost, as in decoding", first + rebuild, broken))
    for on in dict.fromkeys(a for _, a in m.gpus):
        if nvidia and not m.cuda_missing and not built_for(on, m.cuda_archs):
            number = arch.capability(on)
            have = ", ".join(m.cuda_archs) or "none"
            found.append(
                Finding(
                    f"The compiled CUDA kernels were built for {have}, this GPU is {on}.",
                    "they do not run here, or only after the driver has translated them at first use",
                    f"TORCH_CUDA_ARCH_LIST='{number // 10}.{number % 10}' {rebuild}",
                )
            )
        if nvidia and on not in m.verified:
            found.append(
                Finding(
                    f"No kernel was ever verified on a GPU of this kind ({on}).",
                    "the CUDA C++ kernels are not used by default; Triton's are",
                    "python -m tilefuse verify --record   (some minutes)",
                )
            )
    return found + _notes(m)


def _notes(m: Machine) -> list[Finding]:
    """What costs no speed, and is good to know."""
    found = []

    def note(what: str, costs: str, fix: str) -> None:
        found.append(Finding(what, costs, fix, note=True))

    if not m.gpus and not m.hardware:
        fix = "Where there is one, a CUDA or ROCm build of torch brings the GPU kernels"
        note("There is no GPU here", "the CPU does the work", fix)
    if not m.gpus and m.triton_missing:
        note(m.triton_missing, "GPU kernels cannot be tried in the interpreter", "pip install 'triton>=3.6'")
    transformers = m.packages.get("transformers")
    if transformers is None or _older(transformers, OLDEST_TRANSFORMERS):
        state = "not installed" if transformers is None else f"{transformers}, older than 5.23"
        note(
            f"transformers is {state}",
            "Hugging Face models cannot be patched; the ops do not need it",
            "pip install 'transformers>=5.23'",
        )
    for name, costs in (("rich", "tables are plain text"), ("matplotlib", "benchmarks and patterns draw no pictures")):
        if m.packages.get(name) is None:
            note(f"{name} is not installed", costs, f"pip install {name}")
    return found


def verdict(m: Machine, found: Sequence[Finding]) -> str:
    """The one sentence that a newcomer needs."""
    names = list(dict.fromkeys(name for name, _ in m.gpus))
    where = " and ".join(names) if names else "the CPU"
    broken = sum(f.broken for f in found)
    missing = sum(not f.note for f in found)
    if not missing:
        return f"This machine runs tilefuse on {where} at full speed."
    if broken:
        things = "1 thing is broken" if broken == 1 else f"{broken} things are broken"
        rest = missing - broken
        more = f", and {rest} more {'keeps' if rest == 1 else 'keep'} it from full speed" if rest else ""
        return f"{things[0].upper()}{things[1:]} on this machine{more}:"
    things = "1 thing keeps" if missing == 1 else f"{missing} things keep"
    return f"tilefuse works here, on {where}, but {things} it from full speed:"


def run(args: argparse.Namespace) -> int:
    console = Console(args.json)
    m = machine()
    found = findings(m)
    sentence = verdict(m, found)
    console.say(sentence)
    missing = [f for f in found if not f.note]
    for i, finding in enumerate(missing, 1):
        console.say(f"\n{i}. {'broken: ' if finding.broken else ''}{finding.what}")
        console.say(f"   costs:  {finding.costs}")
        console.say(f"   fix:    {finding.fix}")
    if notes := [f for f in found if f.note]:
        console.say("\nGood to know:")
        for finding in notes:
            console.say(f"- {finding.what}: {finding.costs}. {finding.fix}")
    console.say("\nDetails")
    _details(console)
    libraries = {**{name: native.load(name) for name in ("cpu", "cuda")}, "direct": direct.load()}
    console.result(
        {
            "verdict": sentence,
            "versions": versions(),
            "devices": devices(),
            "native": {
                name: {"path": str(entry.path), "missing": entry.missing, "info": dict(entry.info)}
                for name, entry in libraries.items()
            },
            "triton_missing": m.triton_missing,
            "backend": tilefuse.backend(),
            "ops": len(tilefuse.ops()),
            "verified": {a: sorted(kernels) for a, kernels in backends.verified().items()},
            "findings": [asdict(f) for f in found],
        }
    )
    return FAILED if any(f.broken for f in found) else OK


def _details(console: Console) -> None:
    """Tables of what was found, for bug reports and for those who want to know."""
    console.table(
        "Versions",
        ["package", "version"],
        [(k, v or "not installed") for k, v in versions().items() if v or k in LIBRARIES],
    )
    console.table("Devices", ["device", "name", "architecture"], [d.values() for d in devices()])
    rows = []
    for name in ("cpu", "cuda"):
        entry = native.load(name)
        built = ", ".join(f"{k}: {_words(v)}" for k, v in entry.info.items())
        rows.append((f"compiled {name} library", "missing" if entry.missing else "ok", entry.missing or built))
    repeats = direct.load().missing
    rows.append(("repeated eager calls", "missing" if repeats else "ok", repeats or "go to the CPU's kernels directly"))
    cxx, version = compiler()
    used = f"a build uses {cxx}" if version is None else f"a build uses {cxx}: {version}"
    rows.append(("C++ compiler", "ok" if version else "missing", f"{used}; CXX sets it"))
    triton = backends.triton_missing()
    rows.append(("Triton", "missing" if triton else "ok", triton or f"{_version('triton')}"))
    rows.append(("backend", tilefuse.backend(), "TILEFUSE_BACKEND or tilefuse.backend() sets it"))
    console.table("Backends", ["part", "state", "detail"], rows)
    kernels = len(library.kernels())
    if verified := backends.verified():
        counts = [(on, f"{len(names)} of {kernels}") for on, names in verified.items()]
        console.table("Verified GPUs", ["architecture", "kernels"], counts)
    else:
        console.say(f"Verified GPUs: none; {kernels} kernels have not run on any GPU yet.")


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
