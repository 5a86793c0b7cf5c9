"""Runs cases: inputs, contestants, checks, timing, and one JSON line per case."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import tilefuse
from tilefuse import library
from tilefuse.testing import assert_bit_equal, error_report
from tilefuse.testing.verification import gradient_report

from . import roofline, timing
from .harness import Case, Peer
from .models import ModelCase
from .roofline import Roof

FORMAT = 1
HERE = Path(__file__).resolve().parent
# inputs of one case: enough sets to exceed the cache, no more
MAX_SETS = 256
MAX_BYTES = {"cpu": 2**31, "cuda": 2**34}
# a peer this far from the oracle computes something else
PEER_TINY = 1e-3
# inputs up to this size are cloned for each contestant of a check
CLONED_BYTES = 2**31
# of one output, that are compared with the oracle
CHECKED_ELEMENTS = 2**20


class Failure(Exception):
    """A case that must not be believed: a wrong output, or a time that cannot be."""


@dataclass
class Settings:
    """How long a run may take.

    ``seconds`` is the timing budget of one case; ``compile_seconds`` that of all ``torch.compile`` peers together,
    in equal shares for ``families``: when a share is spent, further ones of that family are recorded as missing
    with that reason.
    """

    seconds: float = 2.0
    compile_seconds: float = math.inf
    each_backend: bool = False  # time every usable backend, not only the one `auto` takes
    families: int = 1
    compiled: dict[str, float] = field(default_factory=dict, init=False)

    def may_compile(self, family: str) -> bool:
        return self.compiled.get(family, 0.0) < self.compile_seconds / self.families

    def compiling(self, family: str, seconds: float) -> None:
        self.compiled[family] = self.compiled.get(family, 0.0) + seconds


QUICK = {"seconds": 1.2, "compile_seconds": 120.0}
FULL = {"seconds": 4.0}


class Contestant:
    """tilefuse, or a peer, on given inputs."""

    def __init__(self, case: Case, peer: Peer, backend: str | None = None):
        self.case = case
        self.peer = peer
        self.backend = backend
        self.fn = peer.function()
        self.grads = case.grads if peer.grads is None else peer.grads

    def bind(self, inputs: tuple[Any, ...], generator: torch.Generator) -> Callable[[], Any]:
        """A call without arguments to be timed; preparation and, in mode backward, the forward happen here."""
        fn = self.fn
        args = self.peer.prepare(*inputs) if self.peer.prepare else inputs
        if self.case.mode == "forward":
            return lambda: fn(*args)
        args = _require_grad(args, self.grads)
        leaves = [args[i] for i in self.grads]
        with torch.enable_grad():
            outputs = _differentiable(fn(*args))
        upstream = _upstream(outputs, generator)
        if self.case.mode == "backward":
            return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

        def both() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(_differentiable(fn(*args)), leaves, upstream)

        return both

    def results(self, inputs: tuple[Any, ...], upstream: Sequence[Tensor] | None) -> list[Tensor]:
        """Outputs, or gradients of the case's own inputs for the given upstream gradients, in tilefuse's layout."""
        with self._forced():
            return _results(self._in_our_layout, inputs, self.case, upstream)

    def _in_our_layout(self, *inputs: Any) -> Any:
        out = self.fn(*(self.peer.prepare(*inputs) if self.peer.prepare else inputs))
        return self.peer.post(out) if self.peer.post else out

    def _forced(self) -> Any:
        return tilefuse.backend(self.backend) if self.backend else nullcontext()


def _require_grad(args: tuple[Any, ...], positions: Sequence[int]) -> tuple[Any, ...]:
    return tuple(a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args))


def _differentiable(outputs: Any) -> list[Tensor]:
    return [o for o in tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]


def _upstream(outputs: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outputs]


def _results(
    fn: Callable[..., Any], inputs: tuple[Any, ...], case: Case, upstream: Sequence[Tensor] | None
) -> list[Tensor]:
    # an in-place op or peer must not change what the next contestant gets; for weights of a whole MoE layer there may
    # be no room for copies, and then only the ops that do mutate pay for them
    if _nbytes(inputs) < CLONED_BYTES or _mutates(case.op):
        inputs = tree_map_only(Tensor, torch.clone, inputs)
    if upstream is None:
        with torch.no_grad():
            return [o for o in tree_leaves(fn(*inputs)) if isinstance(o, Tensor)]
    inputs = _require_grad(inputs, case.grads)
    with torch.enable_grad():
        outputs = _differentiable(fn(*inputs))
        given = [u.to(o.dtype) for o, u in zip(outputs, upstream)]
        return list(torch.autograd.grad(outputs, [inputs[i] for i in case.grads], given))


def _mutates(op_name: str) -> bool:
    op = tilefuse.ops().get(op_name)
    return op is None or "!)" in op.schema


def _widened(case: Case, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same operands in float64; tables and weights that are float32 anyway stay as they are."""
    if case.exact and case.upcast is None:
        return inputs
    positions = case.upcast
    if positions is None:
        positions = tuple(
            i
            for i, a in enumerate(inputs)
            if isinstance(a, Tensor) and str(a.dtype).removeprefix("torch.") == case.dtype and a.dtype.itemsize > 1
        )
    return tuple(a.double() if i in positions else a for i, a in enumerate(inputs))


def _oracle(case: Case, inputs: tuple[Any, ...], upstream: Sequence[Tensor] | None) -> list[Tensor]:
    with tilefuse.backend("reference") if case.oracle is None else nullcontext():
        return _results(case.oracle or case.run, _widened(case, inputs), case, upstream)


def check(
    case: Case, ours: Contestant, naive: Callable[..., Any], inputs: tuple[Any, ...], generator: torch.Generator
) -> tuple[dict[str, Any], list[Tensor], Sequence[Tensor] | None]:
    """Compares tilefuse with the oracle: (error numbers, the oracle's outputs, upstream gradients)."""
    upstream = None
    if case.mode != "forward":
        with torch.enable_grad(), ours._forced():
            outputs = _differentiable(ours.fn(*_require_grad(inputs, case.grads)))
        upstream = _upstream(outputs, generator)
    got = ours.results(inputs, upstream)
    expected = _oracle(case, inputs, upstream)
    if len(got) != len(expected):
        raise Failure(f"{len(got)} outputs, the oracle has {len(expected)}")
    if case.exact:
        for i, (g, e) in enumerate(zip(got, expected)):
            _same_bits(g, e, f"output {i}")
        return {"exact": True}, expected, upstream
    plain = _results(naive, inputs, case, upstream)
    error = {"max": 0.0, "rms": 0.0, "naive_max": 0.0, "naive_rms": 0.0}
    for i, (g, e) in enumerate(zip(got, expected)):
        if not g.is_floating_point() or g.dtype.itemsize == 1:
            _same_bits(g, e.to(g.dtype), f"output {i}")
            continue
        if i >= len(plain):
            raise Failure(f"the naive computation has {len(plain)} outputs, tilefuse {len(got)}: give `naive`")
        if g.shape != e.shape or plain[i].shape != e.shape:
            raise Failure(f"output {i}: shapes {[*g.shape]}, oracle {[*e.shape]}, naive {[*plain[i].shape]}")
        g, e, p = _some_rows(g, e.double(), plain[i])
        if case.mode != "forward" and case.rows:
            report = gradient_report(g, e, p)
        else:
            report = error_report(g, e, p, rows=case.rows)
        if not report:
            raise Failure(f"output {i}: {report.message}")
        for prefix, tensor in (("", g), ("naive_", p)):
            for name, value in _errors(tensor, e).items():
                error[prefix + name] = max(error[prefix + name], value)
    return error, expected, upstream


def _same_bits(got: Tensor, expected: Tensor, name: str) -> None:
    try:
        assert_bit_equal(got, expected, name=name)
    except AssertionError as reason:
        raise Failure(f"not the oracle's bits: {reason}") from None


def _errors(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Largest and root mean square error over the elements that are finite in both; inf where only one is."""
    got, exact = got.double(), exact.double()
    if not torch.equal(got.isnan(), exact.isnan()):
        return {"max": math.inf, "rms": math.inf}
    difference = torch.where(got == exact, 0.0, got - exact)[~exact.isnan()].abs()
    if difference.numel() == 0:
        return {"max": 0.0, "rms": 0.0}
    return {"max": difference.max().item(), "rms": difference.square().mean().sqrt().item()}


def _some_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same blocks of 64 rows of each, the first and the last among them, where all rows would take seconds."""
    width = tensors[0].shape[-1] if tensors[0].dim() else 1
    if tensors[0].numel() <= CHECKED_ELEMENTS or width == 0:
        return tensors
    rows = tensors[0].numel() // width
    blocks = max(2, CHECKED_ELEMENTS // (64 * width))
    starts = torch.linspace(0, max(rows - 64, 0), blocks).long().unique()
    index = (starts[:, None] + torch.arange(64)).clamp(max=rows - 1).flatten().to(tensors[0].device)
    return tuple(t.reshape(rows, width)[index] for t in tensors)


def _check_peer(
    peer: Contestant,
    inputs: tuple[Any, ...],
    expected: list[Tensor],
    upstream: Sequence[Tensor] | None,
    error: Mapping[str, Any],
) -> dict[str, float] | None:
    """The peer's error, or a Failure when it computes something else: then its time says nothing."""
    if peer.peer.tolerance is None or peer.peer.yardstick:
        return None
    worst = {"max": 0.0, "rms": 0.0}
    for g, e in zip(peer.results(inputs, upstream), expected):
        if not e.is_floating_point() or e.dtype.itemsize == 1:
            continue
        if g.shape != e.shape:
            raise Failure(f"its output has shape {[*g.shape]}, ours {[*e.shape]}")
        g, e = _some_rows(g, e)
        found = _errors(g, e)
        scale = _scale(e)
        limit = peer.peer.tolerance * (error.get("naive_rms", 0.0) or PEER_TINY * scale) + PEER_TINY * scale
        if not found["rms"] <= limit:
            raise Failure(f"its output is another one: rms error {found['rms']:.2e}, expected below {limit:.2e}")
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


def _scale(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].double()
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def _apart(got: Sequence[Tensor], plain: Sequence[Tensor]) -> str | None:
    """How two results of the same precision differ by more than rounding explains, or None."""
    for i, (g, p) in enumerate(zip(got, plain)):
        if g.shape != p.shape:
            return f"output {i} has shape {[*g.shape]} for {[*p.shape]}"
        if g.is_floating_point() and g.dtype.itemsize > 1 and p.is_floating_point():
            g, p = _some_rows(g, p)
            found, scale = _errors(g, p)["rms"], _scale(p)
            if not found <= 0.05 * scale + 1e-30:
                return f"output {i} is off by rms {found:.2e} at a scale of {scale:.2e}"
    return None


def _nbytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def _first_line(error: BaseException) -> str:
    if isinstance(error, Failure):
        return str(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:240] if text else type(error).__name__


@contextmanager
def compile_settings() -> Any:
    """torch.compile as a peer needs it: no silent fallback to eager, and graphs that can run backward twice."""
    import torch._dynamo
    import torch._functorch.config

    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        torch._functorch.config.patch(donated_buffer=False),
    ):
        try:
            yield
        finally:
            torch._dynamo.reset()


class Runner:
    """Runs cases on one device and knows its roof."""

    def __init__(self, device: torch.device | str, settings: Settings | None = None, roof: Roof | None = None):
        self.device = torch.device(device)
        self.settings = settings or Settings()
        self.cache = roofline.cache_bytes(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        # never the default stream: see timing.measure_cuda
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.roof = roof or roofline.measure(self.device)
        self.environment = environment(self.device)

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream)

    def run(self, case: Case | ModelCase) -> dict[str, Any]:
        """One result line. Never raises for what a case does: ``status`` says how it went."""
        line: dict[str, Any] = {
            "format": FORMAT,
            "case": case.id,
            "op": case.op,
            "family": case.family,
            "name": case.name,
            "dtype": case.dtype,
            "mode": case.mode,
            "suite": case.suite,
            "device": roofline.describe_device(self.device),
            "device_key": device_key(self.device),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "bytes": case.bytes,
            "flops": case.flops,
            "call_cost": case.call_cost,
        }
        if case.series:
            line |= {"series": case.series, "length": case.length}
        before = time.perf_counter()
        try:
            with compile_settings(), torch.no_grad(), torch.cuda.stream(self.stream):
                line |= case.measure(self) if isinstance(case, ModelCase) else self._run(case)
            line["status"] = "ok"
        except Failure as reason:
            line |= {"status": "failed", "reason": str(reason)}
        except NotImplementedError as reason:
            line |= {"status": "unavailable", "reason": _first_line(reason)}
        except Exception as reason:
            line |= {"status": "failed", "reason": _first_line(reason), "traceback": traceback.format_exc(limit=-4)}
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        line["case_seconds"] = round(time.perf_counter() - before, 2)
        return line | {"roof": self.roof.as_dict(), **self.environment, "clocks": clocks(self.device)}

    def _run(self, case: Case) -> dict[str, Any]:
        ours = Contestant(case, Peer(case.run))
        naive = case.naive or case.peer("eager").function()
        small = case.oracle_inputs or case.inputs
        began = time.perf_counter()
        phases: dict[str, float] = {}

        def done(phase: str) -> None:
            phases[phase] = round(time.perf_counter() - began - sum(phases.values()), 2)

        # correct before fast: nothing is timed of an op that is wrong
        inputs = small(self.device, self.generator(1))
        error, expected, upstream = check(case, ours, naive, inputs, self.generator(2))
        done("check")
        contestants: dict[str, Contestant] = {"tilefuse": ours}
        peers: dict[str, dict[str, Any]] = {}
        for backend in self._backends(case, inputs) if self.settings.each_backend else []:
            name = f"tilefuse {backend}"
            peer = Contestant(case, Peer(case.run), backend)
            peers[name] = self._admit(peer, name, inputs, expected, upstream, error, contestants)
        for name in case.peers:
            try:
                peer = Contestant(case, self._available(case.peer(name), case.family))
            except Exception as reason:
                peers[name] = {"missing": _first_line(reason)}
                continue
            peers[name] = self._admit(peer, name, inputs, expected, upstream, error, contestants)
        del inputs, expected, upstream
        done("peers")

        timings, state = self._time(case, contestants, peers)
        result = self._judge(case, timings, state, peers, contestants)
        done("timing")
        # after timing, on fresh inputs: a kernel that remembered an answer is found here
        again = check(case, ours, naive, small(self.device, self.generator(3)), self.generator(4))[0]
        if case.oracle_inputs:
            self._check_full_size(case, ours, naive, contestants, peers)
        kernels = self._kernels(case, small(self.device, self.generator(1)))
        done("check again")
        return {
            "error": {k: max(error[k], again[k]) for k in error},
            "backends": kernels,
            "phases": phases,
            "peers": peers,
            **result,
        }

    def _available(self, peer: Peer, family: str) -> Peer:
        if self.device.type not in peer.devices:
            raise Failure(f"not on {self.device.type}")
        if peer.compile and not self.settings.may_compile(family):
            raise Failure(
                f"this run compiles peers for {self.settings.compile_seconds:.0f} s at most (--suite full: no limit)"
            )
        return peer

    def _admit(
        self,
        peer: Contestant,
        name: str,
        inputs: tuple[Any, ...],
        expected: list[Tensor],
        upstream: Sequence[Tensor] | None,
        error: Mapping[str, Any],
        contestants: dict[str, Contestant],
    ) -> dict[str, Any]:
        if peer.peer.compile and peer.case.oracle_inputs:
            # it would compile for the small shape too: checked at full size instead
            contestants[name] = peer
            return {}
        before = time.perf_counter()
        try:
            found = _check_peer(peer, inputs, expected, upstream, error)
        except Exception as reason:
            return {"missing": _first_line(reason)}
        finally:
            if peer.peer.compile:
                self.settings.compiling(peer.case.family, time.perf_counter() - before)
        contestants[name] = peer
        entry: dict[str, Any] = {"error": found} if found else {}
        if peer.peer.compile:
            entry["compile_seconds"] = round(time.perf_counter() - before, 2)
        return entry

    def _sets(self, case: Case) -> list[tuple[Any, ...]]:
        """Inputs often enough to exceed the last-level cache twice."""
        sets = [case.inputs(self.device, self.generator(100))]
        size = max(_nbytes(sets[0]), 1)
        wanted = 1 if case.call_cost else math.ceil(2 * self.cache / size) + (size < 2 * self.cache)
        count = max(1, min(wanted, MAX_SETS, MAX_BYTES[self.device.type] // size))
        sets += [case.inputs(self.device, self.generator(100 + i)) for i in range(1, count)]
        return sets

    def _time(
        self, case: Case, contestants: dict[str, Contestant], peers: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, timing.Timing], str]:
        sets = self._sets(case)
        state = "cold" if _nbytes(sets) >= 2 * self.cache else "cached"
        bound: dict[str, list[Callable[[], Any]]] = {}
        for name, contestant in list(contestants.items()):
            before = time.perf_counter()
            try:
                with contestant._forced():
                    generator = self.generator(200)
                    calls = [contestant.bind(inputs, generator) for inputs in sets]
                    # once more where shapes differ from the check's: compiles, fills caches, finds failures
                    calls[0]()
                    if case.call_cost or self.device.type == "cuda":
                        cost = timing.call_cost(calls[0], self.device)
                        entry = peers.setdefault(name, {}) if name != "tilefuse" else {}
                        entry["call_us"] = cost * 1e6
                        if name == "tilefuse":
                            self._own_call_us = cost * 1e6
                bound[name] = calls
            except Exception as reason:
                if name == "tilefuse":
                    raise
                peers[name] = {"missing": _first_line(reason)}
                del contestants[name]
            if contestant.peer.compile and case.oracle_inputs:
                self.settings.compiling(case.family, time.perf_counter() - before)
                peers[name].setdefault("compile_seconds", round(time.perf_counter() - before, 2))
        measure = timing.measure_cuda if self.device.type == "cuda" else timing.measure_cpu
        # a forced backend is a process-wide setting: those contestants are timed one by one
        free = {n: c for n, c in bound.items() if contestants[n].backend is None}
        timings = measure(free, self.settings.seconds)
        for name in bound.keys() - free.keys():
            with contestants[name]._forced():
                timings |= measure({name: bound[name]}, self.settings.seconds / 4)
        for name, calls in bound.items() if case.memory else ():
            with contestants[name]._forced():
                peak = timing.peak_memory(calls[0], self.device)
            if name == "tilefuse":
                self._own_peak_bytes = peak
            else:
                peers.setdefault(name, {})["peak_bytes"] = peak
        return timings, state

    def _judge(
        self,
        case: Case,
        timings: dict[str, timing.Timing],
        state: str,
        peers: dict[str, dict[str, Any]],
        contestants: Mapping[str, Contestant],
    ) -> dict[str, Any]:
        kind = self.device.type

        def too_fast() -> list[str]:
            nonlocal floor
            floor = self.roof.floor_seconds(case.bytes, case.flops, kind, state == "cached")
            # the cost of a call is no bandwidth: its few operands sit in the first-level cache
            return [name for name, measured in timings.items() if not case.call_cost and measured.median < floor]

        floor = 0.0
        if too_fast():
            # the roof was measured too, perhaps in a noisy moment: it gets a second chance, the case does not
            self.roof = self.roof.higher(roofline.measure(self.device))
        for name in too_fast():
            took = timings[name].median
            reason = f"took {took * 1e6:.2f} us, this machine's roof allows no less than {floor * 1e6:.2f} us"
            if contestants[name].peer.tolerance is not None and not contestants[name].peer.yardstick:
                raise Failure(f"{name} {reason}: the benchmark is wrong")
            # its output was never compared with ours: it does less work
            peers[name] = {"missing": reason}
            del timings[name]
        mine = timings["tilefuse"]
        attainable, bound = self.roof.attainable_seconds(case.bytes, case.flops, case.dtype, state == "cached")
        result: dict[str, Any] = {
            "state": state,
            "timing": mine.method,
            **_numbers(mine, case),
            "roof_percent": 100 * attainable / mine.median,
            "bound": bound,
            "floor_us": floor * 1e6,
        }
        if hasattr(self, "_own_call_us"):
            result["call_us"] = self._own_call_us
            del self._own_call_us
        if case.memory:
            result["peak_bytes"] = self._own_peak_bytes
        for name, measured in timings.items():
            if name != "tilefuse":
                peers[name] |= _numbers(measured, case)
                if contestants[name].peer.yardstick:
                    peers[name]["yardstick"] = True
                paired = measured.samples and not name.startswith("tilefuse ")
                peers[name]["speedup"] = (
                    timing.paired_ratio(measured, mine) if paired else measured.median / mine.median
                )
        return result

    def _check_full_size(
        self,
        case: Case,
        ours: Contestant,
        naive: Callable[..., Any],
        contestants: Mapping[str, Contestant],
        peers: dict[str, dict[str, Any]],
    ) -> None:
        """At the timed size the oracle would be too slow; a plain result of the same precision still finds blunders."""
        inputs = case.inputs(self.device, self.generator(5))
        upstream = None
        if case.mode != "forward":
            with torch.enable_grad():
                outputs = _differentiable(case.run(*_require_grad(inputs, case.grads)))
            upstream = _upstream(outputs, self.generator(6))
        got = ours.results(inputs, upstream)
        try:
            plain = _results(naive, inputs, case, upstream)
        except (RuntimeError, MemoryError):
            # no room for the naive computation at this size, which is why the op exists
            plain = got
        if reason := _apart(got, plain):
            raise Failure(f"at full size, against the naive result: {reason}")
        for name, contestant in contestants.items():
            if contestant.peer.compile and (reason := _apart(contestant.results(inputs, upstream), plain)):
                peers[name] = {"missing": f"its output is another one: {reason}"}

    def _traced(self, case: Case, inputs: tuple[Any, ...]) -> dict[str, dict[str, str]]:
        if case.mode == "forward":
            return library.trace_call(case.run, inputs, {})

        def backward(*args: Any) -> None:
            args = _require_grad(args, case.grads)
            with torch.enable_grad():
                outputs = _differentiable(case.run(*args))
                torch.autograd.grad(outputs, [args[i] for i in case.grads], [torch.ones_like(o) for o in outputs])

        return library.trace_call(backward, inputs, {})

    def _kernels(self, case: Case, inputs: tuple[Any, ...]) -> dict[str, str]:
        """Which backend ran each kernel of the call."""
        try:
            traced = self._traced(case, inputs)
        except Exception:
            # data-dependent cases cannot be traced; the setting is all that is known then
            return {"*": tilefuse.backend()}
        return {k: next((b for b, why in row.items() if why == "runs"), "none") for k, row in traced.items()}

    def _backends(self, case: Case, inputs: tuple[Any, ...]) -> list[str]:
        names = {}
        for candidate in ("triton", "cuda") if self.device.type == "cuda" else ("reference", "cpu"):
            with tilefuse.backend(candidate):
                try:
                    traced = self._traced(case, inputs)
                except Exception:
                    continue
            if traced and all(row.get(candidate) == "runs" for row in traced.values()):
                names[candidate] = None
        return list(names)


def _numbers(measured: timing.Timing, case: Case) -> dict[str, Any]:
    return {
        "median_us": measured.median * 1e6,
        "p20_us": measured.p20 * 1e6,
        "p80_us": measured.p80 * 1e6,
        "rounds": measured.rounds,
        "calls": measured.calls,
        "gbps": case.bytes / measured.median / 1e9,
        "tflops": case.flops / measured.median / 1e12,
    }


def keep_freed_memory() -> None:
    """Lets glibc reuse freed blocks of any size.

    Its default returns large ones to the kernel, and every call then pays page faults that no training or
    serving process with a caching allocator pays. The setting holds for tilefuse and its peers alike.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except OSError:
        # another libc: its allocator stays as it is
        pass


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
    found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    if os.path.exists("/proc/cpuinfo"):
        mhz = [float(v) for v in re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())]
        found["mhz"] = max(mhz, default=None)
    return found


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


def run_all(
    cases: Sequence[Case],
    runner: Runner,
    path: Path,
    *,
    before: Callable[[int, Case], None] = lambda i, case: None,
    after: Callable[[int, dict[str, Any]], None] = lambda i, line: None,
) -> list[dict[str, Any]]:
    """Runs cases and writes each line as soon as it is there, so that a cut-off run keeps what it has."""
    lines = []
    for i, case in enumerate(cases):
        before(i, case)
        line = runner.run(case)
        lines.append(line)
        write_lines(path, [line])
        after(i, line)
    return lines
