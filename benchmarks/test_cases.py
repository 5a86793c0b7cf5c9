"""The quick CPU cases for pytest-benchmark: ``pytest benchmarks``, then ``pytest-benchmark compare``.

For regressions of tilefuse and its peers on one machine; the published numbers come from `tilefuse bench`, whose
rounds are paired and whose buffers rotate.
"""

import pytest
import torch
from tilefuse.benchmarks import harness, runner
from tilefuse.benchmarks.contestants import Contestant

import tilefuse

pytest.importorskip("pytest_benchmark", reason="pytest benchmarks needs pytest-benchmark")
CPU = torch.device("cpu")
PAIRS = [(case, name) for case in harness.discover("quick", "cpu") for name in ("tilefuse", *case.peers)]


@pytest.fixture(autouse=True)
def _as_measured():
    runner.keep_freed_memory()
    with runner.compile_settings(), torch.no_grad():
        yield


@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{case.id} | {name}" for case, name in PAIRS])
def test_case(benchmark, case, name):
    peer = case.ours if name == "tilefuse" else case.peer(name)
    if "cpu" not in peer.devices:
        pytest.skip(f"{name} does not run on a CPU")
    try:
        contestant = Contestant(case, peer)
    except ImportError as reason:
        pytest.skip(f"{name}: {reason}")
    benchmark.group = case.id
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, backend=tilefuse.backend())
    call = contestant.bind(case.inputs(CPU, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    call()
    benchmark(call)
