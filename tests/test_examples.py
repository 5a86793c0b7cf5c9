"""The examples, run as a new user runs them, with small settings."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs a source checkout")

SETTINGS = {"batch": 2, "length": 32, "width": 64, "layers": 1, "steps": 6, "save-every": 2, "sample": 30}
TINY = [f"--{name}={value}" for name, value in SETTINGS.items()]


def run(name, *arguments, launcher=()):
    # a user's shell does not ask for Triton's interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_training_and_resume(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = run("train_deepseek_style_lm.py", "--out", whole, *TINY)
    assert "parameters" in out and "Day 301. Wind from the" in out
    run("train_deepseek_style_lm.py", "--out", parts, *TINY, "--steps=4")
    assert len(torch.load(parts / "checkpoint.pt")["losses"]) == 4
    resumed = run("train_deepseek_style_lm.py", "--out", parts, *TINY, "--resume")
    states = [torch.load(folder / "checkpoint.pt", map_location="cpu") for folder in (whole, parts)]
    assert len(states[0]["losses"]) == len(states[1]["losses"]) == 6
    assert states[0]["losses"][-1] < states[0]["losses"][0]
    if not torch.cuda.is_available():
        # an interruption leaves no trace
        assert states[0]["losses"] == states[1]["losses"]
        assert out.split("loss.png")[-1] == resumed.split("loss.png")[-1]
        for name, tensor in states[0]["model"].items():
            assert torch.equal(tensor, states[1]["model"][name]), name
    assert is_png(whole / "loss.png") and is_png(parts / "loss.png")


def test_grpo(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    sizes = {"warm-up": 4, "batch": 8, "steps": 4, "prompts": 3, "group": 4, "check-every": 2, "width": 32, "layers": 1}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    out = run("grpo_arithmetic.py", "--out", tmp_path, *arguments)
    assert "of 20 held-out sums right" in out and "reward" in out and "in the first 4 steps" in out
    assert is_png(tmp_path / "reward.png")


def test_rewards_of_grpo(monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    grpo = importlib.import_module("grpo_arithmetic")
    prompts, right = grpo.sums()
    assert len({*map(tuple, prompts.tolist())}) == 100
    for prompt, answer in zip(prompts.tolist(), right.tolist()):
        a, b = bytes(prompt).decode().removesuffix("=").split("+")
        assert bytes(answer).decode().rstrip() == str(int(a) + int(b))
    expected = {"7\n\n": 1, "7\nx": 1, "7x\n": 0, "77\n": 0, "\n7\n": 0, "07\n": 0, "8\n\n": 0}
    answers, seven = (torch.tensor([[*x.encode()] for x in xs]) for xs in (expected, ["7\n\n"]))
    assert grpo.rewards(answers, seven.expand_as(answers)).tolist() == [*expected.values()]
    assert grpo.kept(answers).sum(1).tolist() == [2, 2, 3, 3, 1, 3, 2]


def test_distillation(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    sizes = {"batch": 2, "length": 32, "width": 64, "layers": 1, "steps": 3, "topk": 4, "check-every": 2}
    tiny = [f"--{name}={value}" for name, value in sizes.items()]
    out = run("distil_lm.py", "--out", tmp_path, "--teacher-steps=3", *tiny)
    assert "student of text and teacher" in out and is_png(tmp_path / "distilled.png")
    table = [line.split() for line in out.splitlines()[-3:]]
    assert [row[0] for row in table] == ["teacher", "text", "text"]
    # half the width has fewer parameters, and the teacher agrees with itself
    assert int(table[1][1].replace(",", "")) < int(table[0][1].replace(",", "")) and float(table[0][-1]) == 0
    assert torch.load(tmp_path / "student.pt")["embed.weight"].shape == (256, 32)
    again = run("distil_lm.py", "--out", tmp_path, "--teacher", tmp_path, *tiny)
    if not torch.cuda.is_available():
        # the teacher is the same, and so are its students
        assert again.splitlines()[-3:] == out.splitlines()[-3:]


def test_text_is_what_its_generator_makes():
    done = subprocess.run(
        [sys.executable, "-c", "import make_text; print(make_text.text(), end='')"],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=True,
    )
    text = (EXAMPLES / "lighthouse.txt").read_text()
    assert done.stdout == text and 50_000 < len(text) < 100_000


def test_expert_parallel():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run("expert_parallel.py", "--steps", 4, "--tokens", 64, launcher=launcher)
    assert "2 processes on" in out and "4 of 8 experts each" in out
    assert "the same training" in out


def test_expert_parallel_says_how_to_start_it():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "expert_parallel.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "torchrun --nproc-per-node 2" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--kind", "bigbird", "--length", 1024)], ids=["all", "one"])
def test_show_pattern(tmp_path, arguments):
    pytest.importorskip("matplotlib")
    out = run("show_pattern.py", "--out", tmp_path / "pictures" / "patterns.png", *arguments)
    assert is_png(tmp_path / "pictures" / "patterns.png")
    assert ("bigbird" in out) and ("strided" in out) == (not arguments)
