"""The roof of the machine at hand, measured in the same process as the cases: no data-sheet numbers.

Bandwidths are those of a large copy (one stream read and one written, or one changed in place), a large read (a sum
over one stream, a dot product over two, whichever is faster: a copy is no roof of a kernel that only reads) and a large
fill; the matmul rate is that of one large square product per dtype. Each is the best of several repeats, because a roof
is what the machine can do; a case's own time is a median.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# the time a kernel may undercut the measured roof by: roofs are measured too
TOLERANCE = {"cpu": 0.20, "cuda": 0.05}


@dataclass(frozen=True)
class Roof:
    """GB/s (1e9 bytes) and TFLOP/s that this device reached."""

    copy_gbps: float
    read_gbps: float
    fill_gbps: float
    cached_gbps: float  # a copy that stays in the caches
    tflops: dict[str, float] = field(default_factory=dict)

    def matmul(self, dtype: str) -> float:
        """The rate for a dtype, that of float32 at least; for one that has no matmul of its own here, the fastest."""
        own = self.tflops.get(dtype) or max(self.tflops.values(), default=0.0)
        # narrower values widen exactly, and do where the hardware does not multiply them
        return max(own, self.tflops.get("float32", 0.0))

    def attainable_seconds(
        self, nbytes: int, flops: int, dtype: str, cached: bool = False, reads: bool = False
    ) -> tuple[float, str]:
        """The least time that a copy (a read where the case ``reads``) and a matmul suggest, and which sets it."""
        gbps, bound = (max(self.copy_gbps, self.read_gbps), "read") if reads else (self.copy_gbps, "memory")
        if cached:
            gbps, bound = max(gbps, self.cached_gbps), "cache"
        memory = nbytes / (gbps * 1e9)
        compute = flops / (self.matmul(dtype) * 1e12) if flops and self.tflops else 0.0
        return (compute, "compute") if compute > memory else (memory, bound)

    def floor_seconds(self, nbytes: int, flops: int, device: str, cached: bool) -> float:
        """The time below which a measurement cannot be right: every roof at its highest, minus the tolerance."""
        gbps = max(self.copy_gbps, self.read_gbps, self.fill_gbps, self.cached_gbps if cached else 0.0)
        fastest = max(self.tflops.values(), default=0.0)
        compute = flops / (fastest * 1e12) if fastest else 0.0
        return max(nbytes / (gbps * 1e9), compute) * (1 - TOLERANCE[device])

    def higher(self, other: Roof) -> Roof:
        """The better of two measurements, number by number."""
        names = {**self.tflops, **other.tflops}
        return Roof(
            max(self.copy_gbps, other.copy_gbps),
            max(self.read_gbps, other.read_gbps),
            max(self.fill_gbps, other.fill_gbps),
            max(self.cached_gbps, other.cached_gbps),
            {d: max(self.tflops.get(d, 0.0), other.tflops.get(d, 0.0)) for d in names},
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(
            int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]] if text[-1] in "KMG" else int(text)
        )
    return max(sizes, default=32 * 2**20)


def measure(device: torch.device, *, seconds: float = 3.0) -> Roof:
    """Measures the roof in about ``seconds``."""
    share = seconds / 8
    large = 2**28 if device.type == "cuda" else max(2**25, 2 * cache_bytes(device) // 4)
    source = torch.randn(large, device=device)
    target = torch.empty_like(source)
    size = source.nbytes
    # in place nothing is read only to be overwritten
    seconds = min(_best(call, device, share / 2) for call in (lambda: target.copy_(source), lambda: target.neg_()))
    copy = 2 * size / seconds
    read = size / _best(source.sum, device, share / 2)
    read = max(read, 2 * size / _best(lambda: torch.dot(source, target), device, share / 2))
    fill = size / _best(lambda: target.fill_(1.5), device, share)
    small = source[: cache_bytes(device) // 16 // 4]
    small_target = torch.empty_like(small)
    cached = 2 * small.nbytes / _best(lambda: small_target.copy_(small), device, share / 2)
    tflops = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tflops[str(dtype).removeprefix("torch.")] = _matmul_tflops(dtype, device, share)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        rate = _fp8_tflops(device, share)
        if rate:
            tflops["float8_e4m3fn"] = rate
    return Roof(copy / 1e9, read / 1e9, fill / 1e9, cached / 1e9, tflops)


def _best(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Shortest time of one call in seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    run()
    repeats = 0
    while repeats < 3 or time.perf_counter() < end:
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            elapsed = start.elapsed_time(stop) / 1e3
        else:
            before = time.perf_counter()
            run()
            elapsed = time.perf_counter() - before
        best = min(best, elapsed)
        repeats += 1
    return best


def _matmul_tflops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    if device.type == "cuda":
        sizes = [8192]
    else:
        # some CPUs multiply a dtype in emulation: the small product tells before a large one takes minutes
        sizes = [256, 1024, 2048]
    rate = 0.0
    for n in sizes:
        if rate and 2 * n**3 / (rate * 1e12) > seconds:
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rate = max(rate, 2 * n**3 / _best(lambda a=a, b=b: a @ b, device, seconds / len(sizes)) / 1e12)
    return rate


def _fp8_tflops(device: torch.device, seconds: float) -> float | None:
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    try:
        run = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
        return 2 * n**3 / _best(run, device, seconds) / 1e12
    except RuntimeError:
        # a torch built without it: FP8 cases then measure against the fastest other dtype
        return None


def describe_device(device: torch.device) -> str:
    """Marketing name; for a CPU with its thread count, because results depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
