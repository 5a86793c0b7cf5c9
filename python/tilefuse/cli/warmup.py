"""Compile kernels ahead of time, so that no first request pays for it.

With a GPU: runs every op once on the shapes of the benchmark cases (and its sample inputs with --samples), which
fills Triton's cache for that GPU. With --arch: compiles what the calls of the resource gate launch on that
architecture; this needs no GPU and fills the same cache (TRITON_CACHE_DIR), say while a container image is built.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch

import tilefuse

from .. import arch, backends
from . import FAILED, OK, UsageError
from ._console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=arch.COMPILE_TARGETS, help="compile for this architecture, GPU or not")
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="only this family (repeatable)")
    parser.add_argument("--samples", action="store_true", help="also the sample inputs of the tests")


def run(args: argparse.Namespace) -> int:
    console = Console(args.json)
    if missing := backends.triton_missing():
        console.say(f"Nothing to compile: {missing}.")
        console.result({"error": missing})
        return FAILED
    if args.arch:
        if backends.interpreting():
            raise UsageError("--arch compiles, so TRITON_INTERPRET must not be set")
        return _ahead(console, args.arch, args.family)
    if not torch.cuda.is_available():
        console.say("torch sees no GPU here: name the architecture to compile for, such as --arch sm_90.")
        console.result({"error": "no GPU and no --arch"})
        return FAILED
    return _on_gpu(console, args.family, args.samples)


def _finish(console: Console, what: str, done: int, problems: list[str], began: float) -> int:
    seconds = time.monotonic() - began
    for problem in problems:
        console.say(f"failed: {problem}")
    console.say(f"{done} {what} compiled, {len(problems)} failed, {seconds:.0f} s")
    console.result({"compiled": done, "failed": problems, "seconds": round(seconds, 1)})
    return FAILED if problems else OK


def _ahead(console: Console, target: str, families: list[str]) -> int:
    import triton

    from ..testing import aot

    # launches of one binary are compiled once
    found = {
        launch.key: (f"{op}: {case.name}", launch)
        for family, op, module in aot.modules()
        if not families or family in families
        for case in aot.cases(module)
        if target in (case.targets or (target,))
        for launch in aot.record(case, target, f"{family}/{op}")
    }
    problems: list[str] = []
    began = time.monotonic()
    with console.progress(len(found), "compile") as progress:
        for name, launch in found.values():
            progress.start(f"{name} {launch.name}")
            try:
                # not through the gate, which keeps figures and not binaries
                launch.compile()
            except Exception as error:
                lines = str(error).strip().splitlines()[-1:]
                problems.append(f"{name} {launch.name}: {type(error).__name__}: {lines}")
            progress.done()
    console.say(f"cache: {os.environ.get('TRITON_CACHE_DIR', triton.knobs.cache.dir)}")
    return _finish(console, f"kernels for {target}", len(found) - len(problems), problems, began)


def _on_gpu(console: Console, families: list[str], with_samples: bool) -> int:
    from ..benchmarks import harness
    from ..testing import sample

    device = torch.device("cuda", torch.cuda.current_device())
    calls: list[tuple[str, Any]] = []
    for case in harness.discover("full", "cuda", families=families):
        generator = torch.Generator(device).manual_seed(0)
        calls.append((case.id, lambda case=case, generator=generator: _run_case(case, device, generator)))
    if with_samples:
        for op in tilefuse.ops().values():
            if not families or op.family in families:
                calls += [
                    (f"{op.name} {s.name}", lambda op=op, s=s: op.function(*s.args, **s.kwargs))
                    for s in sample.samples(op.name, device)
                ]
    problems: list[str] = []
    began = time.monotonic()
    with console.progress(len(calls), "warm up") as progress:
        for name, call in calls:
            progress.start(name)
            try:
                call()
                torch.cuda.synchronize()
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
            progress.done()
    return _finish(console, "calls", len(calls) - len(problems), problems, began)


def _run_case(case: Any, device: torch.device, generator: torch.Generator) -> None:
    from ..benchmarks import harness
    from ..benchmarks.contestants import Contestant

    inputs = case.inputs(device, generator)
    contestant = Contestant(case, harness.Peer(case.run))
    with torch.no_grad():
        contestant.bind(inputs, generator)()
