"""Every test that takes ``where`` runs once per backend, CUDA C++ included where its module sets ``CUDA``."""

import pytest

import tilefuse

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu", marks=pytest.mark.cpu_library),
    pytest.param(("triton", "cpu"), id="interpreter"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]


def pytest_generate_tests(metafunc):
    if "where" in metafunc.fixturenames:
        cuda = [pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("where", BACKENDS + cuda * hasattr(metafunc.module, "CUDA"), indirect=True)


@pytest.fixture
def where(request):
    """Forces a backend; the value is the device its tensors live on."""
    name, device = request.param
    with tilefuse.backend(name):
        yield device


@pytest.fixture
def repeats():
    """Runs that must agree to the bit: a hundred wherever threads run side by side."""

    def number(device):
        return 100 if device == "cuda" or tilefuse.backend() == "cpu" else 2

    return number
