"""The process that records and compiles, and the function that runs it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import arch
from .baseline import label
from .binaries import CUDA_LIBRARY, can_read, compile_launch, cuda_records, lacking, nvcc_version
from .cases import AotCase, cases, from_file, launched, modules
from .recorder import Launch, record


@dataclass(frozen=True)
class _Work:
    """One binary to compile."""

    family: str
    op: str
    case: AotCase
    kernel: str
    target: str
    first: bool
    launch: Launch

    def record(self) -> dict[str, Any]:
        """What the gate keeps of it."""
        figures = compile_launch(self.launch)
        expected = self.case.expected(self.launch.name, self.target)
        return {
            "family": self.family,
            "op": self.op,
            "case": self.case.name,
            "kernel": self.kernel,
            "backend": "triton",
            "target": self.target,
            "first": self.first,
            "allow_spill": self.case.allow_spill,
            "lacking": [] if figures["error"] else lacking(expected, figures),
            **figures,
        }


# family, op, module, its cases
_Module = tuple[str, str, Any, list[AotCase]]
# pool workers are forked and read it: kernels cannot be pickled
_work: list[_Work] = []


def _compile_one(index: int) -> dict[str, Any]:
    return _work[index].record()


def _recorded(family: str, op: str, case: AotCase, target: str) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of each binary of a case; a kernel that needs several numbers them."""
    names: Counter[str] = Counter()
    launches = record(case, target, f"{family}/{op}")
    if not launches:
        raise ValueError(f"aot case {op}/{case.name} launches no kernel on {target}")
    for launch in launches:
        names[launch.name] += 1
        count = names[launch.name]
        yield launch.name if count == 1 else f"{launch.name}_{count}", launch


def _work_of(family: str, op: str, listed: Sequence[AotCase], target: str) -> Iterator[_Work]:
    """What one module's cases need on one target, each binary once."""
    binaries: set[str] = set()
    kernels: set[str] = set()
    for case in listed:
        if target not in (case.targets or (target,)):
            continue
        for name, launch in _recorded(family, op, case, target):
            first = launch.name not in kernels
            if launch.key not in binaries:
                yield _Work(family, op, case, name, target, first, launch)
            binaries.add(launch.key)
            kernels.add(launch.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for every architecture")
    parser.add_argument("--json", required=True, help="file for the records")
    parser.add_argument("--family")
    parser.add_argument("--op", help="only the module of this name")
    parser.add_argument("--file", help="a Python file with aot_cases(), in place of this package")
    parser.add_argument("--targets", nargs="*", default=list(arch.COMPILE_TARGETS))
    parser.add_argument("--quick", action="store_true", help="only the first case of each kernel")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", min(8, os.cpu_count() or 1))))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET must be 0: a function decorated under the interpreter cannot be compiled")
    found, uncovered, triton_version = [], [], None
    known, binaries, kernels = {}, {}, set()
    if importlib.util.find_spec("triton") is not None:
        import triton

        triton_version = triton.__version__
        chosen = from_file(args.file) if args.file else modules(args.family, args.op)
        listed = [(*m, cases(m[2])) for m in chosen]
        kernels = {name for *_, module in modules() for name in launched(module)}
        known, binaries = _gather(listed, args.targets, args.quick)
        uncovered = _uncovered(listed, [t for t in arch.COMPILE_TARGETS if t not in args.targets])
        with tempfile.TemporaryDirectory() as folder:
            # the figures are cached; keeping the binaries as well would only take space
            os.environ["TRITON_CACHE_DIR"] = folder
            with multiprocessing.get_context("fork").Pool(max(1, args.jobs)) as pool:
                for entry in pool.imap(_compile_one, range(len(_work))):
                    found.append(entry)
                    print(f"{len(found)}/{len(_work)} {label(entry)}", flush=True)
    found += [] if args.file else [r for r in cuda_records(args.targets, args.family) if args.op in (None, r["op"])]
    missing = [] if triton_version else ["Triton kernels: triton is not installed"]
    if not CUDA_LIBRARY.exists():
        missing.append(f"CUDA kernels: {CUDA_LIBRARY.name} was not built (needs nvcc)")
    elif not can_read():
        missing.append("CUDA kernels: neither Triton nor the CUDA toolkit provides cuobjdump and nvdisasm")
    result = {
        "triton": triton_version,
        "nvcc": nvcc_version(),
        "targets": args.targets,
        "family": args.family,
        "op": args.op,
        "known": known,
        "binaries": binaries,
        "kernels": sorted(kernels),
        "records": found,
        "uncovered": uncovered,
        "missing": missing,
    }
    Path(args.json).write_text(json.dumps(result))
    return 0


def _gather(
    listed: Sequence[_Module], targets: Sequence[str], quick: bool
) -> tuple[dict[str, dict[str, list[str]]], dict[str, dict[str, list[str]]]]:
    """Fills the list of what is compiled. Returns, by family, the targets of each case and those of each binary."""
    known: dict[str, dict[str, list[str]]] = {}
    binaries: dict[str, dict[str, list[str]]] = {}
    for family, op, _, of_module in listed:
        for case in of_module:
            known.setdefault(family, {})[f"{op}/{case.name}"] = list(case.targets or arch.COMPILE_TARGETS)
        for target in targets:
            for work in _work_of(family, op, of_module, target):
                binaries.setdefault(family, {}).setdefault(f"{op}/{work.case.name}/{work.kernel}", []).append(target)
                if work.first or not quick:
                    _work.append(work)
    return known, binaries


def _uncovered(listed: Sequence[_Module], others: Sequence[str]) -> list[str]:
    """Kernels that a module launches but no case records, on the compiled targets or on the others."""
    covered = {id(work.launch.kernel) for work in _work}
    found = [
        (f"{family}/{op}: {name}", id(kernel))
        for family, op, module, _ in listed
        for name, kernel in sorted(launched(module).items())
    ]
    for target in others:
        if all(kernel in covered for _, kernel in found):
            break
        for family, op, _, of_module in listed:
            covered |= {id(work.launch.kernel) for work in _work_of(family, op, of_module, target)}
    return [name for name, kernel in found if kernel not in covered]


def records(
    *,
    family: str | None = None,
    op: str | None = None,
    targets: Sequence[str] | None = None,
    file: str | Path | None = None,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Runs the compiling process and returns its result.

    Beside the versions and ``records``: ``missing`` tools, kernels that no case covers (``uncovered``), the targets of
    each case (``known``) and, of those asked for, of each binary (``binaries``), the names of all ``kernels``.

    Args:
        family, op, targets: only these; None is all. An op is the name of its module: ``rope`` of ``rope_qk``.
        file: a Python file with ``aot_cases()``, in place of this package.
        quick: only the first case of each kernel and target.
        progress: called with (compiled so far, of how many, name) after each compilation.

    Raises:
        RuntimeError: the process failed (a module that cannot be imported, a case that cannot run or launches
            nothing).
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.json"
        command = [sys.executable, "-m", "tilefuse.testing.aot.process", "--json", str(out)]
        command += ["--family", family] if family else []
        command += ["--op", op] if op else []
        command += ["--file", str(file)] if file else []
        command += ["--targets", *targets] if targets else []
        command += ["--quick"] if quick else []
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        with open(Path(folder) / "stderr", "w+") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if progress and (step := re.match(r"(\d+)/(\d+) (.*)", line)):
                    progress(int(step.group(1)), int(step.group(2)), step.group(3))
            if process.wait() != 0:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    raise SystemExit(main())
