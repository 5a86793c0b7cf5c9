"""The benchmark harness must catch what it is there to catch; shown on a toy op."""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from tilefuse.benchmarks import checks, harness, records, report, roofline, runner, shapes, timing
from tilefuse.benchmarks import peers as peer_libraries
from tilefuse.benchmarks.harness import Case, Peer, compiled, normal

CPU = torch.device("cpu")
# a roof that nothing here reaches: only the test of the floor asks for it
ROOF = roofline.Roof(1e4, 1e4, 1e4, 1e4, {"float32": 1e3, "bfloat16": 1e3})
# one that everything beats
SLOW = dataclasses.replace(ROOF, copy_gbps=1e-6, read_gbps=1e-6, fill_gbps=1e-6, cached_gbps=1e-6)


def inputs(device, generator):
    return (normal((64, 256), torch.bfloat16, device, generator),)


def toy(x):
    y = x.float() if x.dtype != torch.float64 else x
    return (y * torch.sigmoid(y)).to(x.dtype)


def eager(x):
    return x * torch.sigmoid(x)


def make(**changes) -> Case:
    base = {
        "op": "toy",
        "name": "64 x 256",
        "dtype": "bfloat16",
        "inputs": inputs,
        "run": toy,
        "peers": {"eager": eager},
        "bytes": 64 * 256 * 4,
        "family": "toy",
    }
    return Case(**(base | changes))


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(runner, "MAX_SETS", 3)
    monkeypatch.setattr(roofline, "measure", lambda device: ROOF)
    return runner.Runner(CPU, runner.Settings(seconds=0.01), roof=ROOF)


def test_a_good_case_has_every_number(engine):
    line = engine.run(make())
    assert line["status"] == "ok", line
    for key in ("median_us", "p20_us", "p80_us", "gbps", "tflops", "roof_percent", "floor_us"):
        assert math.isfinite(line[key])
    assert line["p20_us"] <= line["median_us"] <= line["p80_us"]
    assert line["gbps"] == pytest.approx(line["bytes"] / line["median_us"] / 1e3)
    assert line["peers"]["eager"]["speedup"] > 0
    assert 0 < line["error"]["max"] < line["error"]["naive_max"] * 2
    assert line["versions"]["torch"] == torch.__version__
    assert line["threads"] == torch.get_num_threads()
    assert line["roof"]["copy_gbps"] == ROOF.copy_gbps
    json.dumps(line)


def test_wrong_output_fails(engine):
    line = engine.run(make(run=lambda x: toy(x) * (1.02 if x.dtype == torch.bfloat16 else 1)))
    assert line["status"] == "failed"
    assert "output 0" in line["reason"]
    assert "median_us" not in line


def test_one_wrong_element_fails(engine):
    def run(x):
        y = toy(x)
        if x.dtype == torch.bfloat16:
            y[3, 5] += 0.25
        return y

    assert engine.run(make(run=run))["status"] == "failed"


def test_remembered_output_is_found_after_timing(engine):
    first = []

    def run(x):
        if x.dtype == torch.float64:
            return toy(x)
        first.append(toy(x))
        return first[0]

    line = engine.run(make(run=run))
    assert line["status"] == "failed"
    assert "output 0" in line["reason"]


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(records, "under_load", lambda lines: None)


def test_time_below_the_floor_fails(engine, quiet):
    assert engine.run(make(bytes=10**12))["status"] == "unjudged"
    assert engine.run(make(flops=10**18))["status"] == "unjudged"
    for line in engine.settle():
        assert line["status"] == "failed"
        assert "roof allows no less" in line["reason"] and line["reason"].endswith("the benchmark is wrong")


def test_floor_violation_measures_the_roof_again(engine, monkeypatch):
    engine.roof = SLOW
    line = engine.run(make())
    assert line["status"] == "ok"
    assert line["roof"]["copy_gbps"] == ROOF.copy_gbps
    # once: nothing beats it any more
    monkeypatch.setattr(roofline, "measure", lambda device: pytest.fail("the roof was measured without need"))
    engine.run(make())
    assert engine.settle()[0] == line


def test_best_roof_of_a_run_judges_all_of_its_cases(engine, quiet, monkeypatch):
    """Two slow roofs, then a good one, then slow ones: what was judged before and after has the good one's numbers."""
    roofs = iter([SLOW, ROOF, SLOW, SLOW])
    monkeypatch.setattr(roofline, "measure", lambda device: next(roofs))
    engine.roof = SLOW
    peers = {"eager": eager, "copy": Peer(torch.clone, yardstick=True)}
    early = engine.run(make(peers=peers))
    assert early["status"] == "unjudged" and early["roof"]["copy_gbps"] == SLOW.copy_gbps
    assert "missing" in early["peers"]["copy"]
    assert engine.run(make(name="late"))["status"] == "ok"
    engine.run(make(name="too fast", bytes=10**12))
    settled, late, too_fast = engine.settle()
    assert too_fast["status"] == "failed" and too_fast["roof"] == ROOF.as_dict()
    assert settled["status"] == late["status"] == "ok" and "reason" not in settled
    assert settled["roof"] == late["roof"] == ROOF.as_dict()
    assert settled["peers"]["copy"]["speedup"] > 0
    floor = ROOF.floor_seconds(settled["bytes"], 0, "cpu", settled["state"] == "cached")
    assert settled["floor_us"] == pytest.approx(floor * 1e6)
    assert settled["roof_percent"] < early["roof_percent"]


def test_end_of_a_run_measures_the_roof_for_those_who_beat_it(engine, quiet, monkeypatch):
    measured = []
    monkeypatch.setattr(
        roofline, "measure", lambda device: measured.append(0) or (SLOW if len(measured) == 1 else ROOF)
    )
    engine.roof = SLOW
    assert engine.run(make())["status"] == "unjudged"
    assert [line["status"] for line in engine.settle()] == ["ok"]
    assert len(measured) == 2


def test_run_under_load_leaves_cases_unjudged_and_still_fails_wrong_ones(engine, monkeypatch):
    monkeypatch.setattr(records, "under_load", lambda lines: "load average up to 9 on 2 cores")
    engine.run(make(bytes=10**12))
    engine.run(make(run=torch.neg, oracle=toy))
    fast, wrong = engine.settle()
    assert fast["status"] == "unjudged" and "roof allows no less" in fast["reason"]
    assert wrong["status"] == "failed" and "output 0" in wrong["reason"]
    assert report._drawn([fast]) == []
    assert "unjudged: tilefuse took" in report.markdown([fast])


def test_cost_of_a_call_has_no_floor(engine, quiet):
    engine.run(make(bytes=10**12, call_cost=True))
    assert engine.settle()[0]["status"] == "ok"


def test_peer_that_beats_the_best_roof_fails_the_case_unless_its_output_was_never_compared(engine, quiet):
    engine.roof = SLOW
    line = checks.judge(line_of(state="cold", call_cost=False, median_us=1e9), ROOF, "cpu")
    assert line["status"] == "ok"
    for mark, status in (({}, "unjudged"), ({"unchecked": True}, "ok"), ({"yardstick": True}, "ok")):
        peers = {"eager": {"median_us": 1e-9, "speedup": 1e-9} | mark}
        before = line_of(state="cold", call_cost=False, median_us=1e9, peers=peers)
        line = checks.judge(before, ROOF, "cpu")
        assert line["status"] == status
        assert ("missing" in line["peers"]["eager"]) == (status == "ok")
        assert before["peers"]["eager"]["speedup"] == 1e-9 and before["status"] == "ok"
    line = engine.run(make(peers={"eager": eager, "random": Peer(eager, tolerance=None)}))
    assert line["peers"]["random"]["unchecked"] and "unchecked" not in line["peers"]["eager"]


def test_load_and_spread_say_that_a_run_was_under_load():
    def clocks(load, cores=2):
        return {"clocks": {"load": load, "cores": cores}}

    assert records.under_load([]) is None
    assert records.under_load([line_of(**clocks(2.5)), line_of(**clocks(3.0))]) is None
    assert records.under_load([line_of(**clocks(2.5)), line_of(**clocks(3.1))]) == "load average up to 3.1 on 2 cores"
    assert records.under_load([line_of(**clocks(9.0, 64))]) is None
    # an older line, and one of a GPU
    assert records.under_load([line_of(clocks={"load": 9.0}), line_of(clocks={"clocks.sm": "1"}), line_of()]) is None

    def spread(*percents):
        return [line_of(median_us=10.0, p20_us=9.0, p80_us=9.0 + percent / 10) for percent in percents]

    assert records.spread(line_of()) is None
    assert records.spread(spread(30)[0]) == pytest.approx(0.3)
    assert records.under_load(spread(5, 5, 20, 90, 90)) is None
    assert records.under_load(spread(90, 90)) is None
    assert records.under_load(spread(5, 5, 30, 90, 90)) == "median spread 30%"
    both = spread(5, 5, 30, 90, 90) + [line_of(**clocks(8.0))]
    assert records.under_load(both) == "load average up to 8 on 2 cores, median spread 30%"
    assert "Measured under load (median spread 30%): times are too long." in report.markdown(spread(30, 30, 30, 30, 30))
    assert "under load" not in report.markdown(spread(20, 20, 20, 20, 20))


def test_clocks_of_a_line_hold_what_the_load_is_compared_with(engine, monkeypatch):
    monkeypatch.setattr(records.os, "getloadavg", lambda: (7.0, 0, 0))
    monkeypatch.setattr(records.os, "cpu_count", lambda: 4)
    assert records.under_load([engine.run(make())]) == "load average up to 7 on 4 cores"


def test_case_that_reads_has_a_read_as_its_roof(engine):
    roof = roofline.Roof(10.0, 20.0, 5.0, 40.0, {"float32": 1e-6})
    assert roof.attainable_seconds(10**9, 0, "float32") == (pytest.approx(0.1), "memory")
    assert roof.attainable_seconds(10**9, 0, "float32", reads=True) == (pytest.approx(0.05), "read")
    assert roof.attainable_seconds(10**9, 0, "float32", True, True) == (pytest.approx(0.025), "cache")
    assert roof.attainable_seconds(1, 10**9, "float32", reads=True)[1] == "compute"
    # a read that was measured slower than a copy is no roof
    slow = dataclasses.replace(roof, read_gbps=1.0)
    assert slow.attainable_seconds(10**9, 0, "float32", reads=True)[0] == pytest.approx(0.1)
    line = line_of(state="cold", call_cost=False, bytes=10**6, median_us=1e3)
    assert checks.judge(line, roof, "cpu")["roof_percent"] == pytest.approx(10)
    judged = checks.judge(line | {"reads": True}, roof, "cpu")
    assert (judged["roof_percent"], judged["bound"]) == (pytest.approx(5), "read")
    assert engine.run(make(reads=True))["reads"] and "reads" not in engine.run(make())


def test_missing_and_failing_peers_keep_their_reasons(engine):
    def load():
        import a_library_nobody_has  # noqa: F401

    def broken(x):
        raise RuntimeError("needs a newer GPU\nand more")

    peers = {
        "eager": eager,
        "library": Peer(load=load),
        "broken": broken,
        "gpu only": Peer(eager, devices=("cuda",)),
        "other function": torch.neg,
        "wrong shape": lambda x: eager(x)[:3],
    }
    found = engine.run(make(peers=peers))["peers"]
    assert "a_library_nobody_has" in found["library"]["missing"]
    assert found["broken"]["missing"] == "RuntimeError: needs a newer GPU"
    assert found["gpu only"]["missing"] == "not on cpu"
    assert "another one" in found["other function"]["missing"]
    assert "shape" in found["wrong shape"]["missing"]
    assert "median_us" in found["eager"]


def test_a_library_that_is_not_installed_is_named(engine):
    peers = {
        "eager": eager,
        "library": Peer(load=lambda: peer_libraries.find("nobody-has-this"), package="nobody-has-this"),
    }
    line = engine.run(make(peers=peers))
    assert line["status"] == "ok", line
    assert report.missing([line]) == {"library": "nobody-has-this is not installed"}
    assert "version" not in line["peers"]["library"]


def test_a_library_for_another_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_libraries, "find", lambda package: importlib.metadata.distribution("torch"))
    with pytest.raises(ImportError, match=r"needs torch 1\.0, this is"):
        peer_libraries.load_library("some-kernels", "library.so", "1.0")
    with pytest.raises(ImportError, match=r"some-kernels: .*library\.so"):
        peer_libraries.load_library("some-kernels", "library.so", torch.__version__)


def test_peers_are_found_in_their_own_folder(tmp_path, monkeypatch):
    info = tmp_path / "some-kernels" / "some_kernels-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-kernels\nVersion: 1.5\n")
    monkeypatch.setattr(peer_libraries, "folder", lambda: tmp_path)
    assert peer_libraries.version("some-kernels") == "1.5"
    assert peer_libraries.find("some-kernels").locate_file("a/b.so") == tmp_path / "some-kernels/a/b.so"
    assert peer_libraries.version("other-kernels") is None


def test_line_carries_the_version_of_a_library(engine):
    line = engine.run(make(peers={"eager": eager, "library": Peer(eager, package="numpy")}))
    assert line["peers"]["library"]["version"] == importlib.metadata.version("numpy")
    assert "version" not in line["peers"]["eager"]


def test_library_is_checked_at_the_timed_size_too(engine):
    def small(device, generator):
        return (normal((8, 256), torch.bfloat16, device, generator),)

    called = []

    def wrong_when_large(x):
        called.append(x.shape[0])
        return eager(x) * (1 if x.shape[0] == 8 else 1.5)

    peers = {"eager": eager, "library": Peer(wrong_when_large, package="numpy"), "good": Peer(eager, package="numpy")}
    found = engine.run(make(oracle_inputs=small, peers=peers))["peers"]
    assert "at full size" in found["library"]["missing"] and "median_us" not in found["library"]
    # its first call was its last one
    assert called.count(64) == 1
    assert found["good"]["speedup"] > 0


def test_peer_may_state_its_own_error(engine):
    def coarse(x):
        return eager(x) * 1.04

    def peer(error):
        found = engine.run(make(peers={"eager": eager, "coarse": Peer(coarse, error=error)}))
        return found["peers"]["coarse"]

    assert peer(0.05)["speedup"] > 0
    assert "another one" in peer(0.03)["missing"]


def test_outputs_are_compared_as_what_they_have_in_common(engine):
    def halves(x):
        return toy(x) / 2, torch.full((1,), 2.0)

    def product(value, scale=None):
        return (value * scale if scale is not None else value,)

    peers = {"eager": eager, "scaled": Peer(halves, compared=product), "plain": Peer(halves)}
    found = engine.run(make(peers=peers))["peers"]
    assert found["scaled"]["speedup"] > 0
    assert "another one" in found["plain"]["missing"]


def test_peer_whose_threads_spin_is_bound_after_the_others_are_timed(engine, monkeypatch):
    events = []
    measure = timing.measure_cpu

    def measured(contestants, budget):
        events.append(sorted(contestants))
        return measure(contestants, budget)

    def prepare(x):
        events.append("prepared")
        return (x,)

    monkeypatch.setattr(timing, "measure_cpu", measured)
    peers = {"spinning": Peer(eager, prepare=prepare, apart=True), "eager": eager}
    line = engine.run(make(peers=peers))
    together = events.index(["eager", "tilefuse"])
    assert events.index(["spinning"]) == len(events) - 1 and events[together + 1 : -1] == ["prepared"] * 3
    ratio = line["peers"]["spinning"]["median_us"] / line["median_us"]
    assert line["peers"]["spinning"]["speedup"] == pytest.approx(ratio)


def test_peer_whose_threads_spin_finds_the_copies_of_the_others_freed(engine):
    copies, alive = weakref.WeakSet(), []

    def copied(x):
        copies.add(out := x.clone())
        return (out,)

    def spinning(x):
        alive.append(len(copies))
        return (x,)

    peers = {"copying": Peer(eager, prepare=copied), "spinning": Peer(eager, prepare=spinning, apart=True)}
    line = engine.run(make(prepare=copied, peers=peers | {"eager": eager}))
    assert line["peers"]["spinning"]["speedup"] > 0
    assert len(alive) == 1 + 3 and not any(alive)


def test_case_of_a_library_that_keeps_memory_runs_in_a_process_of_its_own(engine):
    case = harness.discover("quick", "cpu", match="moe_update_bias")[0]
    keeping = Peer(case.peer("eager").fn, package="torch", keeps_memory=True)
    # the new process takes the case by its id, so that it does not know this peer
    engine.settings.compile_seconds = 0
    line = engine.run(dataclasses.replace(case, peers={**case.peers, "keeping": keeping}))
    assert line["status"] == "ok" and line["median_us"] > 0
    assert line["peers"].keys() == case.peers.keys() and "compiles peers" in line["peers"]["torch.compile"]["missing"]
    # where the library is not installed, nothing is kept
    absent = dataclasses.replace(keeping, package="no-such-package", load=refused, fn=None)
    assert engine.run(make(peers={"eager": eager, "absent": absent}))["status"] == "ok"


def refused():
    raise ImportError("no such package")


def test_compile_budget_is_shared_by_family():
    settings = runner.Settings(compile_seconds=10, families=2)
    settings.compiling("rope", 6)
    assert not settings.may_compile("rope")
    assert settings.may_compile("moe")


def test_compile_budget_is_a_reason(engine):
    engine.settings.compile_seconds = 0
    line = engine.run(make(peers={"eager": eager, "torch.compile": compiled(eager)}))
    assert line["status"] == "ok"
    assert "compiles peers" in line["peers"]["torch.compile"]["missing"]


def test_torch_in_a_folder_with_a_blank_has_compiled_peers(tmp_path, monkeypatch):
    from torch._inductor.cpp_builder import get_cpp_torch_options
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    blank = tmp_path / "my projects" / "torch"
    blank.parent.mkdir()
    blank.symlink_to(Path(torch.__file__).parent)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "__file__", str(blank / "__init__.py"))
    with runner.compile_settings():
        options = get_cpp_torch_options("g++", invalid_vec_isa, True, *[False] * 4)
    # headers and libraries
    found = [path for part in options for path in part if isinstance(path, str) and path.startswith(str(tmp_path))]
    assert len(found) >= 2 and not any(" " in path for path in found)
    assert all(Path(path).is_dir() for path in found)


def test_yardstick_is_timed_but_is_no_peer(engine):
    line = engine.run(make(peers={"eager": eager, "copy": Peer(torch.clone, yardstick=True)}))
    assert line["peers"]["copy"]["yardstick"] and line["peers"]["copy"]["speedup"] > 0
    assert report.best_peer(line)[0] == "eager"
    assert "(yardstick: " in report.compared(line) and report.compared(line).endswith("x copy)")


def test_yardstick_below_the_floor_is_recorded_as_missing(engine):
    """Our million sigmoids take milliseconds, returning the argument some microseconds: the floor lies between."""

    def large(device, generator):
        return (normal((4096, 256), torch.bfloat16, device, generator),)

    peers = {"eager": eager, "nothing": Peer(lambda x: x, yardstick=True)}
    line = engine.run(make(inputs=large, peers=peers, bytes=int(50e-6 * ROOF.copy_gbps * 1e9)))
    assert line["status"] == "ok", line
    assert "roof allows no less" in line["peers"]["nothing"]["missing"]


def test_prepared_peer_has_its_own_layout(engine):
    peer = Peer(eager, prepare=lambda x: (x.t().contiguous(),), post=lambda y: y.t(), grads=(0,))
    for mode in harness.MODES:
        line = engine.run(make(peers={"eager": eager, "transposed": peer}, mode=mode, grads=(0,)))
        assert "speedup" in line["peers"]["transposed"], line


@pytest.mark.parametrize("mode", ["backward", "forward+backward"])
def test_gradients_are_checked(engine, mode):
    assert engine.run(make(mode=mode, grads=(0,)))["status"] == "ok"

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return toy(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            scale = 1 if x.dtype == torch.float64 else 1.05
            return grad * s * (1 + x * (1 - s)) * scale

    line = engine.run(make(mode=mode, grads=(0,), run=Wrong.apply))
    assert line["status"] == "failed"


def test_exact_case_compares_bits(engine):
    assert engine.run(make(run=eager, exact=True, oracle=eager))["error"] == {"exact": True}
    line = engine.run(make(run=toy, exact=True, oracle=eager))
    assert line["status"] == "failed"
    assert "bits" in line["reason"]


def test_in_place_op_is_checked_on_untouched_inputs(engine):
    def run(x):
        return x.copy_(toy(x))

    assert engine.run(make(run=run))["status"] == "ok"


def test_smaller_inputs_for_the_oracle_still_check_the_timed_size(engine):
    def small(device, generator):
        return (normal((8, 256), torch.bfloat16, device, generator),)

    assert engine.run(make(oracle_inputs=small))["status"] == "ok"

    def wrong_when_large(x):
        return toy(x) if x.shape[0] == 8 else torch.zeros_like(x)

    line = engine.run(make(oracle_inputs=small, run=wrong_when_large))
    assert line["status"] == "failed"
    assert "full size" in line["reason"]


def test_compiled_peer_that_fails_at_full_size_is_missing(engine):
    def small(device, generator):
        return (normal((8, 256), torch.bfloat16, device, generator),)

    def large_only(x):
        raise RuntimeError("no room")

    line = engine.run(make(oracle_inputs=small, peers={"eager": eager, "compiled": compiled(large_only)}))
    assert line["status"] == "ok", line
    assert "no room" in line["peers"]["compiled"]["missing"]


def test_call_cost_is_reported(engine):
    line = engine.run(make(call_cost=True))
    assert line["call_us"] > 0
    assert line["peers"]["eager"]["call_us"] > 0


def test_peak_memory_is_reported(engine):
    size = 2**26

    def wasteful(x):
        # written, so that it is resident
        return eager(x) + torch.ones(size // 4).mul_(0).sum().to(x.dtype)

    line = engine.run(make(memory=True, peers={"eager": eager, "wasteful": wasteful}))
    if line["peak_bytes"] is None:
        pytest.skip("this kernel does not reset a process's peak memory")
    assert line["peak_bytes"] < size / 8
    assert 0.9 * size < line["peers"]["wasteful"]["peak_bytes"] < 2.5 * size
    assert "peak_bytes" not in engine.run(make())


def test_op_without_backend_is_unavailable_not_failed(engine):
    def run(x):
        raise NotImplementedError("tilefuse.toy: no backend for cpu")

    assert engine.run(make(run=run))["status"] == "unavailable"


def test_case_refuses_nonsense():
    with pytest.raises(ValueError, match="mode"):
        make(mode="sideways")
    with pytest.raises(ValueError, match="needs grads"):
        make(mode="backward")
    with pytest.raises(ValueError, match="least work"):
        make(bytes=0)
    with pytest.raises(ValueError, match="suite"):
        make(suite="huge")
    with pytest.raises(ValueError, match="either"):
        Peer()


def test_slow_contestants_sit_out_rounds_but_stay_paired():
    clock = {"a": 0, "b": 0}

    def sampler(name, cost):
        def sample():
            clock[name] += 1
            return cost

        return sample

    cost = {"a": 0.001, "b": 0.05, "c": 0.007}
    clock["c"] = 0
    samples = timing._rounds({name: sampler(name, cost[name]) for name in cost}, cost, 0.4)
    assert len({len(taken) for taken in samples.values()}) == 1
    assert clock["a"] > clock["c"] > clock["b"] >= timing.FEWEST_ROUNDS
    timings = {name: timing._summary(samples[name], 1, "test") for name in cost}
    for ours in cost:
        for other in cost:
            assert timing.paired_ratio(timings[other], timings[ours]) == pytest.approx(cost[other] / cost[ours])


def test_measure_cpu_rotates_over_the_sets():
    seen = []
    sets = [lambda i=i: seen.append(i) for i in range(3)]
    timing.measure_cpu({"x": sets}, 0.01)
    assert set(seen) == {0, 1, 2}
    assert all((b - a) % 3 == 1 for a, b in itertools.pairwise(seen))


def test_narrow_products_have_the_roof_of_wide_ones():
    """A CPU without bfloat16 products: torch's are slow there, and no bar may say several hundred percent."""
    roof = dataclasses.replace(ROOF, tflops={"float32": 0.3, "bfloat16": 0.06})
    assert roof.matmul("bfloat16") == roof.matmul("float32") == 0.3
    assert dataclasses.replace(ROOF, tflops={"float32": 0.2, "bfloat16": 0.4}).matmul("bfloat16") == 0.4


def test_roof_of_this_machine():
    roof = roofline.measure(CPU, seconds=0.1)
    assert roof.copy_gbps > 0.1
    assert roof.tflops["float32"] > 0
    seconds, bound = roof.attainable_seconds(10**9, 1, "float32")
    assert bound == "memory"
    assert seconds == pytest.approx(1 / roof.copy_gbps)
    assert roof.attainable_seconds(1, 10**12, "float32")[1] == "compute"
    assert roof.floor_seconds(10**9, 0, "cpu", True) <= roof.floor_seconds(10**9, 0, "cpu", False)


def line_of(case="toy | a", device="CPU X, 2 threads", **changes):
    base = {
        "case": case,
        "op": "toy",
        "family": "toy",
        "name": "a",
        "dtype": "bfloat16",
        "mode": "forward",
        "device": device,
        "device_key": "cpu_x",
        "date": "2026-01-01T00:00:00+00:00",
        "status": "ok",
        "bytes": 1000,
        "flops": 0,
        "median_us": 2.0,
        "gbps": 0.5,
        "tflops": 0.0,
        "roof_percent": 50.0,
        "bound": "memory",
        "peers": {
            "eager": {"median_us": 8.0, "speedup": 4.0},
            "torch.compile": {"median_us": 3.0, "speedup": 1.5},
            "lib": {"missing": "ModuleNotFoundError: No module named 'lib'"},
        },
        "versions": {"torch": "2", "triton": None},
        "commit": "a" * 40,
        "dirty": False,
        "roof": ROOF.as_dict(),
    }
    return base | changes


def test_a_run_replaces_its_own_lines_only(tmp_path):
    path = tmp_path / "r.jsonl"
    records.write_lines(path, [line_of(median_us=1.0), line_of("toy | b"), line_of(device="GPU")])
    records.write_lines(path, [line_of(median_us=1.23456789)])
    lines = records.read_lines(path)
    assert len(lines) == 3
    (replaced,) = [line for line in lines if line["case"] == "toy | a" and line["device"] != "GPU"]
    assert replaced["median_us"] == 1.2346


def test_report_holds_what_the_lines_hold():
    lines = [
        line_of(p20_us=1.9, p80_us=2.3),
        line_of("toy | b", name="b", status="failed", reason="wrong"),
        line_of("toy | c", name="c", call_cost=True, call_us=1.5),
        line_of(
            "other | d",
            op="other",
            family="second",
            name="d",
            peak_bytes=1500000,
            peers={"eager": {"speedup": 4.0, "peak_bytes": 40000000}},
        ),
    ]
    text = report.markdown(lines)
    assert "failed: wrong" in text
    assert "1.50 us per call" in text
    # one table per family, and no column that is empty for most of its rows
    assert text.count("| op | case |") == 2
    assert "### toy, CPU X" in text and "### second, CPU X" in text
    assert "| toy | a | bfloat16 | forward | 2.00 us | 20% | 50% memory | **1.5x torch.compile** · 4.0x eager |" in text
    assert "- lib is not installed: lib" in text
    assert "**4.0x eager** | 1.5 MB (40 MB) |" in text
    assert report.best_peer(lines[0]) == ("torch.compile", 1.5)
    # a picture for each family that has a bar
    assert text.count("<!-- table: benchmark_picture cpu_x ") == 2


def test_peers_that_did_not_run_take_one_line_per_reason():
    long = "RuntimeError: " + "x" * 500 + "\nsecond line"
    peers = {"flex": {"missing": "not on cpu"}, "flash": {"missing": "not on cpu"}, "broken": {"missing": long}}
    lines = [line_of(peers=peers), line_of("toy | b", peers={"flex": {"speedup": 2.0}})]
    assert report.missing(lines)["flex"] == "not on cpu (in 1 of 2 cases)"
    text = report.markdown(lines)
    assert "- not on cpu: flash, flex (in 1 of 2 cases)" in text
    assert "second line" not in text
    assert max(len(line) for line in text.splitlines() if line.startswith("- ")) < 150


def test_whole_models_have_a_table_of_their_own(tmp_path):
    stock = {"tokens_per_second": 80.25, "peak_bytes": 300 * 2**20, "speedup": 2.0}
    model = line_of(
        "Llama | x",
        op="Llama",
        name="x",
        mode="train",
        family="models",
        peers={"stock": stock},
        tokens_per_second=160.5,
        p20_us=1.9,
        p80_us=2.1,
        peak_bytes=2.5 * 2**20,
    )
    failed = model | {"status": "failed", "reason": "wrong", "case": "other"}
    text = report.markdown([line_of(), model, failed])
    assert "| Llama | x | bfloat16 | train | 80.2 -> 160 | 10% | **2.0x** | 300 -> 2.5 MiB |" in text
    assert "failed: wrong" in text
    assert text.index("Whole models") < text.index("### toy")
    assert report.plot([model], tmp_path) == []


def test_labels_tell_cases_of_one_op_apart():
    lines = [
        line_of(name="DeepSeek-V3, bf16 cache"),
        line_of(name="DeepSeek-V3, fp8 cache"),
        line_of(op="rope", name="one"),
        line_of(op="rope", name="one", mode="backward"),
    ]
    assert report.labels(lines) == ["toy: bf16 cache", "toy: fp8 cache", "rope fwd", "rope bwd"]
    assert report.labels(lines, cases=True)[0] == "toy: DeepSeek-V3, bf16 cache"


def test_op_table_says_which_peer(monkeypatch):
    import tilefuse

    name = "rope_qk"
    lines = [line_of(op=name), line_of(op=name, peers={"eager": {"speedup": 3.0}})]
    (row,) = [row for row in report.op_table(tilefuse.ops(), lines).splitlines() if f"`{name}`" in row]
    assert "1.5x to 3.0x torch.compile and eager" in row
    assert report.op_table(tilefuse.ops(), []).count("not measured") == len(tilefuse.ops())
    # a column for each machine, whose header is not repeated in the cells
    lines.append(line_of(op=name, device="CPU Y", peers={"eager": {"speedup": 0.9}}))
    header, _, *rows = report.op_table(tilefuse.ops(), lines).splitlines()
    assert header == "| op | CPU X, 2 threads | CPU Y | exceptions |"
    (row,) = [row for row in rows if f"`{name}`" in row]
    assert "| 1.5x to 3.0x torch.compile and eager | 0.90x eager |" in row


def test_op_table_says_where_some_kernels_of_an_op_are_missing():
    import tilefuse

    rows = {row.split("`")[1]: row.split(" | ") for row in report.op_table(tilefuse.ops(), []).splitlines()[2:]}
    exceptions = {name: cells[2].removesuffix(" |") for name, cells in rows.items()}
    assert exceptions["rope_qk"] == "CUDA too"
    assert exceptions["window_attention"] == ""
    assert exceptions["fp8_quantize"] == "no backward, CUDA in part"
    assert exceptions["moe_z_loss"] == "no Triton"
    assert exceptions["sequence_logp"] == "PyTorch only"


def test_headline_is_one_line_of_each_of_its_ops():
    import tilefuse

    assert set(report.HEADLINE) <= set(tilefuse.ops())
    assert 8 <= len(set(report.HEADLINE)) == len(report.HEADLINE) <= 10
    first, second = report.HEADLINE[:2]
    lines = [
        line_of(op=second),
        line_of("a | backward", op=first, mode="backward"),
        line_of("a | forward", op=first),
        line_of("a | larger", op=first),
        line_of(),
    ]
    assert [(line["op"], line["case"]) for line in report.headline(lines)] == [
        (first, "a | forward"),
        (second, "toy | a"),
    ]
    # an own choice of cases is drawn as it is
    assert report.headline([line_of()]) == [line_of()]


def test_model_table_has_a_line_per_model():
    def model(name, mode, speedup, **changes):
        return line_of(op=name, mode=mode, family="models", peers={"stock": {"speedup": speedup}}, **changes)

    failed = model("B", "train", 9.0, status="failed")
    table = report.model_table(
        [model("A", "prefill", 2.0), model("A", "prefill", 3.0), model("B", "decode", 0.5), failed]
    )
    assert "| A | 2.0x to 3.0x |  |  |" in table
    assert "| B |  | 0.50x |  |" in table


def test_plots_are_drawn_from_lines(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    lines = [line_of(), line_of("toy | b", name="b"), line_of("slow | c", op="slow", family="second", suite="full")]
    (path,) = report.plot(lines, tmp_path)
    assert path.name == "cpu_x_overview.png" and path.stat().st_size > 1000
    assert report.draw(lines, tmp_path / "cases.svg", cases=True)
    drawn = path.read_bytes()
    assert report.plot(lines, tmp_path) == [path] and path.read_bytes() == drawn
    assert report.plot([line_of(status="failed", reason="x")], tmp_path) == []
    assert not report.draw([line_of(call_cost=True)], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_growth_is_drawn_for_a_series_of_at_least_three_lengths(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    lines = [line_of(f"toy | {n}", name=str(n), series="window 512", length=1024 * n) for n in (4, 2, 1)]
    assert [path.name for path in report.plot(lines, tmp_path)] == ["cpu_x_overview.png", "cpu_x_growth.png"]
    assert not report.draw_growth(lines[:2], tmp_path / "none.png")
    assert not report.draw_growth([*lines[:2], line_of()], tmp_path / "none.png")


def test_a_series_needs_a_length():
    rest = {"inputs": None, "run": None, "peers": {}, "bytes": 1}
    for changes in ({"series": "a"}, {"length": 8}):
        with pytest.raises(ValueError, match="a series needs a length"):
            harness.Case("toy", "a", "bfloat16", **rest, **changes)


def test_readme_parts_are_replaced_between_marks():
    marks = "".join(
        "\n".join(mark.format(name=name) for mark in report.MARKS) + "\n" for name in ("plot", "ops", "models")
    )
    text = report.readme(f"# Title\n{marks}end\n", {}, [], [])
    assert text.startswith("# Title\n") and text.endswith("end\n")
    assert "not run on any GPU yet" in text
    assert report.readme(text, {}, [], []) == text
    with pytest.raises(ValueError, match="once"):
        report.readme("no marks", {}, [], [])
    page = "".join(f"{mark.format(name='numbers')}\n" for mark in report.MARKS)
    filled = report.page(page, [line_of(), line_of(device="NVIDIA H200")])
    assert filled.index("## NVIDIA H200") < filled.index("## CPU X") and "not run on any GPU" not in filled
    assert report.page(filled, [line_of()]) == report.page(page, [line_of()])


def test_cases_of_every_family_are_well_formed():
    cases = harness.discover("full", "cpu") + harness.discover("full", "cuda")
    assert len({case.id for case in harness.discover("full", "cpu")}) == len(harness.discover("full", "cpu"))
    for case in cases:
        # never eager alone: its compiled form, or the library op that does the same
        assert "eager" in case.peers and len(case.peers) > 1, case.id
    quick = {case.id for case in harness.discover("quick", "cpu")}
    assert quick <= {case.id for case in harness.discover("full", "cpu")}


def test_shapes_are_consistent():
    for model in shapes.MODELS:
        assert model.heads % model.kv_heads == 0
        assert model.experts % model.n_group == 0
        assert bool(model.experts) == bool(model.top_k) == bool(model.moe_intermediate)
        if model.kv_lora_rank:
            assert model.head_dim == model.nope_dim + model.rope_dim


@pytest.mark.gpu
def test_cuda_timer_agrees_with_the_roof():
    device = torch.device("cuda")
    x = torch.randn(2**28, device=device)
    y = torch.empty_like(x)
    leaf = torch.randn(2**20, device=device, requires_grad=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = leaf.exp()
        calls = {
            "copy": [lambda: y.copy_(x)],
            "backward": [lambda: torch.autograd.grad(out, leaf, out, retain_graph=True)],
        }
        timings = timing.measure_cuda(calls, 0.2)
    assert {t.method for t in timings.values()} == {"graph"}
    found = timings["copy"]
    roof = roofline.measure(device)
    assert 2 * x.nbytes / found.median / 1e9 == pytest.approx(roof.copy_gbps, rel=0.1)
