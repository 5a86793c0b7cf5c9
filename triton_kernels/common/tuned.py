"""Measured tile configurations: ``tuned/<gpu>.json``, written by ``python -m tilefuse tune`` and by nothing else.

A kernel's configuration function asks `find` first and computes its heuristic where nothing was measured::

    def config(m, n, k, device):
        measured = tuned.find("fp8_matmul", f"n={n},k={k},m<={bucket(m)}", device)
        return Config(**measured) if measured else heuristic(m, n, k)

A Triton module that wants to be tuned defines ``tunable()``, which yields a `Tunable` per kernel and key.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1] / "tuned"


@dataclass(frozen=True)
class Tunable:
    """One kernel at one class of shapes, and what to try."""

    kernel: str
    key: str  # the shape class, as the kernel's own configuration function spells it
    default: Mapping[str, Any]  # what the heuristic takes
    configs: tuple[Mapping[str, Any], ...]
    # allocates random inputs on a device and returns run(config) -> output; a configuration may raise
    build: Callable[[torch.device], Callable[[Mapping[str, Any]], Any]]


@functools.cache
def table(device_key: str) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """kernel -> key -> configuration, for one kind of GPU."""
    path = FOLDER / f"{device_key}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _device_key(device: torch.device) -> str:
    from ...arch import device_key

    return device_key(device)


def find(kernel: str, key: str, device: torch.device) -> Mapping[str, Any] | None:
    """The measured configuration, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return table(_device_key(device)).get(kernel, {}).get(key)


def write(device_key: str, measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """Adds measurements to the file of one kind of GPU, in place of earlier ones for the same kernel and key."""
    merged = {kernel: dict(keys) for kernel, keys in table(device_key).items()}
    for kernel, keys in measured.items():
        merged.setdefault(kernel, {}).update(keys)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{device_key}.json"
    path.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    table.cache_clear()
    return path
