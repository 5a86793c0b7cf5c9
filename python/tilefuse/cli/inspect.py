"""Compile every kernel for every GPU architecture and show what the compiler made of it. Needs no GPU.

Registers, stack, shared memory, spills, 128-bit accesses and matrix instructions of each Triton kernel that the calls
of a module's aot_cases() launch, and of each kernel of the CUDA library. Exits with 1 when a kernel spills in an inner
loop, lacks an instruction that it should have, or got worse than the baseline in tests/resources (in a source
checkout).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import arch, library
from . import FAILED, OK, UsageError
from ._console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", metavar="NAME", help="only this family")
    parser.add_argument("--op", metavar="NAME", help="only the module of this op")
    parser.add_argument("--target", action="append", default=[], metavar="ARCH", help="only this one (repeatable)")
    parser.add_argument("--file", metavar="PATH", help="a Python file with aot_cases(), in place of this package")
    parser.add_argument("--quick", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--update-baseline", action="store_true", help="accept what was found as the new baseline")


def _row(record: dict[str, Any], bad: bool) -> list[Any]:
    name = f"{record['family']}/{record['op']}"
    backend = "CUDA C++" if record["backend"] == "cuda" else "Triton"
    kernel = f"{record['case']}/{record['kernel']}" if record["backend"] == "triton" else record["case"]
    head = [name, kernel, backend, record["target"]]
    if record["error"]:
        return [*head, *[""] * 7, "failed: does not compile"]
    matrix = ", ".join(f"{count} {name}" for name, count in record["matrix"].items())
    shared = f"{record['shared'] / 1024:.4g} KiB" if record["shared"] else ""
    state = "failed" if bad else "ok (may spill)" if record["allow_spill"] and record["stack"] else "ok"
    wide = [record[k] or "" for k in ("loads_128", "stores_128")]
    spills = record["spills"] or ""
    if record["loop_spills"]:
        spills = f"{spills} ({record['loop_spills']} in loops)"
    return [*head, record["registers"], record["stack"] or "", spills, shared, *wide, matrix, state]


def _progress(console: Console) -> Callable[[int, int, str], None]:
    """A line on a terminal that counts the compilations; nothing in a log."""

    def show(done: int, total: int, name: str) -> None:
        if console.stream.isatty():
            end = "\n" if done == total else ""
            print(f"\r\033[Kcompiled {done}/{total}: {name[:80]}", end=end, file=console.stream, flush=True)

    return show


def run(args: argparse.Namespace) -> int:
    from ..testing import aot

    if unknown := set(args.target) - set(arch.COMPILE_TARGETS):
        raise UsageError(f"--target must be one of {', '.join(arch.COMPILE_TARGETS)}, got {', '.join(sorted(unknown))}")
    if args.update_baseline and not aot.BASELINE_DIR.parent.is_dir():
        raise UsageError(f"--update-baseline needs a source checkout: {aot.BASELINE_DIR.parent} is not there")
    console = Console(args.json)
    family, op = args.family, args.op
    if op in library.ops():
        # ops of one module share its cases
        family, op = library.ops()[op].module.split("/")
    result = aot.records(
        family=family, op=op, targets=args.target, file=args.file, quick=args.quick, progress=_progress(console)
    )
    for what, name in (("family", args.family), ("op", args.op)):
        if name and not result["records"]:
            raise UsageError(f"no kernels in {what} {name!r}")
    if args.update_baseline and not args.file:
        for path in aot.write_baseline(result):
            console.say(f"wrote {path}")
    problems = aot.problems(result)
    header = ["op", "kernel", "backend", "target", "registers", "stack", "spills", "shared"]
    header += ["128-bit loads", "128-bit stores", "matrix", "state"]
    rows = [_row(r, any(p.startswith(aot.label(r) + ":") for p in problems)) for r in result["records"]]
    compilers = [f"{name} {result[name]}" for name in ("triton", "nvcc") if result[name]]
    console.table(f"Compiled kernels ({', '.join(compilers) or 'no compiler'})", header, rows)
    for missing in result["missing"]:
        console.say(f"not inspected: {missing}")
    for problem in problems:
        console.say(f"failed: {problem}")
    if not problems:
        console.say(f"{len(rows)} binaries, no problem.")
    console.result({**result, "problems": problems})
    return FAILED if problems else OK
