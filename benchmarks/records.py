"""Result lines: the machine and the code that they belong to, and the files that hold them."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tilefuse

from . import roofline

HERE = Path(__file__).resolve().parent
# above either, a run was under load: load average per core, and the median of its cases' spreads where they are enough
LOAD, SPREAD, ENOUGH = 1.5, 0.25, 5


def device_key(device: torch.device) -> str:
    """File name of a device's results."""
    return re.sub(r"[^a-z0-9]+", "_", roofline.describe_device(device).lower()).strip("_")


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the code."""
    versions = {"tilefuse": tilefuse.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["driver"] = _nvidia_smi("driver_version")
    commit, dirty = commit_of_checkout()
    return {"versions": versions, "commit": commit, "dirty": dirty, "threads": torch.get_num_threads()}


def commit_of_checkout() -> tuple[str | None, bool | None]:
    """The commit measured and whether source files differed from it. ``TILEFUSE_COMMIT`` says it without git."""
    if stated := os.environ.get("TILEFUSE_COMMIT"):
        return stated.removesuffix("-dirty"), stated.endswith("-dirty")

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # an installed copy may lie in someone else's repository
        if not (Path(git("rev-parse", "--show-toplevel")) / "benchmarks" / "harness.py").samefile(HERE / "harness.py"):
            return None, None
        # results are written by the run itself
        ours = [":/", ":!/benchmarks/results", ":!/README.md", ":!/python/tilefuse/verified.json"]
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", *ours))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _nvidia_smi(query: str) -> str | None:
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip().splitlines()[0] if out.returncode == 0 and out.stdout.strip() else None


def clocks(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
        values = _nvidia_smi(",".join(names))
        return dict(zip(names, (v.strip() for v in values.split(",")))) if values else {}
    found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2), "cores": os.cpu_count()}
    if os.path.exists("/proc/cpuinfo"):
        mhz = [float(v) for v in re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())]
        found["mhz"] = max(mhz, default=None)
    return found


def spread(line: Mapping[str, Any]) -> float | None:
    """How far a case's rounds lie apart: from the 20th to the 80th percentile, over the median. None without rounds."""
    if "p20_us" not in line:
        return None
    return (line["p80_us"] - line["p20_us"]) / line["median_us"]


def under_load(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What says that the machine had other work while these lines were measured, or None.

    The load average of any line, its own threads included, against the cores (lines of a GPU, and older ones, have
    none), and the median spread of all lines.
    """
    clocks = [line.get("clocks", {}) for line in lines]
    load, cores = max(((c["load"], c["cores"]) for c in clocks if c.get("cores")), default=(0.0, 1))
    spreads = [found for line in lines if (found := spread(line)) is not None]
    words = [f"load average up to {load:.3g} on {cores} cores"] if load > LOAD * cores else []
    if len(spreads) >= ENOUGH and statistics.median(spreads) > SPREAD:
        words.append(f"median spread {statistics.median(spreads):.0%}")
    return ", ".join(words) or None


def results_folder() -> Path:
    """``benchmarks/results`` of a checkout, else a folder in the working directory."""
    if (HERE.parent / "setup.py").exists():
        return HERE / "results"
    return Path.cwd() / "tilefuse-results"


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text().splitlines() if text.strip()]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a file of results, each in place of the earlier one for the same case and device."""
    merged = {(line["case"], line["device"]): line for line in read_lines(path)}
    for line in lines:
        merged[line["case"], line["device"]] = dict(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(merged.values(), key=lambda line: (line["device"], line["family"], line["case"]))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(_rounded(line)) + "\n" for line in ordered))
    temporary.replace(path)


def _rounded(value: Any) -> Any:
    """Five digits are more than any timing holds, and keep diffs readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value
