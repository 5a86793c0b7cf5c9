"""Runs cases: checks, timing, and one result line per case."""

from __future__ import annotations

import ctypes
import datetime
import gc
import math
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from . import records, roofline, timing
from .checks import Checked, check, check_first_call, check_full_size, check_peer, judge
from .contestants import Contestant, kernels_of, nbytes, whole_backends
from .harness import Case, Failure, Peer, discover
from .models import ModelCase
from .peers import version
from .roofline import Roof

FORMAT = 1
# inputs of one case: enough sets to exceed the cache, no more
MAX_SETS = 256
MAX_BYTES = {"cpu": 2**31, "cuda": 2**34}


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
    _compiled: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def may_compile(self, family: str) -> bool:
        return self._compiled.get(family, 0.0) < self.compile_seconds / self.families

    def compiling(self, family: str, seconds: float) -> None:
        self._compiled[family] = self._compiled.get(family, 0.0) + seconds


QUICK = {"seconds": 1.2, "compile_seconds": 120.0}
FULL = {"seconds": 4.0}


@dataclass
class Measured:
    """What timing found, by contestant."""

    state: str  # of the inputs: cold or cached
    timings: dict[str, timing.Timing] = field(default_factory=dict)
    call_us: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    def numbers(self, name: str, timed: timing.Timing, case: Case) -> dict[str, Any]:
        """The numbers of one contestant as its entry in a result line holds them."""
        numbers = {
            "median_us": timed.median * 1e6,
            "p20_us": timed.p20 * 1e6,
            "p80_us": timed.p80 * 1e6,
            "rounds": timed.rounds,
            "calls": timed.calls,
            "gbps": case.bytes / timed.median / 1e9,
            "tflops": case.flops / timed.median / 1e12,
        }
        for key, found in (("call_us", self.call_us), ("peak_bytes", self.peak_bytes)):
            if name in found:
                numbers[key] = found[name]
        return numbers


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
        torch_at_a_path_without_blanks(),
    ):
        try:
            yield
        finally:
            torch._dynamo.reset()


@contextmanager
def torch_at_a_path_without_blanks() -> Any:
    """Inductor's compile commands come apart at blanks, those of torch's own folder too: there a link stands for it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils import cpp_extension

    folder = Path(torch.__file__).parent
    if not re.search(r"\s", str(folder)):
        yield
        return
    # always the same link: what was compiled with it is found again
    link = Path(cache_dir()) / "torch"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    with patch.multiple(cpp_extension, _TORCH_PATH=str(link), TORCH_LIB_PATH=str(link / "lib")):
        yield


class Runner:
    """Runs cases on one device and knows the best roof that it saw meanwhile."""

    def __init__(self, device: torch.device | str, settings: Settings | None = None, roof: Roof | None = None):
        self.device = torch.device(device)
        self.settings = settings or Settings()
        self.cache = roofline.cache_bytes(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        # never the default stream: see timing.measure_cuda
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.roof = roof or roofline.measure(self.device)
        # as measured, before any roof judged them
        self._lines: list[dict[str, Any]] = []
        self.environment = records.environment(self.device)

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream)

    def run(self, case: Case | ModelCase) -> dict[str, Any]:
        """One result line. Never raises for what a case does: ``status`` says how it went.

        A time that beats the roof has the roof measured again. Where it still does, the line is ``unjudged``:
        `settle` decides when the run is over.
        """
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
            "device_key": records.device_key(self.device),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "bytes": case.bytes,
            "flops": case.flops,
            "call_cost": case.call_cost,
        }
        if case.reads:
            line["reads"] = True
        if case.series:
            line |= {"series": case.series, "length": case.length}
        before = time.perf_counter()
        try:
            line |= self._in_its_own_process(case) if self._outlives(case) else self.measure(case)
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
            else:
                give_back_freed_memory()
        line["case_seconds"] = round(time.perf_counter() - before, 2)
        line |= {"roof": self.roof.as_dict(), **self.environment, "clocks": records.clocks(self.device)}
        self._lines.append(line)
        judged = self._judge(line)
        if _beats_the_roof(line, judged):
            self._measure_the_roof_again()
            judged = self._judge(line)
        return judged

    def settle(self) -> list[dict[str, Any]]:
        """The lines of the whole run, each judged by the best roof that the run saw.

        A case that beats even this one has failed, unless the machine was under load, where no roof was what the
        machine can do: it stays ``unjudged``.
        """
        if any(self._judge(line)["status"] == "unjudged" for line in self._lines):
            self._measure_the_roof_again()
        lines = [self._judge(line) for line in self._lines]
        if not records.under_load(self._lines):
            for line in lines:
                if line["status"] == "unjudged":
                    line |= {"status": "failed", "reason": f"{line['reason']}: the benchmark is wrong"}
        return lines

    def _judge(self, line: Mapping[str, Any]) -> dict[str, Any]:
        return judge(line, self.roof, self.device.type)

    def _measure_the_roof_again(self) -> None:
        self.roof = self.roof.higher(roofline.measure(self.device))

    def measure(self, case: Case | ModelCase) -> dict[str, Any]:
        """What a case adds to its line, measured in this process."""
        with compile_settings(), torch.no_grad(), torch.cuda.stream(self.stream):
            return case.measure(self) if isinstance(case, ModelCase) else self._run(case)

    def _outlives(self, case: Case | ModelCase) -> bool:
        """Whether a peer of this case would leave its copies of the weights in this process for good."""
        if isinstance(case, ModelCase):
            return False
        peers = [case.peer(name) for name in case.peers]
        return any(p.keeps_memory and self.device.type in p.devices and version(p.package) for p in peers)

    def _in_its_own_process(self, case: Case | ModelCase) -> dict[str, Any]:
        # not forked: OpenMP's threads do not survive that
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            threads = torch.get_num_threads()
            measured = pool.submit(_measure_here, case.id, self.device, self.settings, self.roof, threads)
            result, self.settings = measured.result()
        return result

    def _run(self, case: Case) -> dict[str, Any]:
        ours = Contestant(case, case.ours)
        naive = case.naive or case.peer("eager").function()
        small = case.oracle_inputs or case.inputs
        began = time.perf_counter()
        phases: dict[str, float] = {}

        def done(phase: str) -> None:
            phases[phase] = round(time.perf_counter() - began - sum(phases.values()), 2)

        # correct before fast: nothing is timed of an op that is wrong
        checked = check(ours, naive, small(self.device, self.generator(1)), self.generator(2))
        done("check")
        contestants, peers = self._admitted(case, checked)
        error = checked.error
        del checked
        done("peers")

        measured = self._time(case, {"tilefuse": ours, **contestants}, peers)
        result = self._numbers(case, measured, contestants, peers)
        done("timing")
        # after timing, on fresh inputs: a kernel that remembered an answer is found here
        again = check(ours, naive, small(self.device, self.generator(3)), self.generator(4)).error
        if case.oracle_inputs:
            compiled = {n: c for n, c in contestants.items() if c.peer.compile and "missing" not in peers[n]}
            inputs = case.inputs(self.device, self.generator(5))
            for name, reason in check_full_size(ours, naive, compiled, inputs, self.generator(6)).items():
                peers[name] = {"missing": reason}
        kernels = kernels_of(case, small(self.device, self.generator(1)))
        done("check again")
        return {
            "error": {k: max(error[k], again[k]) for k in error},
            "backends": kernels,
            "phases": phases,
            "peers": peers,
            **result,
        }

    def _admitted(self, case: Case, checked: Checked) -> tuple[dict[str, Contestant], dict[str, dict[str, Any]]]:
        """The peers that compute what tilefuse does, and the entry of each peer in the result line."""
        contestants: dict[str, Contestant] = {}
        peers: dict[str, dict[str, Any]] = {}

        def admit(name: str, peer: Peer, backend: str | None = None) -> None:
            found = version(peer.package) if peer.package else None
            peers[name] = {"version": found} if found else {}
            try:
                contestant = Contestant(case, self._available(peer, case.family), backend)
                peers[name] |= self._check_peer(contestant, checked)
            except Exception as reason:
                peers[name]["missing"] = _first_line(reason)
            else:
                contestants[name] = contestant

        if self.settings.each_backend:
            candidates = ("triton", "cuda") if self.device.type == "cuda" else ("reference", "cpu")
            for backend in whole_backends(case, checked.inputs, candidates):
                admit(f"tilefuse {backend}", case.ours, backend)
        for name in case.peers:
            admit(name, case.peer(name))
        return contestants, peers

    def _available(self, peer: Peer, family: str) -> Peer:
        if self.device.type not in peer.devices:
            raise Failure(f"not on {self.device.type}")
        if peer.compile and not self.settings.may_compile(family):
            raise Failure(
                f"this run compiles peers for {self.settings.compile_seconds:.0f} s at most (--suite full: no limit)"
            )
        return peer

    def _check_peer(self, peer: Contestant, checked: Checked) -> dict[str, Any]:
        if peer.peer.compile and peer.case.oracle_inputs:
            # it would compile for the small shape too: checked at full size instead
            return {}
        before = time.perf_counter()
        try:
            found = check_peer(peer, checked)
        finally:
            took = time.perf_counter() - before
            if peer.peer.compile:
                self.settings.compiling(peer.case.family, took)
        entry: dict[str, Any] = {"error": found} if found else {}
        if peer.peer.compile:
            entry["compile_seconds"] = round(took, 2)
        return entry

    def _sets(self, case: Case) -> list[tuple[Any, ...]]:
        """Inputs often enough to exceed the last-level cache twice."""
        sets = [case.inputs(self.device, self.generator(100))]
        size = max(nbytes(sets[0]), 1)
        wanted = 1 if case.call_cost else math.ceil(2 * self.cache / size) + (size < 2 * self.cache)
        count = max(1, min(wanted, MAX_SETS, MAX_BYTES[self.device.type] // size))
        sets += [case.inputs(self.device, self.generator(100 + i)) for i in range(1, count)]
        return sets

    def _time(self, case: Case, contestants: Mapping[str, Contestant], peers: dict[str, dict[str, Any]]) -> Measured:
        sets = self._sets(case)
        measured = Measured("cold" if nbytes(sets) >= 2 * self.cache else "cached")
        bound: dict[str, list[Callable[[], Any]]] = {}
        first: Any = None  # what the first call of tilefuse returned

        def bind(name: str) -> None:
            nonlocal first
            contestant = contestants[name]
            before = time.perf_counter()
            try:
                with contestant.forced():
                    generator = self.generator(200)
                    calls = [contestant.bind(inputs, generator) for inputs in sets]
                    # once more where shapes differ from the check's: compiles, fills caches, finds failures
                    out = calls[0]()
                    if name == "tilefuse":
                        first = out
                    elif case.oracle_inputs and contestant.peer.package and case.mode == "forward":
                        check_first_call(contestant, out, first)
                    if case.call_cost or self.device.type == "cuda":
                        measured.call_us[name] = timing.call_cost(calls[0], self.device) * 1e6
                bound[name] = calls
            except Exception as reason:
                if name == "tilefuse":
                    raise
                peers[name]["missing"] = _first_line(reason)
            if contestant.peer.compile and case.oracle_inputs:
                took = time.perf_counter() - before
                self.settings.compiling(case.family, took)
                peers[name].setdefault("compile_seconds", round(took, 2))

        measure = timing.measure_cuda if self.device.type == "cuda" else timing.measure_cpu

        def take(names: Sequence[str], seconds: float) -> None:
            """Times contestants against each other."""
            if names:
                measured.timings |= measure({name: bound[name] for name in names}, seconds)

        def take_alone(name: str) -> None:
            with contestants[name].forced():
                take([name], self.settings.seconds / 4)

        def take_memory() -> None:
            for name in bound if case.memory else ():
                with contestants[name].forced():
                    measured.peak_bytes[name] = timing.peak_memory(bound[name][0], self.device)

        for name, contestant in contestants.items():
            if not contestant.peer.apart:
                bind(name)
        # a forced backend is a process-wide setting: those contestants are timed one by one
        take([name for name in bound if contestants[name].backend is None], self.settings.seconds)
        for name in bound:
            if contestants[name].backend is not None:
                take_alone(name)
        take_memory()
        for name, contestant in contestants.items():
            if contestant.peer.apart:
                # alone in memory too: with everyone's copies of large weights it would not fit
                bound.clear()
                give_back_freed_memory()
                bind(name)
                if name in bound:
                    take_alone(name)
                    take_memory()
        return measured

    def _numbers(
        self,
        case: Case,
        measured: Measured,
        contestants: Mapping[str, Contestant],
        peers: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """What the line says of tilefuse; the numbers of peers go into their entries."""
        ours = measured.timings.pop("tilefuse")
        for name, other in measured.timings.items():
            peers[name] |= measured.numbers(name, other, case)
            if contestants[name].peer.yardstick:
                peers[name]["yardstick"] = True
            if contestants[name].peer.tolerance is None:
                peers[name]["unchecked"] = True
            paired = other.samples and contestants[name].backend is None and not contestants[name].peer.apart
            peers[name]["speedup"] = timing.paired_ratio(other, ours) if paired else other.median / ours.median
        return {"state": measured.state, "timing": ours.method, **measured.numbers("tilefuse", ours, case)}


def _beats_the_roof(line: Mapping[str, Any], judged: Mapping[str, Any]) -> bool:
    """Whether tilefuse or a peer was faster than the roof that judged the line allows."""
    return judged["status"] == "unjudged" or judged.get("peers") != line.get("peers")


def _measure_here(
    case_id: str, device: torch.device, settings: Settings, roof: Roof, threads: int
) -> tuple[dict[str, Any], Settings]:
    """`Runner.measure` in a new process: the case by its id, since functions do not travel; settings count on."""
    torch.set_num_threads(threads)
    case = next(c for c in discover("full", device.type, match=case_id) if c.id == case_id)
    return Runner(device, settings, roof).measure(case), settings


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


def give_back_freed_memory() -> None:
    """What `keep_freed_memory` kept of one case does not suit the next: blocks of other sizes would be added."""
    # another libc: its allocator stays as it is
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


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
        records.write_lines(path, [line])
        after(i, line)
    return lines
