"""Check every op against its float64 oracle on every usable backend of this machine.

Forward and gradients, on the sample inputs of the tests, bit for bit where the op promises bits. --record stores what
passed on this GPU in tilefuse/verified.json, which is what makes a CUDA C++ kernel a default there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from tilefuse import arch, backends, library

from . import FAILED, OK, UsageError
from ._console import Console

if TYPE_CHECKING:
    from ..testing.verification import Check

# samples per op and backend with --quick
QUICK_SAMPLES = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK_SAMPLES} samples per op, one dtype each")
    parser.add_argument("--record", action="store_true", help="write verified.json for this GPU's architecture")
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="only this family (repeatable)")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="only this op (repeatable)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=backends.BACKENDS,
        help="only this backend (repeatable); triton on a CPU needs TRITON_INTERPRET=1",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="each check in a process of its own, N at a time: an illegal memory access then ends one check, not all",
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="per check: begin no further sample after that")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of one check with --jobs")


def _selected(args: argparse.Namespace) -> list[library.Op]:
    ops = list(library.ops().values())
    families = sorted({op.family for op in ops})
    for family in args.family:
        if family not in families:
            raise UsageError(f"--family must be one of {', '.join(families)}, got {family!r}")
    for name in args.op:
        if name not in library.ops():
            raise UsageError(f"--op must be one of tilefuse.ops(), got {name!r}")
    return [op for op in ops if (not args.family or op.family in args.family) and (not args.op or op.name in args.op)]


def _backends(op: library.Op, device: torch.device, asked: Sequence[str]) -> list[str]:
    """What is worth checking: backends that could run here; the reference alone where there is nothing else."""
    if asked:
        return [b for b in op.backends if b in asked]
    if device.type == "cuda":
        fast = [b for b in op.backends if b in ("triton", "cuda")]
    else:
        fast = [b for b in op.backends if b == "cpu"]
    kernels = [library.kernels()[k] for k in op.kernels]
    usable = [b for b in fast if all(b in k.backends and k.implementation(b)[1] is None for k in kernels)]
    return usable or ["reference"]


def run(args: argparse.Namespace) -> int:
    if args.record:
        if not torch.cuda.is_available():
            raise UsageError("--record needs a GPU: it states what passed on one, and torch sees none here")
        if args.quick:
            raise UsageError("--record needs every sample: leave out --quick")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here (python -m tilefuse doctor)")
    if "triton" in args.backend and not torch.cuda.is_available() and not backends.interpreting():
        raise UsageError("--backend triton without a GPU needs TRITON_INTERPRET=1 in the environment")
    console = Console(args.json)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    todo = [(op, backend) for op in _selected(args) for backend in _backends(op, device, args.backend)]
    checks: list[Check] = []
    recorded = None
    with console.progress(len(todo), "verify") as progress:
        each = _isolated(todo, args, device) if args.jobs > 0 else _in_process(todo, args, device, progress.start)
        for check in each:
            if args.jobs > 0:
                progress.start(f"{check.op} on {check.backend}: {check.status}")
            checks.append(check)
            if check.status == "failed":
                console.say(f"failed: {check.op} on {check.backend}: {check.reason}")
            if args.record:
                # after each check, so that a run that is cut off has recorded what it did
                recorded = _record(checks, device)
            progress.done()
    order = {(op.name, backend): i for i, (op, backend) in enumerate(todo)}
    checks.sort(key=lambda check: order[check.op, check.backend])
    console.table(
        f"Ops against their float64 oracles on {device} ({arch.of(device)}); error is relative to naive's, limit 2",
        ["op", "backend", "result", "samples", "gradients", "worst error", "detail"],
        [(c.op, c.backend, c.status, c.samples, c.gradients, f"{c.worst:.2f}", c.reason) for c in checks],
    )
    failed = [c for c in checks if c.status == "failed"]
    console.say(f"{sum(c.status == 'ok' for c in checks)} ok, {len(failed)} failed, {len(checks)} checked")
    if recorded is not None:
        console.say(f"wrote {backends.VERIFIED_PATH}: {len(recorded['kernels'])} kernels on {arch.of(device)}")
    console.result(
        {
            "device": str(device),
            "arch": arch.of(device),
            "checks": [asdict(c) for c in checks],
            "failed": len(failed),
            "recorded": recorded,
        }
    )
    return FAILED if failed or not checks else OK


def _in_process(
    todo: Sequence[tuple[library.Op, str]],
    args: argparse.Namespace,
    device: torch.device,
    announce: Callable[[str], None],
) -> Iterator[Check]:
    from ..testing import verification

    for op, backend in todo:
        announce(f"{op.name} on {backend}")
        limit = QUICK_SAMPLES if args.quick else None
        yield verification.check_op(
            op.name, device, backend, limit=limit, all_dtypes=not args.quick, seconds=args.seconds
        )


def _isolated(
    todo: Sequence[tuple[library.Op, str]], args: argparse.Namespace, device: torch.device
) -> Iterator[Check]:
    from ..testing.verification import Check

    def one(op: library.Op, backend: str) -> Check:
        command = [sys.executable, "-m", "tilefuse", "verify", "--json", "--op", op.name, "--backend", backend]
        command += ["--device", device.type, "--seconds", str(args.seconds), *(["--quick"] if args.quick else [])]
        reason = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
            (found,) = json.loads(done.stdout)["checks"]
            return Check(**{**found, "kernels": tuple(found["kernels"])})
        except subprocess.TimeoutExpired:
            reason = f"took more than {args.timeout:.0f} s"
        except (ValueError, KeyError, TypeError):
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            reason = f"its process ended with {done.returncode}: {last[0]}"
        return Check(op.name, op.family, backend, str(device), "failed", 0, 0, 0.0, (), reason)

    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(one, op, backend) for op, backend in todo]):
            yield future.result()


def _record(checks: Sequence[Check], device: torch.device) -> dict[str, Any]:
    """Stores kernel -> backends for this architecture: those whose every check here passed."""
    from ..benchmarks.records import commit_of_checkout

    passed: defaultdict[str, set[str]] = defaultdict(set)
    failed: defaultdict[str, set[str]] = defaultdict(set)
    for check in checks:
        # a check that ran out of time without finding a fault proves nothing
        if check.backend not in ("triton", "cuda") or (check.status == "ok" and not check.complete):
            continue
        # what a failed op would have run is in doubt, all of it
        names = check.kernels if check.status == "ok" else library.ops()[check.op].kernels
        for name in names if check.status != "unavailable" else ():
            (passed if check.status == "ok" else failed)[name].add(check.backend)
    recorded = json.loads(backends.VERIFIED_PATH.read_text())
    on = arch.of(device)
    kernels = dict(recorded.get(on, {}).get("kernels", {}))
    for name in passed.keys() | failed.keys():
        # other backends of an earlier run stay, unless this run was about them
        earlier = set(kernels.get(name, ())) - passed[name] - failed[name]
        kernels[name] = sorted(earlier | (passed[name] - failed[name]))
    commit, dirty = commit_of_checkout()
    recorded[on] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit and commit + ("-dirty" if dirty else ""),
        "kernels": {name: names for name, names in sorted(kernels.items()) if names},
    }
    backends.VERIFIED_PATH.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    backends.forget()
    return recorded[on]
