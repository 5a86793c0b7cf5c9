"""Compiles every kernel for every architecture without a GPU and reads what the compiler made of it.

A Triton module ``tilefuse.triton_kernels.<family>.<op>`` lists calls of its op::

    def aot_cases():
        from ...testing.aot import AotCase, call, tensor

        for dtype in ("bf16", "fp32"):
            x, table = tensor(dtype, 1, 4096, 32, 128), tensor("fp32", 4096, 64)
            yield AotCase(f"{dtype}_d128", call("rope", x, table, table), expect=("LDG.128", "STG.128"))

A case runs on fake tensors of a fake GPU, and what its launchers launch is what the gate compiles: types, alignment and
constants are those of a real launch, so a compiled kernel is also the one that a launch takes from Triton's cache. The
first case of a kernel should be its most typical one: ``make test`` compiles only that, and the baseline must have it.
The CUDA library needs no list: all its kernels are read from ``_cuda.abi3.so``.

``python -m tilefuse.testing.aot.process --json OUT`` does the work in a process of its own, because a function that was
decorated under ``TRITON_INTERPRET=1`` cannot be compiled. ``records(...)`` runs that process and returns what it found;
``problems(...)`` compares it with the baseline in ``tests/resources/<family>.json``.
"""

from .baseline import BASELINE_DIR, REGISTER_SLACK, key, label, problems, read_baseline, write_baseline
from .cases import AotCase, call, cases, launch, modules, tensor, train
from .process import records
from .recorder import record

__all__ = [
    "BASELINE_DIR",
    "REGISTER_SLACK",
    "AotCase",
    "call",
    "cases",
    "key",
    "label",
    "launch",
    "modules",
    "problems",
    "read_baseline",
    "record",
    "records",
    "tensor",
    "train",
    "write_baseline",
]
