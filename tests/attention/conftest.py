import importlib

import pytest

from tilefuse.testing.memory import peak_bytes

INPUTS = "q, k, v = (torch.randn(1, 65536, 2, 32, dtype=torch.bfloat16) for _ in range(3))"
CALL = """
leaves = [x.requires_grad_() for x in (q, k, v)]
out, lse = call(*leaves)
out.sum().backward()
"""


@pytest.fixture
def check_memory():
    """Forward and backward over 65,536 tokens, whose scores alone would take 17 GB per head, in a process of its own.

    ``prepare`` is code that defines ``call(q, k, v)``; the process may grow by a few times the inputs, twice as much
    in the reference, which gathers and computes in float32.
    """

    def check(backend, prepare):
        prepare = f"{INPUTS}\n{prepare}\ncall(*(x[:, :256] for x in (q, k, v)))"
        grown = peak_bytes(prepare, CALL, TILEFUSE_BACKEND=backend, TRITON_INTERPRET="0")
        one = 65536 * 2 * 32 * 2
        assert grown < (48 if backend == "reference" else 24) * one, f"grew by {grown / one:.1f} x the size of q"

    return check


class Recorder:
    """Stands for a Triton kernel and notes its launches; with a kernel behind it, makes them too."""

    def __init__(self, name, noted, kernel=None):
        self.name, self.noted, self.kernel = name, noted, kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.noted.append((self.name, grid, args))
            if self.kernel is not None:
                self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def record_launches(monkeypatch):
    """``record_launches(op, run=False)``: (kernel, grid, arguments) of what the op's launcher will launch.

    With ``run=False`` nothing runs, so that tensors on the device "meta" may have any size.
    """
    pytest.importorskip("triton")

    def record(op, run=False):
        noted = []
        for module in {op, "window_attention"}:
            module = importlib.import_module(f"tilefuse.triton_kernels.attention.{module}")
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                kernel = getattr(module, name)
                monkeypatch.setattr(module, name, Recorder(name, noted, kernel if run else None))
        return noted

    return record
