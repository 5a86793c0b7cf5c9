"""Sample inputs of the ops, found by convention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """One call of an op: ``op(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
            return repr(value)

        parts = [show(a) for a in self.args] + [f"{k}={show(v)}" for k, v in self.kwargs.items()]
        return f"{self.name or 'Sample'}({', '.join(parts)})"


def samples(op_name: str, device: torch.device | str = "cpu") -> Iterator[Sample]:
    """Sample inputs of an op listed in ``tilefuse.ops()``, from ``tilefuse.testing.inputs.<family>.<op>``.

    Raises:
        ValueError: no such op, or its module of inputs has no entry for it.
    """
    from .. import library

    if op_name not in library.ops():
        raise ValueError(f"tilefuse.testing.samples: op_name must be one of {sorted(library.ops())}, got {op_name!r}")
    path = library.ops()[op_name].module.replace("/", ".")
    table: dict[str, Callable[..., Any]] = importlib.import_module(f"{__package__}.inputs.{path}").SAMPLES
    if op_name not in table:
        raise ValueError(f"tilefuse.testing.inputs.{path} has no SAMPLES[{op_name!r}]")
    yield from table[op_name](torch.device(device))
