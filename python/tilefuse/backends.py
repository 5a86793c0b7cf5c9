"""Which implementation of a kernel runs.

Four backends share one contract: ``reference`` (PyTorch, any device), ``cpu`` (C++), ``triton`` (GPU, or the
CPU interpreter when ``TRITON_INTERPRET=1``) and ``cuda`` (C++). ``auto`` takes the fastest one that was
verified on that kind of device. ``pick`` decides from plain values, so it is tested as a table without a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch

from .errors import dtype_name

BACKENDS = ("reference", "cpu", "triton", "cuda")
# fastest first
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
VERIFIED_PATH = Path(__file__).with_name("verified.json")

_requested = os.environ.get("TILEFUSE_BACKEND", "auto")
if _requested not in ("auto", *BACKENDS):
    raise ValueError(f"TILEFUSE_BACKEND must be auto or one of {', '.join(BACKENDS)}, got {_requested!r}")
# counts changes of the setting, so that kernels can cache their choice
generation = 0
_lock = threading.Lock()


class _Setting:
    """What ``tilefuse.backend(name)`` returns: already in force; as a context manager it is undone on exit."""

    def __init__(self, previous: str):
        self._previous = previous

    def __enter__(self) -> _Setting:
        return self

    def __exit__(self, *exception: object) -> None:
        _set(self._previous)


def _set(name: str) -> None:
    global _requested, generation
    with _lock:
        # in this order: who sees the new generation sees the new setting
        _requested = name
        generation += 1


def forget() -> None:
    """Makes every kernel choose again: something that a choice depends on has changed, such as verified.json."""
    global generation
    verified.cache_clear()
    with _lock:
        generation += 1


@overload
def backend(name: None = None) -> str: ...


@overload
def backend(name: str) -> _Setting: ...


def backend(name: str | None = None) -> str | _Setting:
    """Sets the backend of every tilefuse op in this process, or returns the current one.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. A forced backend never falls
            back: an op that it cannot run raises NotImplementedError. None returns the current setting.

    Returns:
        The current name, or an object that restores the previous setting when used as a context manager::

            with tilefuse.backend("reference"):
                y = tilefuse.rope(x, cos, sin)

    The environment variable ``TILEFUSE_BACKEND`` sets the initial value.
    """
    if name is None:
        return _requested
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"tilefuse.backend: name must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and interpreting():
        # installs the faithful interpreter; a reason against Triton is told by the first call
        triton_missing()
    setting = _Setting(_requested)
    _set(name)
    return setting


def interpreting() -> bool:
    """Whether Triton kernels run in the CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used in this process, or None. Installs the faithful interpreter if it is needed."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    if (major, minor) < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6"
    if not interpreting():
        return None
    if type(triton.language.sum).__name__ != "InterpretedFunction":
        return "TRITON_INTERPRET was set after Triton was imported"
    # Triton's own interpreter multiplies bf16 bit patterns and truncates fp8: repair it first
    from .testing import interpreter

    try:
        interpreter.install()
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def verified() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """architecture -> kernel -> backends that ``python -m tilefuse verify --record`` passed on such a GPU."""
    recorded = json.loads(VERIFIED_PATH.read_text())
    return {arch: entry["kernels"] for arch, entry in recorded.items()}


@dataclass(frozen=True)
class Candidate:
    """What ``pick`` needs to know of one implementation; ``missing`` says why it is not installed."""

    backend: str
    missing: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None


def refusal(
    candidate: Candidate,
    *,
    requested: str,
    device: str,
    arch: str,
    dtype: torch.dtype,
    is_verified: bool,
    interpret: bool,
) -> str | None:
    """Why this implementation would not run, or None. Plain values in, plain value out."""
    name = candidate.backend
    if requested not in ("auto", name):
        return f"backend {requested!r} is forced"
    if name == "cpu" and device != "cpu":
        return f"runs on the CPU, the arguments are on {device}"
    if name == "cuda" and (device != "cuda" or arch.startswith("gfx")):
        return f"runs on NVIDIA GPUs, the arguments are on {device} ({arch})"
    if name == "triton" and device != "cuda":
        if not (device == "cpu" and interpret):
            return f"runs on GPUs, the arguments are on {device} (TRITON_INTERPRET=1 runs it on the CPU)"
        if requested == "auto":
            return "the interpreter is for tests and runs only when forced"
    if candidate.missing:
        return candidate.missing
    if candidate.dtypes is not None and dtype not in candidate.dtypes:
        return f"does not take {dtype_name(dtype)}"
    if name == "cuda" and requested == "auto" and not is_verified:
        return f"not verified on {arch} yet (python -m tilefuse verify --record, on such a GPU)"
    return None


def pick(
    candidates: Sequence[Candidate],
    *,
    requested: str,
    device: str,
    arch: str,
    dtype: torch.dtype,
    verified_backends: Sequence[str] = (),
    interpret: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """Backends that may run, fastest first, and the reasons why the others may not."""
    usable, reasons = [], {}
    for candidate in candidates:
        reason = refusal(
            candidate,
            requested=requested,
            device=device,
            arch=arch,
            dtype=dtype,
            is_verified=candidate.backend in verified_backends,
            interpret=interpret,
        )
        if reason is None:
            usable.append(candidate.backend)
        else:
            reasons[candidate.backend] = reason
    order = PREFERENCE.get(device, ("reference",))
    usable.sort(key=lambda name: order.index(name) if name in order else -1)
    return usable, reasons
