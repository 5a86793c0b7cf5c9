"""Shared set-up. Without a GPU the whole run uses Triton's interpreter, repaired by tilefuse.testing."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when a kernel is decorated, that is when tilefuse imports its kernel modules
    os.environ["TRITON_INTERPRET"] = "1"

# the machine is shared: under xdist every worker would otherwise take all cores
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

try:
    import hypothesis
except ImportError:
    pass
else:
    # the same examples in every run, no time limits that depend on the machine
    hypothesis.settings.register_profile(
        "tilefuse", deadline=None, derandomize=True, max_examples=25, database=None, print_blob=True
    )
    hypothesis.settings.load_profile("tilefuse")

try:
    from tilefuse.testing import interpreter

    INTERPRETER_MISSING = None
    if not HAS_GPU:
        interpreter.install()
except ImportError as error:
    INTERPRETER_MISSING = str(error)


@pytest.fixture
def on_instruction_set():
    """``(isa, function)``: what a test module's function gives with the CPU kernels of that instruction set."""

    def run(isa, function):
        script = f"import sys, torch; from {function.__module__} import {function.__name__} as function; "
        script += "torch.save(function(), sys.stdout.buffer)"
        root = Path(__file__).resolve().parent.parent
        environment = os.environ | {"TILEFUSE_CPU_ISA": isa, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return torch.load(io.BytesIO(done.stdout))

    return run


def float16_in_interpreter(items):
    """Tests with a twin in bfloat16: Triton kernels have one path for both, the everyday run takes one."""
    names = {item.nodeid for item in items}
    for item in items:
        call, twin = getattr(item, "callspec", None), item.nodeid.replace("torch.float16", "torch.bfloat16")
        in_interpreter = call and any(
            value == ("triton", "cpu") for value in call.params.values() if type(value) is tuple
        )
        if in_interpreter and twin != item.nodeid and twin in names:
            yield item


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    from tilefuse import native

    for item in float16_in_interpreter(items):
        item.add_marker(pytest.mark.slow)

    capability = torch.cuda.get_device_capability() if HAS_GPU else (0, 0)
    no_library = native.load("cpu").missing
    for item in items:
        if item.get_closest_marker("cpu_library") and no_library:
            item.add_marker(pytest.mark.skip(reason=no_library))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        for name, major in (("sm90", 9), ("sm100", 10)):
            if item.get_closest_marker(name) and capability[0] != major:
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU of compute capability {major}.x"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _backend_restored():
    import tilefuse

    before = tilefuse.backend()
    yield
    tilefuse.backend(before)
    # a test may have replaced an implementation
    tilefuse.backends.forget()


@pytest.fixture
def poison():
    """Uninitialised memory is NaN (integers: the largest value) for the length of the test."""
    from tilefuse.testing import poisoned

    with poisoned():
        yield


@pytest.fixture
def assert_replays():
    """Captures a step in a CUDA graph: replayed with other values in ``static``, it has the bits of an eager call."""

    def check(step, static, values):
        from tilefuse.testing import assert_bit_equal

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for value in values:
            static.copy_(value)
            graph.replay()
            expected = step()
            torch.cuda.synchronize()
            for a, b in zip(captured, expected, strict=True):
                assert_bit_equal(a, b)

    return check


@pytest.fixture
def triton_backend():
    """Triton kernels: the faithful interpreter on the CPU, the compiler on a GPU."""
    import tilefuse

    if not HAS_GPU and INTERPRETER_MISSING:
        pytest.skip(INTERPRETER_MISSING)
    with tilefuse.backend("triton"):
        yield


def backend_params(kernel, slow_in_interpreter=False):
    """(backend, device) for every backend of a kernel, as test parameters."""
    from tilefuse import library, native

    slow = [pytest.mark.slow] * slow_in_interpreter
    no_cuda = native.load("cuda").missing
    known = {
        "reference": [pytest.param(("reference", "cpu"), id="reference")],
        "cpu": [pytest.param(("cpu", "cpu"), id="cpu", marks=pytest.mark.cpu_library)],
        "triton": [
            pytest.param(("triton", "cpu"), id="interpreter", marks=slow),
            pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
        ],
        "cuda": [
            pytest.param(
                ("cuda", "cuda"),
                id="cuda",
                marks=[pytest.mark.gpu, pytest.mark.skipif(bool(no_cuda), reason=str(no_cuda))],
            )
        ],
    }
    backends = library.kernels()[kernel].backends
    return [param for name, params in known.items() if name in ("reference", *backends) for param in params]


def pytest_generate_tests(metafunc):
    """A module names its kernel in KERNEL and, for gradients, BACKWARD."""
    slow, on_gpu = (metafunc.definition.get_closest_marker(m) is not None for m in ("slow_in_interpreter", "gpu"))
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = {name.strip() for names in own for name in (names.split(",") if isinstance(names, str) else names)}
    for fixture, name in (("device", "KERNEL"), ("where", "KERNEL"), ("grad_where", "BACKWARD")):
        kernel = getattr(metafunc.module, name, None)
        if fixture in metafunc.fixturenames and fixture not in own and kernel:
            params = [p for p in backend_params(kernel, slow) if p.values[0][1] == "cuda" or not on_gpu]
            metafunc.parametrize(fixture, params, indirect=True)


@pytest.fixture
def where(request):
    """Forces the backend that the test is run for; the value is the device its tensors live on."""
    import tilefuse

    name, device = request.param
    with tilefuse.backend(name):
        yield device


device = grad_where = where
