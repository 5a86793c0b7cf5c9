"""Runs CUDA C++ kernels on the CPU: no GPU, no nvcc.

``csrc/emulation/cuda_emulation.h`` lets g++ compile a ``.cuh`` kernel as ordinary C++, with one fibre per thread, and
says what it checks. A binding ``csrc/emulation/<family>/<op>.cpp`` launches the kernels of one op on raw pointers::

    #include "emulation/binding.h"  // first

    #include "rope/rope.cuh"

    using namespace tilefuse;

    TILEFUSE_EMULATION(m) {
      m.def("rope_fwd_bf16", [](uintptr_t x, uintptr_t out, int64_t rows, int dim) {
        const dim3 grid(ceil_div<int64_t>(rows, 4)), block(32, 4);
        emulation::launch(grid, block, /*dynamic shared bytes*/ 0, [&] {
          rope_kernel<bf16>(emulation::pointer<bf16>(x), emulation::pointer<bf16>(out), rows, dim);
        });
      });
    }

Keep every tensor in a variable: the memory of ``f(x).data_ptr()`` is freed before the kernel runs. The launch shape
should come from the function of the ``.cuh`` that the real launch uses too. In a test::

    module = emulation.load_or_skip("rope", "rope")

    def run():
        out = torch.empty_like(x)
        module.rope_fwd_bf16(x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1])
        return out

    out = emulation.in_every_order(module, run)  # raises when the result depends on the order of the threads

Kernels use ``TILEFUSE_DYNAMIC_SHARED(type, name)`` instead of ``extern __shared__``, and keep PTX in wrappers that have
a host definition (``csrc/common/cuda.cuh``). The library is built once per content of its sources and kept under
``build/emulation`` of the checkout, or in the user's cache directory.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2), ("random", 3))

_CSRC = Path(__file__).resolve().parents[3] / "csrc"
_FLAGS = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -Wall -Wno-unknown-pragmas"
# not for the scheduler itself: its handlers take the place of the sanitizers' run-time library
_CHECKS = (
    "-fsanitize=bounds-strict,alignment,null,signed-integer-overflow,integer-divide-by-zero -fno-sanitize-recover=all"
)
_POISON = "-ftrivial-auto-var-init=pattern"


class OrderDependence(AssertionError):
    """A kernel's result depends on the order in which its threads ran: a race."""


@functools.cache
def _compiler() -> list[str] | None:
    """The words of the compiler's command, as in setup.py: ``CXX`` may hold a launcher or options as well."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    runs = shutil.which(words[0]) and subprocess.run([*words, "--version"], capture_output=True).returncode == 0
    return words if runs else None


@functools.cache
def _cuda_include() -> Path | None:
    """The folder of ``cuda_bf16.h``, from the CUDA toolkit or NVIDIA's wheels."""
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "include")
    if nvcc := shutil.which("nvcc"):
        # asked rather than guessed: nvcc on PATH may be a wrapper script
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        for line in dry.stderr.splitlines():
            if line.startswith("#$ TOP="):
                candidates.append(Path(line.removeprefix("#$ TOP=").strip()) / "include")
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates += [*wheels.glob("cu*/include"), *wheels.glob("cuda_runtime/include")]
    for candidate in candidates:
        if (candidate / "cuda_bf16.h").exists() and (candidate / "vector_types.h").exists():
            return candidate.resolve()
    return None


def missing() -> str | None:
    """Why no kernel can be emulated here, or None."""
    if not (_CSRC / "emulation").is_dir():
        return "csrc/ is not there: the emulation needs a source checkout"
    if _compiler() is None:
        return "there is no C++ compiler (g++, or the command in CXX)"
    if _cuda_include() is None:
        return "the CUDA headers are not installed (cuda_bf16.h)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not installed (Python.h)"
    return None


@functools.cache
def _poison_flag() -> str:
    probe = subprocess.run(
        [*(_compiler() or ()), _POISON, "-x", "c++", "-fsyntax-only", os.devnull], capture_output=True
    )
    return _POISON if probe.returncode == 0 else ""


@functools.cache
def _version() -> str:
    return subprocess.run([*(_compiler() or ()), "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def _cache_dir() -> Path:
    checkout = _CSRC.parent
    if os.access(checkout, os.W_OK):
        return checkout / "build" / "emulation"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tilefuse" / "emulation"


def _build(target: Path, command: list[str]) -> Path:
    """Runs a compiler command that writes to ``{out}`` unless the target exists; safe between processes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(f".tmp{os.getpid()}")
            ran = subprocess.run([a.replace("{out}", str(unfinished)) for a in command], capture_output=True, text=True)
            if ran.returncode != 0:
                raise RuntimeError(f"emulation: the compiler failed\n{shlex.join(command)}\n{ran.stderr}")
            unfinished.rename(target)
    return target


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _contents(*patterns: str) -> bytes:
    files = sorted({f for pattern in patterns for f in _CSRC.glob(pattern) if f.is_file()})
    return b"\0".join(str(f.relative_to(_CSRC)).encode() + b"\0" + f.read_bytes() for f in files)


def load_source(source: Path, *, sources: tuple[str, ...] = ()) -> ModuleType:
    """Builds and loads one binding; ``sources`` are patterns below ``csrc/`` of the files it includes.

    Raises:
        RuntimeError: something is missing (see ``missing``) or the compiler failed, with its messages.
    """
    if reason := missing():
        raise RuntimeError(f"emulation: {reason}")
    import pybind11

    name = source.stem
    base = [*(_compiler() or ()), *_FLAGS.split(), f"-I{_CSRC}", "-isystem", str(_cuda_include())]
    python = ["-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include()]
    checks = [*_CHECKS.split(), *([_poison_flag()] if _poison_flag() else [])]
    environment = f"{_version()} {pybind11.__version__} {sys.version} {base} {checks}"
    headers = _contents("emulation/*.h", "emulation/emulate.cpp")
    cache = _cache_dir()
    scheduler = _build(
        cache / f"emulate-{_digest(environment, headers)}.o",
        [*base, "-c", str(_CSRC / "emulation/emulate.cpp"), "-o", "{out}"],
    )
    key = _digest(environment, headers, _contents("common/*", *sources), name, source.read_bytes())
    library = _build(
        cache / f"{name}-{key}.so",
        [
            *base,
            *python,
            *checks,
            f"-DTILEFUSE_EMULATION_NAME={name}",
            "-shared",
            "-o",
            "{out}",
            str(source),
            str(scheduler),
        ],
    )
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(family: str, op: str) -> ModuleType:
    """The emulated kernels of one op: the functions of ``csrc/emulation/<family>/<op>.cpp``.

    Raises:
        RuntimeError: something is missing (see ``missing``) or the compiler failed, with its messages.
    """
    return load_source(_CSRC / "emulation" / family / f"{op}.cpp", sources=(f"{family}/*.cuh", f"{family}/*.h"))


def load_or_skip(family: str, op: str) -> ModuleType:
    """``load`` for tests: skips with the reason where kernels cannot be emulated; a broken build still fails."""
    if reason := missing():
        import pytest

        pytest.skip(f"CUDA emulation: {reason}")
    return load(family, op)


def in_every_order(module: ModuleType, run: Callable[[], Any]) -> Any:
    """Runs ``run`` under every schedule of ``ORDERS`` and returns its result (tensors, in any nesting).

    ``run`` must allocate its outputs, and work on copies of what it changes in place.

    Raises:
        OrderDependence: two schedules gave different bits.
    """
    from torch.utils._pytree import tree_flatten

    first = None
    try:
        for order, seed in ORDERS:
            module.set_schedule(order, seed)
            result = run()
            tensors = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
            if first is None:
                first, expected = result, tensors
                continue
            for number, (a, b) in enumerate(zip(expected, tensors, strict=True)):
                same = a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)
                if not bool(same.all()):
                    where = int((~same).nonzero()[0, 0]) // a.element_size()
                    raise OrderDependence(
                        f"tensor {number}, flat index {where}: {a.flatten()[where]} with forward order of the threads, "
                        f"{b.flatten()[where]} with {order} order (seed {seed})"
                    )
    finally:
        module.set_schedule("forward", 0)
    return first
