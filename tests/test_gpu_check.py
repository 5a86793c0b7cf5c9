"""scripts/gpu_check.sh, tried without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check.sh"


def run(*args, **environment):
    env = os.environ | {"PYTHON": sys.executable} | environment
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([str(SCRIPT), *args], capture_output=True, text=True, timeout=600, env=env)


def test_usage():
    done = run()
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_no_time_still_ends_with_a_summary(tmp_path):
    done = run(str(tmp_path), GPU_CHECK_DRY="1", GPU_CHECK_SECONDS="1")
    assert "not run: no time left" in done.stdout
    assert (tmp_path / "00_summary.txt").read_text() in done.stdout
    assert (tmp_path / "verified.json").exists()


@pytest.mark.slow
def test_dry_run_goes_through_every_phase(tmp_path):
    done = run(str(tmp_path), GPU_CHECK_DRY="1")
    summary = (tmp_path / "00_summary.txt").read_text()
    assert done.returncode == 0, summary
    for phase in (
        "CUDA library",
        "doctor",
        "verify",
        "benchmark of rope",
        "tests of rope",
        "compute-sanitizer",
        "total",
    ):
        assert phase in summary
    assert list((tmp_path / "results").glob("*.jsonl"))
