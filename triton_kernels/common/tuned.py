"""Measured tile configurations: ``tuned/<gpu>.json``, written by ``python -m tilefuse tune`` and by nothing else.

A launcher passes its heuristic's configuration through `choose`, under a key that names the class of shapes::

    tile = tuned.choose("fp8_matmul", f"n={n},k={k},m<={bucket(m)}", a.device, config(m, n, k))

and its module lists in ``CONFIGS`` what is worth trying: kernel -> fields to replace in the heuristic's configuration.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

FOLDER = Path(__file__).resolve().parents[1] / "tuned"
Config = TypeVar("Config")
Key = tuple[str, str]


@dataclass
class Session:
    """While one is open, launchers note what they ask for, and take what is forced."""

    asked: dict[Key, Any] = field(default_factory=dict)  # (kernel, key) -> the heuristic's configuration
    forced: dict[Key, Mapping[str, Any]] = field(default_factory=dict)


_session: Session | None = None


@contextmanager
def session() -> Iterator[Session]:
    """Opens a tuning session: measured configurations are out of force, only ``forced`` ones count."""
    global _session
    previous, _session = _session, Session()
    try:
        yield _session
    finally:
        _session = previous


@functools.cache
def table(device_key: str) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """kernel -> key -> configuration, for one kind of GPU."""
    path = FOLDER / f"{device_key}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _device_key(device: torch.device) -> str:
    from ...arch import device_key

    return device_key(device)


def replaced(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration, dataclass or dict, with some of its fields replaced."""
    return config | changes if isinstance(config, dict) else dataclasses.replace(config, **changes)


def choose(kernel: str, key: str, device: torch.device, heuristic: Config) -> Config:
    """The configuration that was measured on this kind of GPU, else the heuristic's."""
    if _session is not None:
        _session.asked.setdefault((kernel, key), heuristic)
        return replaced(heuristic, _session.forced.get((kernel, key), {}))
    if device.type != "cuda":
        return heuristic
    measured = table(_device_key(device)).get(kernel, {}).get(key)
    return replaced(heuristic, measured) if measured else heuristic


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
