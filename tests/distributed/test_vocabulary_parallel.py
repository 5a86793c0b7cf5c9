"""A head whose vocabulary is divided among ranks has the bits of the whole one: gloo with 1, 2 and 4 processes."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("vocabulary_worker.py")


@pytest.mark.xdist_group("vocabulary_parallel")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_has_the_bits_of_the_whole(tmp_path, world):
    logs = [tmp_path / f"rank{rank}.log" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(tmp_path / "rendezvous")],
            stdout=subprocess.DEVNULL,
            stderr=log.open("w"),
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-2000:] for log in logs)
