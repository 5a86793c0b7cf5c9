"""Benchmark every op against its peers, and whole models patched against stock, on this machine.

Peers (eager PyTorch, torch.compile, the best library) run in the same process on the same inputs. Each case is
checked against its float64 oracle before and after timing, and against the roof of this machine. Results go to a
JSONL file, one line per case; the table and the plots are made from those lines.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import tilefuse

from . import FAILED, OK, UsageError
from ._console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=("quick", "full"), default="quick", help="quick: minutes; full: all cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="only this family (repeatable)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose id contains this text")
    parser.add_argument("--seconds", type=float, help="timing budget per case")
    parser.add_argument("--compile-seconds", type=float, help="for all torch.compile peers together")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further case after that")
    parser.add_argument("--each-backend", action="store_true", help="also time every other usable backend")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--report", action="store_true", help="measure nothing: table and plots of the stored lines")
    parser.add_argument(
        "--readme", action="store_true", help="renew the generated parts of README.md and docs/benchmarks.md and stop"
    )


def run(args: argparse.Namespace) -> int:
    from ..benchmarks import harness, models, records, report, runner

    console = Console(args.json)
    folder = args.out or records.results_folder()
    if args.readme:
        return _readme(console, folder)
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here (python -m tilefuse doctor)")
    families = sorted({family for family, _, _ in harness.modules()} | {models.FAMILY})
    for family in args.family:
        if family not in families:
            raise UsageError(f"--family must be one of {', '.join(families)}, got {family!r}")
    device = torch.device(kind)
    path = folder / f"{records.device_key(device)}.jsonl"
    if args.report:
        lines = records.read_lines(path)
        return _finish(console, lines, lines, path, folder, report)
    cases = harness.discover(args.suite, kind, families=args.family, match=args.case, also={models.FAMILY: models})
    if not cases:
        raise UsageError("no benchmark case matches")
    if args.list:
        console.table(f"{len(cases)} cases", ["case"], [(case.id,) for case in cases])
        console.result([case.id for case in cases])
        return OK

    limits = dict(runner.QUICK if args.suite == "quick" else runner.FULL)
    if args.seconds:
        limits["seconds"] = args.seconds
    if args.compile_seconds is not None:
        limits["compile_seconds"] = args.compile_seconds
    # nothing is compiled for whole models
    compiling = max(1, len({case.family for case in cases} - {models.FAMILY}))
    settings = runner.Settings(**limits, each_backend=args.each_backend, families=compiling)
    console.say(f"Measuring the roof of {kind} ...")
    engine = runner.Runner(device, settings)
    began = time.monotonic()
    lines = []
    with console.progress(len(cases), "benchmarks") as progress:

        def after(_: int, line: dict) -> None:
            if line["status"] == "failed":
                console.say(f"failed: {line['case']}: {line['reason']}")
            progress.done()

        for case in cases:
            if args.limit and lines and time.monotonic() - began > args.limit:
                console.say(f"--limit: {len(cases) - len(lines)} of {len(cases)} cases not run")
                break
            lines += runner.run_all([case], engine, path, before=lambda _, case: progress.start(case.id), after=after)
    # a better roof may have been seen after a case was judged
    lines = engine.settle()
    records.write_lines(path, lines)
    console.say(f"{len(lines)} cases in {time.monotonic() - began:.0f} s")
    return _finish(console, lines, records.read_lines(path), path, folder, report)


def _finish(console: Console, lines: list, stored: list, path: Path, folder: Path, report) -> int:
    """Table of this run's lines; plots of all that are stored for this device."""
    from ..benchmarks import records

    ops, models = report.apart(lines)
    if ops:
        console.table(f"{ops[0]['device']}: tilefuse, and its speed against each peer", *report.rows(ops))
    if models:
        console.table(f"{models[0]['device']}: models, stock -> patched", *report.model_rows(models))
    for name, reason in sorted(report.missing(lines).items()):
        console.say(f"peer {name} did not run: {reason}")
    plots = report.plot(stored, folder)
    for written in (path, *plots):
        console.say(f"wrote {written}")
    if not plots:
        console.say("no plots: matplotlib is not installed, or no case succeeded")
    failed = [line for line in lines if line["status"] == "failed"]
    for line in failed:
        console.say(f"failed: {line['case']}: {line['reason']}")
    load = records.under_load(lines)
    if load:
        unjudged = sum(line["status"] == "unjudged" for line in lines)
        judged = f", {unjudged} of {len(lines)} cases beat the roof and are not judged" if unjudged else ""
        console.say(f"under load ({load}): times are too long{judged}")
    console.result(
        {"lines": lines, "results": str(path), "plots": [str(p) for p in plots], "failed": len(failed), "load": load}
    )
    return FAILED if failed else OK


def _readme(console: Console, folder: Path) -> int:
    from ..benchmarks import records, report

    path, page = (records.HERE.parent / name for name in ("README.md", "docs/benchmarks.md"))
    if not path.exists():
        raise UsageError("--readme works in a source tree")
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in records.read_lines(file)]
    plots = [p.relative_to(path.parent) if p.is_relative_to(path.parent) else p for p in report.plot(lines, folder)]
    # one picture on the first screen: a GPU's before a CPU's
    first = sorted(map(str, plots), key=lambda p: "nvidia" not in p)[:1]
    path.write_text(report.readme(path.read_text(), tilefuse.ops(), lines, first))
    page.write_text(report.page(page.read_text(), lines))
    for written in (path, page):
        console.say(f"wrote {written}")
    console.result({"readme": str(path), "page": str(page), "lines": len(lines)})
    return OK
