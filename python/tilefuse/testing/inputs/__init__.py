"""Sample inputs shared by tests, opcheck and benchmarks: one module per op at ``<family>/<op>.py``.

Each module defines ``SAMPLES: dict[op name, Callable[[device], Iterable[Sample]]]``; ``tilefuse.testing.samples``
finds it through the op's record in ``tilefuse.ops()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def by_name(cases: Callable[..., Iterator[tuple[Any, ...]]]) -> Callable[..., tuple[Any, ...]]:
    """Turns ``cases(device, dtype, ...)``, which yields calls that begin with their names, into a look-up.

    What it returns is called with a name, and with the device and dtypes where they are not the CPU and float32.
    """

    def case(
        name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *more: Any, **named: Any
    ) -> tuple[Any, ...]:
        return next(call[1:] for call in cases(device, dtype, *more, **named) if call[0] == name)

    return case
