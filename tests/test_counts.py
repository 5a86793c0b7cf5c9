"""``scripts/check_counts.py`` finds what it counts."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_counts.py"


@pytest.fixture
def counts(tmp_path, monkeypatch):
    """The script on a repository of its own, with `write(name, text)`."""
    spec = importlib.util.spec_from_file_location("check_counts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        subprocess.run(["git", "add", name], cwd=tmp_path, check=True)

    module.write = write
    return module


def kernel(arguments):
    names = "".join(f"    x{i},\n" for i in range(arguments))
    return f"@triton.jit(do_not_specialize=['n'])\ndef a_kernel(\n{names}):\n    pass\n"


# put together, so that this file is not counted
SKIP = "# fmt: " + "skip"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("triton_kernels/rope/rope.py", kernel(41), "triton_kernels/rope/rope.py:2: a_kernel takes 41 arguments"),
        ("triton_kernels/attention/a.py", kernel(21), "a_kernel takes 21 arguments, at most 20"),
        ("triton_kernels/rope/rope.py", "from tilefuse import arch\n", "rope.py:1: absolute import of the package"),
        ("python/long.py", "def f():\n" + "    pass\n" * 120, "python/long.py:1: f has 121 lines, at most 120"),
        ("python/wide.py", "a" * 121 + "\n", "python/wide.py:1: 121 columns"),
        ("csrc/wide.cu", "a" * 121 + "\n", "csrc/wide.cu:1: 121 columns"),
        ("csrc/op_cpu.cpp", '  m.def("op() -> ()");\n', "csrc/op_cpu.cpp:1: m.def"),
        ("csrc/op_cpu.cpp", "// " + "-" * 4 + " sums " + "-" * 4 + "\n", "csrc/op_cpu.cpp:1: a banner"),
        ("python/banner.py", "    # " + "=" * 20 + "\n", "python/banner.py:1: a banner"),
        ("scripts/check.sh", "#" * 9 + " sums\n", "scripts/check.sh:1: a banner"),
        ("csrc/op.cuh", "void* grad_weight;\n", "csrc/op.cuh:1: grad_weight, gradients are dout"),
        ("csrc/op.cuh", "run(q_grad);\n", "csrc/op.cuh:1: q_grad, gradients are dout"),
        ("python/skips.py", f"x = 1  {SKIP}\n" * 60, f"60 lines with {SKIP}, at most 59"),
    ],
)
def test_each_rule(counts, capsys, name, text, problem):
    counts.write(name, text)
    assert counts.main() == 1
    assert problem in capsys.readouterr().out


def test_within_the_limits(counts, capsys):
    counts.write("triton_kernels/rope/rope.py", kernel(40) + "from ... import arch\n")
    counts.write("triton_kernels/rope/host.py", "from tilefuse.reference import rope\n")
    counts.write("triton_kernels/attention/a.py", kernel(20))
    counts.write("python/exact.py", "def f():\n" + "    pass\n" * 119 + "#" + "a" * 119 + "\n")
    counts.write("csrc/a_cpu.cpp", "// -1 - a wgrad, autograd's\nint dweight;  // https://a.b/c---d\n")
    counts.write("scripts/a.sh", "#!/bin/sh\n# a - b\n" + "a" * 121 + "\n")
    counts.write("csrc/emulation/a.cpp", 'm.def("run", run);\n')
    assert counts.main() == 0
    assert capsys.readouterr().out == "all counts within their limits\n"
