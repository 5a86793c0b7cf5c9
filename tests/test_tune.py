"""Measured tile configurations: who wins, what is tried, and that a tried configuration computes the same."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import tilefuse
from tilefuse import arch
from tilefuse.cli import tune
from tilefuse.testing import sample

triton = pytest.importorskip("triton", reason="tile configurations belong to Triton kernels")

from tilefuse.benchmarks.harness import Case, normal  # noqa: E402
from tilefuse.triton_kernels.common import tuned  # noqa: E402

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int = 4


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called toy, whose file is in a folder of its own."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(arch, "device_key", lambda device: "toy")
    tuned.table.cache_clear()
    tuned._device_key.cache_clear()
    yield torch.device("cuda", 0)
    tuned.table.cache_clear()
    tuned._device_key.cache_clear()


@pytest.mark.parametrize("heuristic", [Tile(64), {"rows": 64, "warps": 4}], ids=["dataclass", "dict"])
def test_a_measured_configuration_replaces_fields_of_the_heuristic(gpu, heuristic):
    assert tuned.choose("toy", "n=1", gpu, heuristic) == heuristic
    tuned.write("toy", {"toy": {"n=1": {"rows": 16}}})
    assert tuned.choose("toy", "n=1", gpu, heuristic) == tuned.replaced(heuristic, {"rows": 16})
    assert tuned.choose("toy", "n=2", gpu, heuristic) == heuristic
    assert tuned.choose("other", "n=1", gpu, heuristic) == heuristic
    assert tuned.choose("toy", "n=1", torch.device("cpu"), heuristic) == heuristic


def test_a_session_notes_what_is_asked_and_forces(gpu):
    tuned.write("toy", {"toy": {"n=1": {"rows": 16}}})
    with tuned.session() as session:
        # what was measured before must not hide the heuristic from a new measurement
        assert tuned.choose("toy", "n=1", gpu, Tile(64)) == Tile(64)
        session.forced["toy", "n=1"] = {"rows": 32}
        assert tuned.choose("toy", "n=1", gpu, Tile(64)) == Tile(32)
        assert tuned.choose("toy", "n=2", gpu, Tile(8)) == Tile(8)
        assert session.asked == {("toy", "n=1"): Tile(64), ("toy", "n=2"): Tile(8)}
    assert tuned.choose("toy", "n=1", gpu, Tile(64)) == Tile(16)


def test_later_measurements_join_the_file(gpu):
    tuned.write("toy", {"a": {"n=1": {"rows": 16}}, "b": {"n=1": {"rows": 8}}})
    path = tuned.write("toy", {"a": {"n=1": {"rows": 32}, "n=2": {"rows": 64}}})
    expected = {"a": {"n=1": {"rows": 32}, "n=2": {"rows": 64}}, "b": {"n=1": {"rows": 8}}}
    assert json.loads(path.read_text()) == expected
    assert tuned.table("toy") == expected


def test_every_shipped_file_names_kernels_and_fields_that_exist():
    tried = tune.candidates()
    for path in tuned.FOLDER.glob("*.json"):
        for kernel, keys in json.loads(path.read_text()).items():
            assert kernel in tried, f"{path.name}: {kernel}"
            fields = {name for changes in tried[kernel] for name in changes}
            assert all(set(changes) <= fields for changes in keys.values()), f"{path.name}: {kernel}"


# op of each tunable kernel, whose smallest sample launches it
OPS = {
    "fp8_matmul": "fp8_matmul",
    "grouped_matmul_fwd": "grouped_matmul",
    "mla_decode": "mla_decode",
    "moe_experts_up": "moe_experts",
    "paged_attention": "paged_attention",
    "window_attention_fwd": "window_attention",
    "window_attention_dq": "window_attention",
    "window_attention_dkdv": "window_attention",
}


def test_every_tunable_kernel_is_known_here():
    assert set(OPS) == set(tune.candidates())


def _run(kernel, example):
    """The op on an example, with the gradients where the kernel belongs to the backward."""
    function = tilefuse.ops()[OPS[kernel]].function
    if not kernel.endswith(("_dq", "_dkdv")):
        return function(*example.args, **example.kwargs)
    leaves = [a.detach().requires_grad_() for a in example.args[:3]]
    out = function(*leaves, *example.args[3:], **example.kwargs)
    return torch.autograd.grad(out[0].float().square().sum(), leaves)


@INTERPRETED
@pytest.mark.parametrize("kernel", OPS)
def test_tried_configurations_compute_the_same(kernel):
    example = next(iter(sample.samples(OPS[kernel], torch.device("cpu"))))
    configs = tune.candidates()[kernel]
    with tilefuse.backend("triton"), tuned.session() as session:
        expected = _run(kernel, example)
        asked = [key for key in session.asked if key[0] == kernel]
        assert asked, f"{OPS[kernel]} asks for no configuration of {kernel}"
        for changes in (configs[0], configs[len(configs) // 2], configs[-1]):
            session.forced |= {key: changes for key in asked}
            assert tune._agree(_run(kernel, example), expected), changes


@INTERPRETED
def test_tune_takes_the_fastest_that_is_right(monkeypatch):
    good, slow, wrong, broken = {"rows": 32}, {"rows": 16}, {"rows": 8}, {"rows": 4}

    def launch(x):
        tile = tuned.choose("toy", "n=1", x.device, Tile(64))
        if tile.rows == 4:
            raise RuntimeError("out of shared memory")
        return x * (2 if tile.rows == 8 else 1)

    measured = []

    def measure(calls, budget):
        assert budget > 0
        seconds = {64: 1.0, 32: 0.5, 16: 0.9, 8: 0.1}
        medians = {}
        for name, (call,) in calls.items():
            with monkeypatch.context() as patch:
                patch.setattr(tuned, "choose", lambda *args: measured.append(real(*args)) or measured[-1])
                call()
            medians[name] = SimpleNamespace(median=seconds[measured[-1].rows])
        return medians

    real = tuned.choose
    case = Case(
        "rope",
        "toy",
        "float32",
        lambda device, generator: (normal((4,), torch.float32, device, generator),),
        launch,
        {},
        bytes=1,
    )
    device = torch.device("cpu")
    found = tune.tune_case(case, device, {"toy": (slow, good, wrong, broken, {"rows": 64})}, {}, measure)
    assert found == {("toy", "n=1"): tune.Winner(good, 0.5, 1.0)}
    assert found["toy", "n=1"].gain == 2
    assert {tile.rows for tile in measured} == {64, 32, 16}
    # an earlier case's winner stays in force and is not measured again
    measured.clear()
    assert tune.tune_case(case, device, {"toy": (slow, good)}, found, measure) == {}
    assert not measured


@INTERPRETED
def test_tune_keeps_the_heuristic_for_a_gain_that_noise_explains():
    def launch(x):
        return x + 0 * tuned.choose("toy", "n=1", x.device, Tile(64)).rows

    case = Case("rope", "toy", "float32", lambda device, generator: (torch.ones(4),), launch, {}, bytes=1)
    seconds = iter((1.0, 0.98))
    found = tune.tune_case(
        case,
        torch.device("cpu"),
        {"toy": ({"rows": 32},)},
        {},
        lambda calls, budget: {name: SimpleNamespace(median=next(seconds)) for name in calls},
    )
    assert found == {("toy", "n=1"): tune.Winner({}, 1.0, 1.0)}
