"""Measure the tile configurations of Triton kernels on this GPU and store the best.

Writes triton_kernels/tuned/<gpu>.json, which the kernels read before their heuristics. Every Triton module that
defines tunable() takes part. A configuration counts only if its output is as right as the heuristic's. Without a GPU
there is nothing to measure: exit code 1.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import tilefuse

from .. import arch
from . import FAILED, OK, UsageError
from ._console import Console

# a gain below this is noise, and the heuristic stays
THRESHOLD = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="only this family (repeatable)")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this kernel (repeatable)")
    parser.add_argument("--list", action="store_true", help="print what can be tuned and stop")
    parser.add_argument("--dry-run", action="store_true", help="measure, but write nothing")


def _tunables(args: argparse.Namespace) -> list[Any]:
    from ..testing import aot

    found = []
    for family, _, module in aot.modules():
        if args.family and family not in args.family:
            continue
        for tunable in getattr(module, "tunable", tuple)():
            if not args.kernel or tunable.kernel in args.kernel:
                found.append(tunable)
    return found


def run(args: argparse.Namespace) -> int:
    from ..backends import triton_missing

    console = Console(args.json)
    if missing := triton_missing():
        console.say(f"Nothing to tune: {missing}.")
        console.result({"error": missing})
        return FAILED
    tunables = _tunables(args)
    if args.kernel and not tunables:
        raise UsageError(f"no tunable kernel called {', '.join(args.kernel)}")
    if args.list:
        rows = [(t.kernel, t.key, len(t.configs), dict(t.default)) for t in tunables]
        console.table("Tunable kernels", ["kernel", "key", "configurations", "heuristic"], rows)
        console.result([{"kernel": t.kernel, "key": t.key, "configs": len(t.configs)} for t in tunables])
        return OK
    if not torch.cuda.is_available():
        console.say("Tuning measures a GPU, and torch sees none here. The heuristics of the kernels are in force.")
        console.result({"error": "no GPU"})
        return FAILED
    return _measure(console, tunables, dry_run=args.dry_run)


def _measure(console: Console, tunables: list[Any], *, dry_run: bool) -> int:
    from ..triton_kernels.common import tuned

    device = torch.device("cuda", torch.cuda.current_device())
    best: dict[str, dict[str, Any]] = {}
    rows: list[list[Any]] = []
    failed = 0
    with console.progress(len(tunables), "tune") as progress:
        for tunable in tunables:
            progress.start(f"{tunable.kernel} {tunable.key}")
            try:
                config, seconds, baseline = _best_config(tunable, device)
            except Exception as error:
                failed += 1
                rows.append([tunable.kernel, tunable.key, f"failed: {type(error).__name__}: {error}", "", ""])
            else:
                gain = baseline / seconds
                if gain > 1 + THRESHOLD:
                    best.setdefault(tunable.kernel, {})[tunable.key] = dict(config)
                    rows.append([tunable.kernel, tunable.key, dict(config), f"{seconds * 1e6:.1f} us", f"{gain:.2f}x"])
                else:
                    rows.append([tunable.kernel, tunable.key, "heuristic", f"{baseline * 1e6:.1f} us", "1.00x"])
            progress.done()
    console.table(
        f"Configurations on {torch.cuda.get_device_name(device)}", ["kernel", "key", "best", "time", "gain"], rows
    )
    path = None
    if best and not dry_run:
        path = tuned.write(arch.device_key(device), best)
        console.say(f"wrote {path}")
    console.result({"best": best, "path": str(path) if path else None, "failed": failed})
    return FAILED if failed else OK


def _best_config(tunable: Any, device: torch.device) -> tuple[Any, float, float]:
    """(best configuration, its seconds, the heuristic's seconds)."""
    from ..benchmarks import timing

    # measure_cuda captures the current stream, which must not be the default one
    with tilefuse.backend("triton"), torch.cuda.stream(torch.cuda.Stream(device)):
        run = tunable.build(device)
        expected = run(tunable.default)
        calls, configs = {}, {}
        for i, config in enumerate([tunable.default, *tunable.configs]):
            try:
                out = run(config)
                torch.cuda.synchronize()
            except Exception:
                # too much shared memory, an unsupported layout: not a choice on this GPU
                continue
            if i and not _agree(out, expected):
                continue
            calls[str(i)] = [lambda config=config: run(config)]
            configs[str(i)] = config
        timings = timing.measure_cuda(calls, budget=0.05 * len(calls))
    best = min(timings, key=lambda name: timings[name].median)
    return configs[best], timings[best].median, timings["0"].median


def _agree(out: Any, expected: Any) -> bool:
    """Whether two results of the same kernel differ by no more than another order of summation explains."""
    from torch.utils._pytree import tree_leaves

    for a, b in zip(tree_leaves(out), tree_leaves(expected)):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point() or a.dtype.itemsize == 1:
            continue
        a, b = a.double(), b.double()
        scale = b.square().mean().sqrt()
        if not bool((a - b).square().mean().sqrt() <= 0.02 * scale + 1e-30):
            return False
    return True
