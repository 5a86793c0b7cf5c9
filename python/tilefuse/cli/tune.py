"""Measure the tile configurations of Triton kernels on this GPU and store the best.

Runs the benchmark's cases, and for each kernel in them every configuration that its module lists. Writes
triton_kernels/tuned/<gpu>.json, which launchers read before their heuristics. A configuration counts only if the
case's result is as right as with the heuristic's. Without a GPU there is nothing to measure: exit code 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tilefuse

from .. import arch
from . import FAILED, OK, UsageError
from ._console import Console

# a gain below this is noise, and the heuristic stays
THRESHOLD = 0.03
Calls = Mapping[str, Sequence[Callable[[], Any]]]


@dataclass(frozen=True)
class Winner:
    """The best configuration of one kernel for one class of shapes; empty where the heuristic stays."""

    changes: Mapping[str, Any]
    seconds: float  # of the case with it
    heuristic_seconds: float

    @property
    def gain(self) -> float:
        return self.heuristic_seconds / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="only this family (repeatable)")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this kernel (repeatable)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only benchmark cases whose id contains this")
    parser.add_argument("--list", action="store_true", help="print what can be tuned and stop")
    parser.add_argument("--dry-run", action="store_true", help="measure, but write nothing")


def candidates(families: Sequence[str] = (), kernels: Sequence[str] = ()) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """kernel -> what its module lists as worth trying."""
    from ..testing import aot

    found: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for family, _, module in aot.modules():
        if not families or family in families:
            found |= getattr(module, "CONFIGS", {})
    return {kernel: configs for kernel, configs in found.items() if not kernels or kernel in kernels}


def run(args: argparse.Namespace) -> int:
    from ..backends import triton_missing

    console = Console(args.json)
    if missing := triton_missing():
        console.say(f"Nothing to tune: {missing}.")
        console.result({"error": missing})
        return FAILED
    configs = candidates(args.family, args.kernel)
    if unknown := [k for k in args.kernel if k not in configs]:
        raise UsageError(f"no tunable kernel called {', '.join(unknown)}")
    if args.list:
        rows = [(kernel, len(tried)) for kernel, tried in configs.items()]
        console.table("Tunable kernels", ["kernel", "configurations"], rows)
        console.result({kernel: [dict(c) for c in tried] for kernel, tried in configs.items()})
        return OK
    if not torch.cuda.is_available():
        console.say("Tuning measures a GPU, and torch sees none here. The heuristics of the kernels are in force.")
        console.result({"error": "no GPU"})
        return FAILED
    return _measure(console, configs, args)


def _measure(console: Console, configs: Mapping[str, Sequence[Mapping[str, Any]]], args: argparse.Namespace) -> int:
    from ..benchmarks import harness, timing
    from ..triton_kernels.common import tuned

    device = torch.device("cuda", torch.cuda.current_device())
    cases = harness.discover("full", "cuda", families=args.family, match=args.case)
    winners: dict[tuple[str, str], Winner] = {}
    failures = []
    with console.progress(len(cases), "tune") as progress:
        for case in cases:
            progress.start(case.id)
            try:
                # graphs are captured from the current stream, which must not be the default one
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    winners |= tune_case(case, device, configs, winners, timing.measure_cuda)
            except Exception as error:
                failures.append(f"{case.id}: {type(error).__name__}: {error}")
            progress.done()
    rows = [
        (*key, dict(w.changes) or "heuristic", f"{w.seconds * 1e6:.1f} us", f"{w.gain:.2f}x")
        for key, w in winners.items()
    ]
    console.table(
        f"Configurations on {torch.cuda.get_device_name(device)}", ["kernel", "key", "best", "case", "gain"], rows
    )
    for failure in failures:
        console.say(f"failed: {failure}")
    best: dict[str, dict[str, Any]] = {}
    for (kernel, key), winner in winners.items():
        if winner.changes:
            best.setdefault(kernel, {})[key] = dict(winner.changes)
    path = None
    if best and not args.dry_run:
        path = tuned.write(arch.device_key(device), best)
        console.say(f"wrote {path}")
    console.result({"best": best, "path": str(path) if path else None, "failed": failures})
    return FAILED if failures else OK


def tune_case(
    case: Any,
    device: torch.device,
    configs: Mapping[str, Sequence[Mapping[str, Any]]],
    known: Mapping[tuple[str, str], Winner],
    measure: Callable[..., Mapping[str, Any]],
) -> dict[tuple[str, str], Winner]:
    """Tries the configurations of each kernel that a benchmark case launches, one kernel after the other.

    Args:
        case: a case of the benchmark.
        device: where it runs.
        configs: kernel -> fields to replace in the heuristic's configuration.
        known: winners of earlier cases; they are in force, and not measured again.
        measure: ``timing.measure_cuda`` or a stand-in: (calls, budget=seconds) -> name -> object with ``median``.
    """
    from ..benchmarks import harness
    from ..benchmarks.contestants import Contestant
    from ..triton_kernels.common import tuned

    generator = torch.Generator(device).manual_seed(0)
    found: dict[tuple[str, str], Winner] = {}
    with tilefuse.backend("triton"), tuned.session() as session, torch.no_grad():
        session.forced.update({key: winner.changes for key, winner in known.items()})
        call = Contestant(case, harness.Peer(case.run)).bind(case.inputs(device, generator), generator)
        session.asked.clear()
        expected = call()
        for key, heuristic in list(session.asked.items()):
            if key in known or key[0] not in configs:
                continue

            def forced(changes: Mapping[str, Any], key: tuple[str, str] = key) -> Any:
                session.forced[key] = changes
                return call()

            tried: list[Mapping[str, Any]] = [{}]
            for changes in configs[key[0]]:
                if tuned.replaced(heuristic, changes) == heuristic:
                    continue
                try:
                    right = _agree(forced(changes), expected)
                except Exception:
                    # too much shared memory, an unsupported layout: not a choice on this GPU
                    continue
                if right:
                    tried.append(changes)
            calls: Calls = {str(i): [lambda changes=changes: forced(changes)] for i, changes in enumerate(tried)}
            timings = measure(calls, budget=0.05 * len(calls))
            seconds = {i: timings[str(i)].median for i in range(len(tried))}
            best = min(seconds, key=seconds.__getitem__)
            if seconds[0] / seconds[best] <= 1 + THRESHOLD:
                best = 0
            session.forced[key] = tried[best]
            found[key] = Winner(tried[best], seconds[best], seconds[0])
    return found


def _agree(out: Any, expected: Any) -> bool:
    """Whether two results of the same kernel differ by no more than another order of summation explains."""
    from torch.utils._pytree import tree_leaves

    for a, b in zip(tree_leaves(out), tree_leaves(expected)):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point() or a.dtype.itemsize == 1:
            continue
        # infinities, such as the lse of a row without keys, must be the same ones
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return False
        a, b = a[finite].double(), b[finite].double()
        scale = b.square().mean().sqrt()
        if a.numel() and not bool((a - b).square().mean().sqrt() <= 0.02 * scale + 1e-30):
            return False
    return True
