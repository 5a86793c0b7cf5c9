"""The checked-in figures of every kernel, and what counts as a problem."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...arch import SHARED_MEMORY

BASELINE_DIR = Path(__file__).resolve().parents[4] / "tests" / "resources"
# what a compiler may change from build to build without anybody caring
REGISTER_SLACK = 8
# spill instructions outside of inner loops, run once per tile, that nobody needs to give a reason for
SPILL_SLACK = 32
# columns of Blackwell's tensor memory
TENSOR_MEMORY = 512
_KEPT = ("registers", "stack", "shared", "spills", "loads_128", "stores_128")


def key(record: Mapping[str, Any]) -> str:
    """Name of a record's kernel within its family's baseline."""
    if record["backend"] == "cuda":
        return f"{record['op']}.cu/{record['case']}"
    return f"{record['op']}/{record['case']}/{record['kernel']}"


def label(record: Mapping[str, Any]) -> str:
    """How ``problems`` names a record."""
    return f"{record['family']}/{key(record)} on {record['target']}"


def read_baseline(family: str, folder: Path = BASELINE_DIR) -> dict[str, Any]:
    path = folder / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {"kernels": {}}


def write_baseline(result: Mapping[str, Any], folder: Path = BASELINE_DIR) -> list[Path]:
    """Writes the baseline of every family in ``result``; kernels that it did not compile keep their lines."""
    written = []
    for family in sorted({r["family"] for r in result["records"]}):
        old = read_baseline(family, folder)
        fresh = [r for r in result["records"] if r["family"] == family and not r["error"]]
        backends = {r["backend"] for r in fresh}
        kernels: dict[str, dict[str, Any]] = {}
        for name, lines in old["kernels"].items():
            compiler, backend = ("nvcc", "cuda") if ".cu/" in name else ("triton", "triton")
            # figures of two compilers do not mix
            if backend in backends and old.get(compiler) != result[compiler]:
                continue
            there = _still_there(result, family, name)
            if kept := {t: line for t, line in lines.items() if there(t)}:
                kernels[name] = kept
        for r in fresh:
            kernels.setdefault(key(r), {})[r["target"]] = {k: r[k] for k in _KEPT} | {"matrix": r["matrix"]}
        versions = {
            "triton": result["triton"] if "triton" in backends else old.get("triton"),
            "nvcc": result["nvcc"] if "cuda" in backends else old.get("nvcc"),
        }
        # one line per kernel and target keeps the differences readable
        text = ",\n".join(
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"   {json.dumps(t)}: {json.dumps(line)}" for t, line in sorted(kernels[name].items()))
            + "\n  }"
            for name in sorted(kernels)
        )
        path = folder / f"{family}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "".join(f' "{k}": {json.dumps(v)},\n' for k, v in versions.items())
        path.write_text(f'{{\n{head} "kernels": {{\n{text}\n }}\n}}\n')
        written.append(path)
    return written


def problems(result: Mapping[str, Any], folder: Path = BASELINE_DIR) -> list[str]:
    """What is wrong with the compiled kernels, one line each: the resource gate.

    Nothing to compile; without ``allow_spill`` a spill in an inner loop, more than ``SPILL_SLACK`` outside of them, or
    stack for anything else; an expected instruction that is missing, more shared memory than the architecture has, a
    kernel that no case compiles; and where there are baselines, a first case that is not in its baseline, a line of a
    baseline whose case or kernel no longer exists, and a case that got worse: more than ``REGISTER_SLACK`` more
    registers, more shared memory, more spills, a 128-bit access or the matrix unit lost. Registers, shared memory and
    spills are compared only for the same version of Triton or nvcc.
    """
    found = [] if result["records"] else ["nothing was compiled"]
    found += [f"{name} is launched but compiled by no aot case" for name in result["uncovered"]]
    for r in result["records"]:
        if r["error"]:
            found.append(f"{label(r)}: does not compile: {r['error']}")
            continue
        spilled = r["loop_spills"] or r["spills"] > SPILL_SLACK or (r["stack"] and not r["spills"])
        if spilled and not r["allow_spill"]:
            figures = f"{r['spills']} spill instructions, {r['loop_spills']} of them in inner loops"
            found.append(f"{label(r)}: {r['stack']} bytes of stack, {figures}")
        found += [f"{label(r)}: no {item}" for item in r["lacking"]]
        limit = SHARED_MEMORY[r["target"]]
        if r["shared"] > limit:
            found.append(f"{label(r)}: cannot launch, {r['shared']} bytes of shared memory, {limit} there")
        if r["tensor_memory"] > TENSOR_MEMORY:
            found.append(
                f"{label(r)}: cannot launch, {r['tensor_memory']} tensor memory columns, {TENSOR_MEMORY} there"
            )
    if not folder.is_dir():
        return found
    families = {r["family"] for r in result["records"]} - {"file"}
    if result["family"] is None and families:
        families |= {path.stem for path in folder.glob("*.json")}
    for family in sorted(families):
        baseline = read_baseline(family, folder)
        seen = {(key(r), r["target"]): r for r in result["records"] if r["family"] == family}
        for (name, target), r in seen.items():
            old = baseline["kernels"].get(name, {}).get(target)
            if old is None and r["first"] and not r["error"]:
                found.append(f"{label(r)}: not in {family}.json, run python -m tilefuse inspect --update-baseline")
            elif old is not None and not r["error"]:
                compiler = "triton" if r["backend"] == "triton" else "nvcc"
                found += _worse(r, old, baseline.get(compiler) == result[compiler])
        for name, lines in baseline["kernels"].items():
            there = _still_there(result, family, name)
            found += [f"{family}/{name} on {t}: in the baseline but no longer compiled" for t in lines if not there(t)]
    return found


def _still_there(result: Mapping[str, Any], family: str, name: str) -> Callable[[str], bool]:
    """Whether a kernel of the baseline still exists for a target; yes where this run could not know."""
    if result["op"] not in (None, re.split(r"\.cu/|/", name)[0]):
        return lambda t: True
    if ".cu/" in name:
        built = [r for r in result["records"] if r["backend"] == "cuda"]
        targets = {r["target"] for r in built if (r["family"], key(r)) == (family, name)}
        return lambda t: t in targets or t not in {r["target"] for r in built}
    if not result["triton"]:
        return lambda t: True
    case, kernel = name.rsplit("/", 1)
    known = result["known"].get(family, {}).get(case, ())
    compiled = result["binaries"].get(family, {}).get(name, ())
    exists = re.sub(r"_\d+$", "", kernel) in result["kernels"]
    return lambda t: t in compiled if t in result["targets"] else t in known and exists


def _worse(r: Mapping[str, Any], old: Mapping[str, Any], same_compiler: bool) -> list[str]:
    found = []
    if same_compiler:
        limits = {"registers": REGISTER_SLACK, "shared": 0, "stack": 0, "spills": 0}
        found += [f"{label(r)}: {k} {old[k]} -> {r[k]}" for k, slack in limits.items() if r[k] > old[k] + slack]
    for k in ("loads_128", "stores_128"):
        if old[k] and not r[k] and not r["bulk_copies"]:
            found.append(f"{label(r)}: {k} {old[k]} -> 0")
    if old["matrix"] and not r["matrix"]:
        found.append(f"{label(r)}: matrix instructions {old['matrix']} -> none")
    return found
