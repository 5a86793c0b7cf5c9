"""The native loader never raises: it says what is missing and how a library was built."""

import pytest
import torch

from tilefuse import native


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The loader looks into an empty folder, with an empty cache."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.mark.parametrize("name, compiler", [("cpu", "g++"), ("cuda", "nvcc")])
def test_a_library_that_was_not_built(elsewhere, name, compiler):
    library = native.load(name)
    assert library.missing == f"_{name}.abi3.so was not built (needs {compiler}, ninja and torch at build time)"
    assert dict(library.info) == {}
    assert native.find(name, "rope_fwd") == (None, library.missing)


def test_a_library_that_cannot_be_loaded(elsewhere):
    (elsewhere / "_cpu.abi3.so").write_bytes(b"not an ELF file")
    assert native.load("cpu").missing.startswith("_cpu.abi3.so cannot be loaded: ")


def test_a_library_without_build_info(elsewhere):
    # some other shared library: loads, but is not ours
    (elsewhere / "_cpu.abi3.so").symlink_to(torch._C.__file__)
    assert "cannot be loaded" in native.load("cpu").missing


@pytest.mark.parametrize("name, key", [("cpu", "instruction_sets"), ("cuda", "architectures")])
def test_build_info(name, key):
    library = native.load(name)
    if library.missing:
        assert library.path.name in library.missing
        pytest.skip(library.missing)
    assert library.info[key]
    with pytest.raises(TypeError):
        library.info[key] = []


def test_an_unknown_kernel():
    op, reason = native.find("cpu", "no_such_kernel")
    assert op is None
    assert reason in (native.load("cpu").missing, "_cpu.abi3.so has no no_such_kernel")
