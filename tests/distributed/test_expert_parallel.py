"""Expert parallelism on gloo with 2 and 4 processes against the single-process layer (cases in worker.py)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")
_spec = importlib.util.spec_from_file_location("expert_parallel_worker", WORKER)
_worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_worker)


def launch(folder, world, *cases):
    """Runs the ranks and returns one {case: traceback or ""} per rank; None for a rank that left no result."""
    results = [folder / f"rank{rank}.json" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                str(rank),
                str(world),
                str(folder / "rendezvous"),
                str(results[rank]),
                *cases,
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"rank{rank}.log").open("w"),
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.wait(timeout=180)
    finally:
        for process in processes:
            process.kill()
    return [json.loads(path.read_text()) if path.exists() else None for path in results]


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp(f"world{request.param}"), request.param)


@pytest.mark.xdist_group("expert_parallel")
@pytest.mark.parametrize("case", [name for name in _worker.CASES if name not in _worker.ALONE])
def test_case(outcomes, case):
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None, f"rank {rank} crashed"
        assert case in outcome, f"rank {rank} did not reach this case"
        assert outcome[case] == "", f"rank {rank}:\n{outcome[case]}"


@pytest.mark.xdist_group("expert_parallel")
@pytest.mark.parametrize("world", [2, 4])
def test_dying_rank_raises_on_the_others(tmp_path, world):
    outcomes = launch(tmp_path, world, "rank_dies")
    assert outcomes[1] is None
    for rank in set(range(world)) - {1}:
        assert outcomes[rank] == {"rank_dies": ""}


@pytest.mark.xdist_group("expert_parallel")
def test_stalled_rank_ends_in_the_time_limit(tmp_path):
    outcomes = launch(tmp_path, 2, "rank_stalls")
    assert outcomes[0] == {"rank_stalls": ""}
