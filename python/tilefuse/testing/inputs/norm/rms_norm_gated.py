"""Inputs of ``rms_norm_gated``: those of ``add_rms_norm``, with the residual as the gate and either order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample
from .rms_norm import cases as norm_cases


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]]:
    """name, (x, gate, weight) and options."""
    for i, (name, tensors, options) in enumerate(norm_cases(device, dtype)):
        # the gradient of the norm of one value cancels: no two float32 evaluations of it agree
        if set(options) <= {"eps"} and name != "dim1":
            yield name, tensors, options | {"norm_first": i % 2 == 0}
            if name in ("rows", "spans"):
                yield f"{name}_other_order", tensors, options | {"norm_first": i % 2 == 1}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, tensors, options in cases(device, torch.bfloat16):
        yield Sample(tensors, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"rms_norm_gated": _samples}
