"""Libraries to compare with; ``make bench`` installs those of requirements-peers.txt into ``.peers/``, a folder each.

Those that models are served with on CPUs have a module here, which loads them by path and never imports them. Only
their compiled kernels are used: importing the packages would start a server's machinery and patch torch. A function of
these modules is named after the library's op, takes the operands of ours and returns a `Peer`, whose packing of weights
and making of metadata are outside of the timing, on copies of its own.
"""

from __future__ import annotations

import functools
import importlib
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from .. import records


def folder() -> Path:
    """Where ``make bench`` installs peers: beside the checkout's sources, else in the working directory."""
    return (records.HERE.parent if (records.HERE.parent / "setup.py").exists() else Path.cwd()) / ".peers"


def find(package: str) -> metadata.Distribution:
    """An installed distribution, from the folder of peers or from the environment.

    Raises:
        ModuleNotFoundError: it is in neither.
    """
    for found in metadata.distributions(name=package, path=[str(folder() / package), *sys.path]):
        return found
    raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def version(package: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return find(package).version
    except ModuleNotFoundError:
        return None


def import_module(package: str, module: str) -> ModuleType:
    """A module of a distribution that is plain Python.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    root = str(find(package).locate_file(""))
    if root not in sys.path:
        # last: what the environment has goes before
        sys.path.append(root)
    return importlib.import_module(module)


@functools.cache
def load_library(package: str, library: str, torch_version: str) -> None:
    """Registers the ops of a library that was built for one version of torch.

    Raises:
        ImportError: it is not installed, or not for this version of torch, or needs a library that is not there.
    """
    path = find(package).locate_file(library)
    if not torch.__version__.startswith(torch_version):
        raise ImportError(f"{package} {version(package)} needs torch {torch_version}, this is {torch.__version__}")
    try:
        torch.ops.load_library(path)
    except OSError as reason:
        # "libnuma.so.1: cannot open shared object file"
        raise ImportError(f"{package}: {reason}") from None
