"""Which backend runs: a table of plain values, and what the setting does."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import tilefuse
from tilefuse import backends
from tilefuse.backends import Candidate, pick

ALL = [Candidate(b) for b in backends.BACKENDS]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def choose(candidates=ALL, **situation):
    defaults = {"requested": "auto", "device": "cpu", "arch": "cpu", "dtype": torch.float32}
    return pick(candidates, **(defaults | situation))


H200 = {"device": "cuda", "arch": "sm_90"}
TABLE = [
    # situation, usable in order
    ({}, ["cpu", "reference"]),
    ({"interpret": True}, ["cpu", "reference"]),
    (H200, ["triton", "reference"]),
    ({**H200, "verified_backends": ("cuda", "triton")}, ["cuda", "triton", "reference"]),
    ({**H200, "interpret": True}, ["triton", "reference"]),
    ({"device": "cuda", "arch": "gfx942", "verified_backends": ("triton",)}, ["triton", "reference"]),
    ({"device": "cuda", "arch": "none"}, ["triton", "reference"]),
    ({"device": "xpu", "arch": "xpu"}, ["reference"]),
    ({"requested": "reference"}, ["reference"]),
    ({"requested": "reference", **H200}, ["reference"]),
    ({"requested": "cpu"}, ["cpu"]),
    ({"requested": "cpu", **H200}, []),
    ({"requested": "triton"}, []),
    ({"requested": "triton", "interpret": True}, ["triton"]),
    ({"requested": "triton", **H200}, ["triton"]),
    ({"requested": "cuda"}, []),
    ({"requested": "cuda", **H200}, ["cuda"]),
    ({"requested": "cuda", "device": "cuda", "arch": "gfx942"}, []),
]


@pytest.mark.parametrize("situation, usable", TABLE)
def test_pick(situation, usable):
    found, reasons = choose(**situation)
    assert found == usable
    assert set(reasons) == set(backends.BACKENDS) - set(usable)
    assert all(reasons.values())


@pytest.mark.parametrize(
    "situation, backend, reason",
    [
        ({}, "cuda", "runs on NVIDIA GPUs, the arguments are on cpu"),
        ({}, "triton", "TRITON_INTERPRET=1 runs it on the CPU"),
        ({"interpret": True}, "triton", "runs only when forced"),
        (H200, "cuda", "not verified on sm_90 yet"),
        (H200, "cpu", "runs on the CPU, the arguments are on cuda"),
        ({"requested": "cuda", "device": "cuda", "arch": "gfx942"}, "cuda", "runs on NVIDIA GPUs"),
        ({"requested": "cpu"}, "reference", "backend 'cpu' is forced"),
    ],
)
def test_reasons(situation, backend, reason):
    assert reason in choose(**situation)[1][backend]


def test_missing_and_dtypes_are_reasons():
    candidates = [Candidate("reference"), Candidate("cpu", "was not built"), Candidate("triton", dtypes=FLOATS)]
    assert choose(candidates) == (
        ["reference"],
        {"cpu": "was not built", "triton": choose()[1]["triton"]},
    )
    usable, reasons = choose(candidates, **H200, dtype=torch.float64)
    assert usable == ["reference"]
    assert reasons["triton"] == "does not take float64"


def test_setting_and_context_manager():
    start = tilefuse.backend()
    with tilefuse.backend("reference"):
        assert tilefuse.backend() == "reference"
        with tilefuse.backend("cpu"):
            assert tilefuse.backend() == "cpu"
        assert tilefuse.backend() == "reference"
    assert tilefuse.backend() == start
    with pytest.raises(KeyError), tilefuse.backend("reference"):
        raise KeyError
    assert tilefuse.backend() == start
    setting = tilefuse.backend("reference")
    assert tilefuse.backend() == "reference"
    with setting:
        pass
    assert tilefuse.backend() == start


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"tilefuse.backend: name must be auto or one of reference, cpu, triton, cuda"):
        tilefuse.backend(name)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )


def test_environment_variable():
    code = "import tilefuse; print(tilefuse.backend())"
    assert run_python(code, TILEFUSE_BACKEND="reference").stdout.strip() == "reference"
    done = run_python(code, TILEFUSE_BACKEND="fastest")
    assert done.returncode != 0
    assert "TILEFUSE_BACKEND must be auto or one of reference, cpu, triton, cuda, got 'fastest'" in done.stderr


@pytest.mark.skipif(backends.triton_missing() is not None, reason="needs Triton")
def test_interpreter_set_too_late_is_a_reason():
    code = (
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tilefuse import backends; print(backends.triton_missing())"
    )
    done = run_python(code, TRITON_INTERPRET="0")
    assert "TRITON_INTERPRET was set after Triton was imported" in done.stdout, done.stderr


@pytest.mark.skipif(backends.triton_missing() is not None, reason="needs Triton")
def test_interpreter_is_repaired_also_when_the_environment_forces_triton():
    code = (
        "import tilefuse\nfrom tilefuse import backends\nfrom tilefuse.testing import interpreter\n"
        "assert not interpreter._installed; assert backends.triton_missing() is None; print(interpreter._installed)"
    )
    done = run_python(code, TILEFUSE_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout.strip() == "True", done.stderr


def test_generation_counts_every_change_from_many_threads():
    before = backends.generation
    start = tilefuse.backend()

    def change():
        for _ in range(200):
            with tilefuse.backend("reference"):
                pass

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backends.generation == before + 4 * 200 * 2
    tilefuse.backend(start)
