import pytest

import tilefuse

BACKENDS = [
    pytest.param(("cpu", "cpu"), id="cpu", marks=pytest.mark.cpu_library),
    pytest.param(("triton", "cpu"), id="interpreter"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def device(request):
    """Runs the test once per compiled backend; the value is the device its tensors live on."""
    name, where = request.param
    with tilefuse.backend(name):
        yield where


@pytest.fixture
def reference():
    """Calls a function on the reference backend, whatever backend the test runs on."""

    def call(function, *args, **kwargs):
        with tilefuse.backend("reference"):
            return function(*args, **kwargs)

    return call
