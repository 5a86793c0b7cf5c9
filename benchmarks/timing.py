"""Timers: paired rounds, so that noise of the machine meets tilefuse and its peers alike.

Each contestant is a list of calls without arguments, one per set of inputs. The sets together exceed the
last-level cache, so that no call finds its inputs or its outputs there (*cold*); where that would take too
much memory or too many sets the state is *cached*, and is reported as such.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]
MIN_ROUNDS = 5
# of a contestant that alone would use up the budget
FEWEST_ROUNDS = 3
MAX_ROUNDS = 200
# a sample shorter than this is mostly timer
SAMPLE_SECONDS = {"cpu": 2e-4, "cuda": 5e-4}


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int
    calls: int  # calls per sample
    method: str
    samples: tuple[float | None, ...]  # by round; None where it sat out


def percentile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(fraction * (len(ordered) - 1))))]


def _summary(samples: list[float | None], calls: int, method: str) -> Timing:
    taken = [s for s in samples if s is not None]
    return Timing(
        statistics.median(taken),
        percentile(taken, 0.2),
        percentile(taken, 0.8),
        len(taken),
        calls,
        method,
        tuple(samples),
    )


def paired_ratio(other: Timing, ours: Timing) -> float:
    """How many times longer ``other`` took: the median over the rounds that both took part in."""
    return statistics.median(b / a for a, b in zip(ours.samples, other.samples) if a is not None and b is not None)


def _rounds(
    samplers: Mapping[str, Callable[[], float]], estimates: Mapping[str, float], budget: float
) -> dict[str, list[float | None]]:
    """Takes one sample of each contestant per round until the budget is spent; slow ones sit out most rounds."""
    share = budget / len(samplers)
    wanted = {}
    for name, estimate in estimates.items():
        fewest = MIN_ROUNDS if estimate * MIN_ROUNDS < 2 * share else FEWEST_ROUNDS
        wanted[name] = min(MAX_ROUNDS, max(fewest, int(share / max(estimate, 1e-9))))
    total = max(wanted.values())
    # powers of two: the rounds of a slow contestant are rounds of every faster one too, so all stay paired
    stride = {name: 2 ** int(math.log2(total / count)) for name, count in wanted.items()}
    samples: dict[str, list[float | None]] = {name: [] for name in samplers}
    names = list(samplers)
    for i in range(total):
        for name in names:
            samples[name].append(samplers[name]() if i % stride[name] == 0 else None)
        # another order each round: nobody always runs after the same neighbour
        names.append(names.pop(0))
    return samples


def measure_cpu(contestants: Mapping[str, Calls], budget: float) -> dict[str, Timing]:
    """Times contestants on the CPU.

    Args:
        contestants: name -> calls, one per set of inputs, already warmed up.
        budget: seconds for all of them.
    """
    samplers, estimates, calls = {}, {}, {}
    for name, sets in contestants.items():
        kept: deque[Any] = deque(maxlen=len(sets))
        before = time.perf_counter()
        for call in sets:
            kept.append(call())
        once = (time.perf_counter() - before) / len(sets)
        n = max(1, math.ceil(SAMPLE_SECONDS["cpu"] / max(once, 1e-9)))
        calls[name], estimates[name] = n, n * once
        samplers[name] = _cpu_sampler(sets, n, kept)
    samples = _rounds(samplers, estimates, budget)
    return {name: _summary(samples[name], calls[name], "perf_counter") for name in contestants}


def _cpu_sampler(sets: Calls, n: int, kept: deque[Any]) -> Callable[[], float]:
    position = 0

    def sample() -> float:
        nonlocal position
        todo = [sets[(position + j) % len(sets)] for j in range(n)]
        position += n
        before = time.perf_counter()
        for call in todo:
            # outputs stay alive as long as their inputs' turn: the next call must not write into a warm buffer
            kept.append(call())
        return (time.perf_counter() - before) / n

    return sample


def measure_cuda(contestants: Mapping[str, Calls], budget: float) -> dict[str, Timing]:
    """Times contestants with events around CUDA-graph replays; what cannot be captured is timed by events alone.

    Runs on the current stream, which must not be the default one: autograd replays a backward on the stream of its
    forward, and only that stream can be captured.
    """
    samplers, estimates, calls, methods = {}, {}, {}, {}
    for name, sets in contestants.items():
        once = max(_cuda_seconds(lambda sets=sets: [call() for call in sets]) / len(sets), 1e-7)
        # whole turns over the sets, long enough for the event timer, few enough to capture quickly
        turns = max(1, min(math.ceil(SAMPLE_SECONDS["cuda"] / once / len(sets)), 256 // len(sets)))
        n = turns * len(sets)
        try:
            replay, method = _capture(sets, n), "graph"
        except Exception:
            torch.cuda.synchronize()
            replay, method = _eager_loop(sets, n), "events"
        calls[name], methods[name] = n, method
        estimates[name] = _cuda_seconds(replay)
        samplers[name] = lambda replay=replay, n=n: _cuda_seconds(replay) / n
    samples = _rounds(samplers, estimates, budget)
    return {name: _summary(samples[name], calls[name], methods[name]) for name in contestants}


def _cuda_seconds(run: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _capture(sets: Calls, n: int) -> Callable[[], None]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # outputs live for one turn, as on the CPU: each call of a turn writes memory of its own
    kept: deque[Any] = deque(maxlen=len(sets))
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for j in range(n):
            kept.append(sets[j % len(sets)]())
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _eager_loop(sets: Calls, n: int) -> Callable[[], None]:
    def loop() -> None:
        kept: deque[Any] = deque(maxlen=len(sets))
        for j in range(n):
            kept.append(sets[j % len(sets)]())

    return loop


def call_cost(call: Callable[[], Any], device: torch.device, *, seconds: float = 0.05) -> float:
    """Host seconds of one eager call: what a decode step pays before the kernel even starts."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    synchronize()
    before = time.perf_counter()
    call()
    synchronize()
    # few enough that the launch queue does not fill up and block, fewer where a call takes long
    n = max(1, min(20, int(seconds / 5 / (time.perf_counter() - before))))
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < FEWEST_ROUNDS or (time.perf_counter() < end and len(samples) < MAX_ROUNDS):
        before = time.perf_counter()
        for _ in range(n):
            call()
        samples.append((time.perf_counter() - before) / n)
        synchronize()
    return statistics.median(samples)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what was there before it, its outputs among them.

    On the CPU the growth of the resident set, so that memory counts whoever allocated it; None where the kernel does
    not tell (its peak is reset through /proc, on Linux only).
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # freed memory that the allocator keeps would be used again, unseen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
