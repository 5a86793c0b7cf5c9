"""The native loader never raises: it says what is missing and how a library was built."""

import subprocess
import sys

import pytest
import torch

from tilefuse import library, native
from tilefuse.testing import poisoned


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The loader looks into an empty folder, with an empty cache."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.mark.parametrize("name, compiler", [("cpu", "g++"), ("cuda", "nvcc")])
def test_a_library_that_was_not_built(elsewhere, name, compiler):
    loaded = native.load(name)
    assert loaded.missing == f"_{name}.abi3.so was not built (needs {compiler}, ninja and torch at build time)"
    assert dict(loaded.info) == {}
    assert native.find(name, "rope_fwd() -> ()") == (None, loaded.missing)


def test_a_library_that_cannot_be_loaded(elsewhere):
    (elsewhere / "_cpu.abi3.so").write_bytes(b"not an ELF file")
    assert native.load("cpu").missing.startswith("_cpu.abi3.so cannot be loaded: ")


def test_a_library_without_build_info(elsewhere):
    # some other shared library: loads, but is not ours
    (elsewhere / "_cpu.abi3.so").symlink_to(torch._C.__file__)
    assert "cannot be loaded" in native.load("cpu").missing


@pytest.mark.parametrize("name, key", [("cpu", "instruction_sets"), ("cuda", "architectures")])
def test_build_info(name, key):
    loaded = native.load(name)
    if loaded.missing:
        assert loaded.path.name in loaded.missing
        pytest.skip(loaded.missing)
    assert loaded.info[key]
    with pytest.raises(TypeError):
        loaded.info[key] = []


SCHEMA = "no_such_kernel(Tensor x, int[]? sizes) -> Tensor"


def test_a_kernel_that_a_library_lacks():
    for _ in range(2):
        op, reason = native.find("cpu", SCHEMA)
        assert op is None
        assert reason in (native.load("cpu").missing, "_cpu.abi3.so has no no_such_kernel")


@pytest.mark.cpu_library
def test_a_library_of_other_sources():
    native._FRAGMENTS["cpu"].define("other_kernel(Tensor x, int[] sizes) -> Tensor")
    op, reason = native.find("cpu", SCHEMA.replace("no_such_kernel", "other_kernel"))
    assert op is None
    assert reason == "_cpu.abi3.so was built from other sources: its other_kernel takes other arguments"


@pytest.mark.cpu_library
def test_an_op_has_the_schema_of_its_kernel():
    kernel = library.kernels()["rope_fwd"]
    found, reason = native.find("cpu", kernel.schema)
    assert reason is None
    assert str(found._schema) == f"tilefuse_cpu::{torch._C.parse_schema(kernel.schema)}"


@pytest.mark.cpu_library
def test_an_op_may_be_defined_before_the_library_is_loaded():
    program = """if True:
        import torch, tilefuse
        from tilefuse import library, native
        for kernel in library.kernels().values():
            native._FRAGMENTS["cpu"].define(kernel.schema)
        with tilefuse.backend("cpu"):
            print(tilefuse.moe_plan(torch.tensor([[1, 0]]), 2)[0].tolist())
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[1, 0]\n"


@pytest.mark.cpu_library
def test_the_library_fills_its_memory_under_poisoned():
    assert native.fill_memory(False) is False
    with poisoned():
        assert native.fill_memory(True) is True
    assert native.fill_memory(False) is False
