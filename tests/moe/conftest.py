"""Every test that takes ``where`` runs once per backend."""

import pytest

import tilefuse
from tilefuse import native

CPU_MISSING = native.load("cpu").missing
BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu", marks=pytest.mark.skipif(bool(CPU_MISSING), reason=str(CPU_MISSING))),
    pytest.param(("triton", "cpu"), id="interpreter"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def where(request):
    """Forces a backend; the value is the device its tensors live on."""
    name, device = request.param
    with tilefuse.backend(name):
        yield device
