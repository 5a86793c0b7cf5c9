"""What a benchmark case is. Family files import only this module (and ``shapes``).

``benchmarks/<family>/<op>.py`` defines ``cases()``, which yields `Case` objects; nothing else registers it.
Everything in a case is lazy: yielding it allocates nothing and imports no optional library::

    from collections.abc import Iterator

    import torch

    import tilefuse
    from ..harness import Case, Peer, compiled, normal
    from ..shapes import QWEN3_30B_A3B as M


    def eager(x, cos, sin):
        half = cos.shape[-1]
        x1, x2 = x[..., :half], x[..., half:]
        c, s = cos[: x.shape[0], None].to(x.dtype), sin[: x.shape[0], None].to(x.dtype)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)


    def liger():
        # imported only when the case runs; an ImportError becomes the reason why the peer is missing
        LigerRopeFunction = peers.import_module("liger-kernel", "liger_kernel.ops.rope").LigerRopeFunction
        return lambda x, cos, sin: LigerRopeFunction.apply(...)


    def cases() -> Iterator[Case]:
        for tokens in (1, 4096):
            def inputs(device, generator, tokens=tokens):
                x = normal((tokens, M.heads, M.head_dim), torch.bfloat16, device, generator)
                cos, sin = tilefuse.rope_tables(M.head_dim, tokens, device=device)
                return x, cos, sin

            size = 2 * tokens * M.heads * M.head_dim  # bytes of x
            for mode in ("forward", "backward"):
                yield Case(
                    op="rope",
                    name=f"{M.name} q, {tokens} tokens",
                    dtype="bfloat16",
                    mode=mode,
                    inputs=inputs,
                    run=tilefuse.rope,                # called as run(*inputs)
                    peers={
                        "eager": eager,
                        "torch.compile": compiled(eager),
                        "Liger": Peer(load=liger, devices=("cuda",)),
                    },
                    grads=(0,),                       # positions of the inputs that need a gradient
                    bytes=2 * size,                   # least traffic of this mode: what must be read + written once
                    flops=0,
                    call_cost=tokens == 1,            # report the cost of one eager call instead of a bandwidth
                    suite="quick" if tokens == 4096 else "full",
                )

How a case is judged:

* **oracle**: ``oracle(*inputs)`` with the inputs of the case's dtype (or those listed in ``upcast``) widened to
  float64. Absent, it is ``run`` itself on the reference backend. ``naive`` is the plain low-precision
  computation, absent the peer called ``eager``. ``exact=True`` compares bit for bit instead. ``rows=False`` compares
  the whole tensor's maximum and RMS but no single rows or tiles. Gradients are compared by
  ``tilefuse.testing.verification.gradient_report``, whose rule for rows allows for those of few terms.
* ``oracle_inputs`` gives smaller inputs for the oracle where float64 at full size would take seconds.
* In the backward modes the harness calls ``run`` with ``grads`` requiring a gradient, and times
  ``torch.autograd.grad`` with random upstream gradients; what is checked then are the gradients.
* Inputs are made several times (other seeds): to rotate over buffers larger than the caches, and afresh for the
  check after timing. So ``inputs`` must be a pure function of device and generator.
* A quick case should take less than 7 s on two idle cores, ``torch.compile`` included: above about 2 million
  elements give ``oracle_inputs``.
* Cases of one ``series`` differ in nothing but their ``length``: the report draws how the time grows with it.
* ``bytes`` and ``flops`` are the least possible: a measured time below what this machine's best roof allows fails.
* A case that ``reads`` and writes next to nothing (decoding, few rows times many weights) has a read as its roof, which
  can be faster than a copy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["forward", "backward", "forward+backward"]
MODES = ("forward", "backward", "forward+backward")
SUITES = ("quick", "full")
# folders beside those of the families
NO_FAMILIES = ("results", "peers")


class Failure(Exception):
    """A case that must not be believed: a wrong output, or a time that cannot be."""


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    Args:
        fn: called as ``fn(*inputs)`` (or on what ``prepare`` made of them); give this or ``load``.
        load: returns ``fn``; called when the case runs, may import and may raise: the exception is recorded as
            the reason why the peer is missing.
        prepare: turns the case's inputs into the peer's own (other layouts, duplicated tables), untimed and
            differentiable in the backward modes' inputs, which are the prepared ones at the positions ``grads``.
        post: turns the peer's outputs into the layout of tilefuse's, untimed, for the check.
        grads: positions of the prepared inputs that need a gradient, where they differ from the case's.
        compile: run it through ``torch.compile``.
        devices: device kinds it exists for; elsewhere it is recorded as missing.
        tolerance: how many times the naive error its outputs may have (peers may round more often than we do);
            None when its result is legitimately another one (say, another random choice): not checked.
        error: the root mean square error that it may have instead, relative to the output's: of a peer that keeps more
            or fewer bits than we do (activations in bfloat16 for ours in FP8).
        compared: turns outputs, the oracle's and the peer's alike, into what is compared (codes into values).
        package: the distribution that it comes from, whose version the result line carries.
        apart: its own threads go on spinning after a call, so that it is timed alone, after the others.
        keeps_memory: the library never frees what it makes of weights, so that the whole case runs in a process of its
            own, where its file's ``cases()`` yields it again.
        yardstick: not an implementation of the op but a bound, such as a plain copy: not checked, shown in a column
            of its own, never the "best peer".
    """

    fn: Callable[..., Any] | None = None
    load: Callable[[], Callable[..., Any]] | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None
    post: Callable[[Any], Any] | None = None
    grads: tuple[int, ...] | None = None
    compile: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    tolerance: float | None = 16.0
    error: float | None = None
    compared: Callable[..., tuple[Any, ...]] | None = None
    package: str = ""
    apart: bool = False
    keeps_memory: bool = False
    yardstick: bool = False

    def __post_init__(self):
        if (self.fn is None) == (self.load is None):
            raise ValueError("Peer: give either fn or load")

    def function(self) -> Callable[..., Any]:
        fn = self.fn if self.fn is not None else self.load()
        return torch.compile(fn, dynamic=False) if self.compile else fn


def compiled(fn: Callable[..., Any], **options: Any) -> Peer:
    """The same function through ``torch.compile``."""
    return Peer(fn, compile=True, **options)


@dataclass(frozen=True)
class Case:
    """One line of the results. See the module's docstring."""

    op: str  # an op of tilefuse.ops()
    name: str  # model and shape in words: "DeepSeek-V3 q_pe + k_pe, 4096 tokens"
    dtype: str  # of the main input: "bfloat16", "float8_e4m3fn", "float32"
    inputs: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    run: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any] | Peer]
    bytes: int
    flops: int = 0
    mode: Mode = "forward"
    grads: tuple[int, ...] = ()
    oracle: Callable[..., Any] | None = None
    naive: Callable[..., Any] | None = None
    oracle_inputs: Callable[[torch.device, torch.Generator], tuple[Any, ...]] | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None  # what `run` is given, made once: packed weights
    upcast: tuple[int, ...] | None = None
    exact: bool = False
    rows: bool = True
    call_cost: bool = False
    reads: bool = False  # its bytes are read, but for a few percent
    memory: bool = False  # report the peak memory of one call beyond its inputs
    suite: Literal["quick", "full"] = "full"  # quick cases run in both suites
    devices: tuple[str, ...] = ("cpu", "cuda")
    series: str = ""
    length: int = 0
    family: str = field(default="", compare=False)  # filled from the file's folder

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"Case {self.op}: mode must be one of {MODES}, got {self.mode!r}")
        if self.suite not in SUITES:
            raise ValueError(f"Case {self.op}: suite must be one of {SUITES}, got {self.suite!r}")
        if self.mode != "forward" and not self.grads:
            raise ValueError(f"Case {self.op}: mode {self.mode} needs grads")
        if bool(self.series) != (self.length > 0):
            raise ValueError(f"Case {self.op}: a series needs a length, and a length a series")
        if self.bytes < 0 or self.flops < 0 or not (self.bytes or self.flops or self.call_cost):
            raise ValueError(f"Case {self.op}: bytes and flops must say the least work there is")

    @property
    def id(self) -> str:
        return f"{self.op} | {self.name} | {self.dtype} | {self.mode}"

    @property
    def ours(self) -> Peer:
        return Peer(self.run, prepare=self.prepare)

    def peer(self, name: str) -> Peer:
        entry = self.peers[name]
        return entry if isinstance(entry, Peer) else Peer(entry)


def normal(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Random normal data: never zeros, which GPUs multiply faster and at less power."""
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)


def integers(low: int, high: int, shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, tuple(shape), device=device, generator=generator, dtype=torch.int32)


def modules() -> Iterator[tuple[str, str, Any]]:
    """(family, op, module) of every ``benchmarks/<family>/<op>.py``."""
    root = importlib.import_module(__package__)
    for package in pkgutil.iter_modules(root.__path__):
        if package.ispkg and package.name not in NO_FAMILIES:
            folder = importlib.import_module(f"{__package__}.{package.name}")
            for info in pkgutil.iter_modules(folder.__path__):
                yield package.name, info.name, importlib.import_module(f"{folder.__name__}.{info.name}")


def discover(
    suite: str = "quick",
    device: str = "cpu",
    *,
    families: Sequence[str] = (),
    match: str = "",
    also: Mapping[str, Any] | None = None,
) -> list[Any]:
    """The cases of a suite for one kind of device, in the order of their files. Case ids are unique.

    ``also``: further families by name, each a module with ``cases()``, such as ``models``: they come last.
    """
    found: dict[str, Any] = {}
    for family, module in [*((family, module) for family, _, module in modules()), *(also or {}).items()]:
        if families and family not in families:
            continue
        for case in module.cases():
            object.__setattr__(case, "family", family)
            # one case may be quick on one kind of device only
            if device not in case.devices:
                continue
            if case.id in found:
                raise ValueError(f"two benchmark cases are called {case.id!r}")
            if (suite == "full" or case.suite == "quick") and match in case.id:
                found[case.id] = case
    return list(found.values())
