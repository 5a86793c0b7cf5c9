"""What the attention calls of each module ran on, counted."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import nn

_counts: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()


def count(module: nn.Module, what: str) -> None:
    # a count would be a constant of the graph
    if not torch.compiler.is_compiling():
        _counts.setdefault(module, Counter())[what] += 1


def forget(module: nn.Module) -> None:
    _counts.pop(module, None)


def of(module: nn.Module) -> dict[str, int]:
    return dict(_counts.get(module, ()))
