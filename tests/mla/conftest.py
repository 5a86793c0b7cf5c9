"""Backends of the op under test: a module names its kernel in KERNEL and, for gradients, BACKWARD."""

import pytest

import tilefuse
from tilefuse import library, native

CPU_MISSING = native.load("cpu").missing


def _params(kernel):
    backends = library.kernels()[kernel].backends
    params = [pytest.param(("reference", "cpu"), id="reference")]
    if "cpu" in backends:
        mark = pytest.mark.skipif(bool(CPU_MISSING), reason=str(CPU_MISSING))
        params.append(pytest.param(("cpu", "cpu"), id="cpu", marks=mark))
    if "triton" in backends:
        params.append(pytest.param(("triton", "cpu"), id="interpreter"))
        params.append(pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu))
    if "cuda" in backends:
        params.append(pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu))
    return params


def pytest_generate_tests(metafunc):
    for fixture, name in (("where", "KERNEL"), ("grad_where", "BACKWARD")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, _params(getattr(metafunc.module, name)), indirect=True)


def _forced(request):
    name, device = request.param
    with tilefuse.backend(name):
        yield device


@pytest.fixture
def where(request):
    """Runs the test once per backend of KERNEL; the value is the device its tensors live on."""
    yield from _forced(request)


@pytest.fixture
def grad_where(request):
    """The same for the backends of BACKWARD."""
    yield from _forced(request)
