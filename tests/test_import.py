"""tilefuse imports and works where optional parts are missing."""

import os
import subprocess
import sys
import textwrap

import pytest

# makes packages look not installed, also for importlib.util.find_spec
BLOCK = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked} else self.finder.find_spec(name, path, target)
    def invalidate_caches(self):
        pass
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
HIDE_NATIVE = """
import tilefuse.native as native, pathlib
native.__file__ = "/nonexistent/native.py"
"""
OPTIONAL = ("triton", "ml_dtypes", "rich", "matplotlib", "hypothesis", "pytest", "transformers", "pybind11")


def run_python(code, *, blocked=(), **environment):
    code = BLOCK.format(blocked=tuple(blocked)) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ROPE = """
import torch, tilefuse
cos, sin = tilefuse.rope_tables(64, 16)
x = torch.randn(2, 16, 4, 64, requires_grad=True)
y = tilefuse.rope(x, cos, sin)
y.sum().backward()
assert x.grad.shape == x.shape
assert torch.equal(y, torch.ops.tilefuse.rope(x, cos, sin))
print(tilefuse.explain("rope", x, cos, sin)["rope_fwd"])
"""


def test_without_optional_packages():
    out = run_python(ROPE, blocked=OPTIONAL)
    assert "Triton cannot be imported" in run_python(
        "from tilefuse import backends; print(backends.triton_missing())", blocked=OPTIONAL
    )
    assert "'runs'" in out


def test_without_native_libraries_and_triton():
    out = run_python(HIDE_NATIVE + ROPE, blocked=OPTIONAL)
    assert "'reference': 'runs'" in out
    assert "was not built" in out


def test_a_forced_backend_without_triton_says_why():
    code = """
    import torch, tilefuse
    cos, sin = tilefuse.rope_tables(64, 16)
    tilefuse.backend("triton")
    try:
        tilefuse.rope(torch.randn(2, 16, 4, 64), cos, sin)
    except NotImplementedError as error:
        print(error)
    """
    out = run_python(code, blocked=OPTIONAL, TRITON_INTERPRET="1")
    assert "triton: Triton cannot be imported" in out


def test_import_is_light():
    code = """
    import tilefuse, sys
    print(sorted({"triton", "ml_dtypes", "rich", "matplotlib", "hypothesis", "transformers"} & set(sys.modules)))
    """
    assert run_python(code).strip() == "[]"


def test_testing_kit_needs_torch_and_numpy_only():
    code = """
    import torch
    from tilefuse import testing
    from tilefuse.testing import interpreter
    testing.assert_close(torch.ones(2), torch.ones(2).double(), torch.ones(2))
    try:
        interpreter.install()
    except ImportError as error:
        print(error)
    """
    assert "needs triton and ml_dtypes" in run_python(code, blocked=OPTIONAL)


def test_the_kernel_folder_refuses_to_shadow_the_package_of_openai():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert "import it as tilefuse.triton_kernels" in done.stderr


def test_imported_again():
    code = """
    import importlib, sys
    import tilefuse
    names = {name: getattr(tilefuse, name) for name in tilefuse.__all__}
    assert importlib.reload(tilefuse) is tilefuse
    del sys.modules["tilefuse"]
    import tilefuse as again
    for module in (tilefuse, again):
        assert all(getattr(module, name) == value for name, value in names.items())
    print(len(again.ops()) > 30)
    """
    assert run_python(code).strip() == "True"


@pytest.mark.parametrize("name", ["__version__", "backend", "explain", "ops"])
def test_public_names(name):
    import tilefuse

    assert name in tilefuse.__all__ and hasattr(tilefuse, name)
    assert len(set(tilefuse.__all__)) == len(tilefuse.__all__)
    assert all(hasattr(tilefuse, n) for n in tilefuse.__all__)
