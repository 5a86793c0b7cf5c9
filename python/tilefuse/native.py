"""Loads the compiled libraries and records why one is missing.

The libraries are built on LibTorch's stable ABI: one binary for every Python and every torch >= 2.11. They
register implementations of ``torch.ops.tilefuse_cpu.*`` and ``torch.ops.tilefuse_cuda.*``, one op per kernel that has
a C++ implementation; the schemas of these ops are those of the kernels, and ``find`` defines them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

_FRAGMENTS = {name: torch.library.Library(f"tilefuse_{name}", "FRAGMENT") for name in ("cpu", "cuda")}
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """One compiled library: where it is, how it was built, or why it cannot be used."""

    name: str
    path: Path
    missing: str | None
    info: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@functools.cache
def load(name: str) -> Library:
    """Loads ``_cpu`` or ``_cuda`` once. Never raises: ``Library.missing`` says what went wrong."""
    path = Path(__file__).with_name(f"_{name}.abi3.so")
    if not path.exists():
        compiler = "g++" if name == "cpu" else "nvcc"
        return Library(name, path, f"{path.name} was not built (needs {compiler}, ninja and torch at build time)")
    try:
        # ctypes first: its error names the missing symbol, torch's does not
        build_info = getattr(ctypes.CDLL(str(path)), f"tilefuse_{name}_build_info")
        torch.ops.load_library(str(path))
        build_info.restype = ctypes.c_char_p
        return Library(name, path, None, MappingProxyType(json.loads(build_info().decode())))
    except (OSError, RuntimeError, AttributeError) as error:
        # a library built for another torch or glibc must not take the package down
        return Library(name, path, f"{path.name} cannot be loaded: {error}")


def fill_memory(on: bool) -> bool:
    """Whether the CPU library fills what its kernels allocate (see ``testing.poisoned``); returns how it was."""
    library = load("cpu")
    if library.missing:
        return False
    set_fill = getattr(ctypes.CDLL(str(library.path)), "tilefuse_cpu_fill_memory", None)
    if set_fill is None:  # a library of an older source
        return False
    set_fill.argtypes, set_fill.restype = [ctypes.c_bool], ctypes.c_bool
    return set_fill(on)


def find(name: str, schema: str) -> tuple[Any, str | None]:
    """The native op of a kernel with this schema, or the reason why there is none."""
    library = load(name)
    if library.missing:
        return None, library.missing
    kernel = schema.split("(", 1)[0]
    namespace = getattr(torch.ops, f"tilefuse_{name}")
    with _lock:
        # only now: a library of an older source defines its ops itself, and aborts where they exist
        if not hasattr(namespace, kernel):
            _FRAGMENTS[name].define(schema)
    found = getattr(namespace, kernel).default
    if _types(found._schema) != _types(torch._C.parse_schema(schema)):
        return None, f"{library.path.name} was built from other sources: its {kernel} takes other arguments"
    if not found.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, name.upper())):
        return None, f"{library.path.name} has no {kernel}"
    return found, None


def _types(schema: Any) -> list[str]:
    return [str(argument.type) for argument in schema.arguments]
