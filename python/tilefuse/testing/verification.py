"""Every op against its float64 oracle, driven by the registry and the sample inputs alone.

For each op of ``tilefuse.ops()`` and each of its samples (``tilefuse.testing.inputs.<family>.<op>``), on one device
and one forced backend:

* the **oracle** is the op itself on the reference backend with its floating-point operands widened to float64
  (FP8 codes and operands that the op wants in float32 stay: their values are exact anyway). Where the
  operands cannot be widened, ``out_dtype=torch.float64`` is tried.
* the **naive** result is the plain low-precision computation: ``NAIVE[op]`` of the samples' module, called like the
  op, or the reference backend with the result of each of its steps rounded to the main operand's dtype.
* floating-point outputs must pass ``error_report``'s rule; integer, bool and FP8 outputs must equal the
  reference backend's bit for bit, and so must all outputs of ops in the module's ``EXACT`` set.
* gradients of the arguments that the op calls differentiable are compared too, by ``gradient_report``.
* the kernel runs in poisoned memory, and twice: both runs must have the same bits.

The samples' module may define ``NAIVE: dict[op name, callable]``, ``EXACT: set[op name]``, ``ORACLE: dict[op name,
callable]`` (returns float64 outputs for the same arguments) and ``NOT_REPEATABLE: set[op name]``.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import backends, library
from .memory import poisoned
from .numeric import FACTOR, NOISE_ULPS, ErrorReport, assert_bit_equal, error_report
from .sample import Sample, samples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """How one op fared on one backend, over all of its samples."""

    op: str
    family: str
    backend: str
    device: str
    status: str  # "ok", "failed", "unavailable"
    samples: int
    gradients: int  # samples whose gradients were compared too
    worst: float  # largest ratio to naive's error seen; 2 is the limit
    kernels: tuple[str, ...]  # kernels that ran
    reason: str = ""
    seconds: float = 0.0
    complete: bool = True  # False when the time was up before every sample had its turn


def inputs_module(op_name: str) -> ModuleType:
    path = library.ops()[op_name].module.replace("/", ".")
    return importlib.import_module(f"{__package__}.inputs.{path}")


def _is_float(value: Any, one_byte: bool = False) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and (one_byte or value.dtype.itemsize > 1)


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def recast(function: Callable[..., Any], sample: Sample, dtype: torch.dtype) -> Sample | None:
    """The sample with its floating-point operands in another dtype, those left that the op takes in its own only.

    Which ones these are, the op's own checks say: TypeErrors name the argument. None if the op does not take
    its main operand in ``dtype``.
    """
    names = _names(function)
    main = next((i for i, a in enumerate(sample.args) if _is_float(a)), None)
    if main is None:
        return None
    # widening moves everything; another low precision moves what shares the main operand's dtype
    chosen = {
        i
        for i, a in enumerate(sample.args)
        if _is_float(a) and (dtype is torch.float64 or a.dtype is sample.args[main].dtype)
    }
    while main in chosen:
        args = tuple(a.to(dtype) if i in chosen else a for i, a in enumerate(sample.args))
        try:
            with torch.no_grad():
                library.trace_call(function, args, sample.kwargs)
            return Sample(args, sample.kwargs, sample.name)
        except (TypeError, ValueError) as error:
            named = re.match(r"tilefuse\.\w+: (\w+) must be", str(error))
            culprit = names.index(named.group(1)) if named and named.group(1) in names else None
            if culprit in chosen and culprit != main:
                chosen.discard(culprit)
            elif culprit not in chosen and len(chosen) > 1 and named:
                # "k must be of q's dtype" names the other one: those two stay together, so the rest goes
                chosen = {main}
            else:
                return None
    return None


class StepByStep(TorchDispatchMode):
    """Rounds what every ATen operation returns to a low precision: how a model computes whose tensors have that dtype.

    Kernel ops are entered, so that it is the steps of their reference implementations that are rounded.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "tilefuse" and (name := func._schema.name.split("::")[1]) in library.kernels():
            with self:
                return library.kernels()[name](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        return tree_map_only(Tensor, self._rounded if not func._schema.is_mutable else self._round_in_place, out)

    def _wide(self, x: Tensor) -> bool:
        return x.is_floating_point() and x.dtype.itemsize > self.dtype.itemsize

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype) if self._wide(x) else x

    def _round_in_place(self, x: Tensor) -> Tensor:
        return x.copy_(x.to(self.dtype)) if self._wide(x) else x


def _low_precision(sample: Sample) -> AbstractContextManager[Any]:
    """The step-by-step rounding that a sample's main operand asks for; nothing where that is float32."""
    main = next((a for a in sample.args if _is_float(a)), None)
    if main is None or main.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return StepByStep(main.dtype)


class _Call:
    """One op with one sample: outputs, mutated arguments and gradients on demand."""

    def __init__(self, op: library.Op, sample: Sample):
        self.op = op
        self.mutated = library.mutated_arguments(op.schema)
        self.differentiable = tuple(
            i
            for i, name in enumerate(_names(op.function)[: len(sample.args)])
            if name in op.differentiable and _is_float(sample.args[i])
        )

    def forward(self, function: Callable[..., Any], sample: Sample) -> list[Tensor]:
        args = tree_map_only(Tensor, torch.clone, sample.args)
        with torch.no_grad():
            out = function(*args, **sample.kwargs)
        outputs = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
        # an in-place op's result is what its arguments hold now
        return [args[i] for i in self.mutated] + (outputs if not self.mutated else _others(outputs, args))

    def gradients(
        self, function: Callable[..., Any], sample: Sample, upstream: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(gradients, the upstream gradients that were used)."""
        args = list(tree_map_only(Tensor, torch.clone, sample.args))
        for i in self.differentiable:
            args[i] = args[i].detach().requires_grad_()
        with torch.enable_grad():
            out = function(*args, **sample.kwargs)
            outputs = [o for o in tree_leaves(out) if isinstance(o, Tensor) and o.requires_grad]
            if upstream is None:
                generator = torch.Generator().manual_seed(1)
                upstream = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
            given = [u.to(o.dtype) for o, u in zip(outputs, upstream)]
            leaves = [args[i] for i in self.differentiable]
            found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)], list(upstream)


def _others(outputs: list[Tensor], args: Sequence[Any]) -> list[Tensor]:
    """Outputs that are not arguments."""
    given = {id(a) for a in args}
    return [o for o in outputs if id(o) not in given]


class _Failed(Exception):
    pass


def _oracle(op: library.Op, module: ModuleType, sample: Sample) -> tuple[Callable[..., Any], Sample] | None:
    """What gives float64 outputs for this sample, and on which operands; None if nothing does."""
    own = getattr(module, "ORACLE", {}).get(op.name)
    if own is not None:
        return own, sample
    wide = recast(op.function, sample, torch.float64)
    if wide is not None:
        return op.function, wide
    if "out_dtype" in _names(op.function):
        return op.function, Sample(sample.args, {**sample.kwargs, "out_dtype": torch.float64}, sample.name)
    return None


def _compare(
    got: Sequence[Tensor],
    same_dtype: Sequence[Tensor],
    exact: Sequence[Tensor] | None,
    naive: Sequence[Tensor],
    bits: bool,
    what: str,
) -> float:
    """Worst ratio to naive's error. Raises _Failed."""
    if len(got) != len(same_dtype):
        raise _Failed(f"{len(got)} {what}s, the reference has {len(same_dtype)}")
    worst = 0.0
    for i, (g, r) in enumerate(zip(got, same_dtype)):
        name = f"{what} {i}"
        if bits or not _is_float(g):
            try:
                assert_bit_equal(g, r, name=name)
            except AssertionError as error:
                raise _Failed(str(error)) from None
            continue
        plain = naive[i] if i < len(naive) else r
        if exact is not None:
            # statistics that stay float32 in the oracle were still computed in float64
            wide = exact[i].double()
            report = gradient_report(g, wide, plain) if what == "gradient" else error_report(g, wide, plain)
        else:
            # nothing exact to compare with: both may be off by their own rounding
            finite = r[r.isfinite()].abs()
            scale = finite.max().item() if finite.numel() else 0.0
            report = error_report(g, r.double(), plain, tiny=max(2**-20, 2 * torch.finfo(g.dtype).eps) * scale)
        if not report:
            raise _Failed(f"{name}: {report.message}")
        worst = max(worst, report.max_ratio, report.rms_ratio, report.row_ratio, report.tile_ratio)
    return worst


def gradient_report(out: Tensor, oracle: Tensor, naive: Tensor) -> ErrorReport:
    """``error_report`` for a gradient: the whole tensor's maximum and RMS by its rule, each row by a milder one.

    A row of a gradient may cancel to nothing, and it may be the sum of few terms, each a rounded number times a vector
    (an expert's weight gradient from few tokens): then all errors of the row are those few roundings, naive's may
    happen to be tiny, and the ratio of the two says nothing. So each row is also allowed the error of an unlucky naive
    row: twice naive's RMS error over the whole tensor, as it is and in proportion to the row, and at most the
    error of naive's worst row. Float32 noise is that of terms of order one.

    Args:
        out: the gradient of any floating dtype.
        oracle: float64 of the same shape.
        naive: the plain low-precision gradient.
    """
    finite = oracle[oracle.isfinite()].abs()
    terms = NOISE_ULPS * 2.0**-24 * max(1.0, finite.max().item() if finite.numel() else 0.0)
    report = error_report(out, oracle, naive, tiny=terms, rows=False)
    if not report or out.dim() == 0 or out.numel() == 0:
        return report

    def row_rms(x: Tensor) -> Tensor:
        difference = x.double().nan_to_num(0.0, 0.0, 0.0) - exact
        return difference.square().reshape(-1, out.shape[-1]).mean(1).sqrt()

    exact = oracle.nan_to_num(0.0, 0.0, 0.0)
    mine, theirs, rounding = row_rms(out), row_rms(naive), row_rms(oracle.to(out.dtype))
    scale = row_rms(torch.zeros_like(exact))
    typical, size = theirs.square().mean().sqrt(), scale.square().mean().sqrt()
    unlucky = 2 * torch.hypot(typical, typical / size * scale) if size > 0 else 2 * typical
    base = torch.maximum(torch.maximum(theirs, rounding), unlucky.clamp(max=theirs.max()))
    excess = (mine - terms).clamp(min=0)
    ratio = torch.where(excess == 0, 0.0, excess / base)
    worst = int(ratio.argmax())
    report = replace(report, row_ratio=float(ratio[worst]))
    if not (bad := ratio > FACTOR).any():
        return report
    found = f"worst {worst}: RMS error {mine[worst]:.3g}, allowed {FACTOR * base[worst] + terms:.3g}"
    return replace(report, passed=False, message=f"{int(bad.sum())} of {bad.numel()} rows, {found}")


def _check_sample(
    op: library.Op, module: ModuleType, sample: Sample, backend: str, repeat: bool
) -> tuple[float, bool, set[str]]:
    """(worst ratio, whether gradients were compared, kernels that ran). Raises _Failed."""
    call = _Call(op, sample)
    function = op.function
    naive_function = getattr(module, "NAIVE", {}).get(op.name)
    bits = op.name in getattr(module, "EXACT", ())

    with backends.backend("reference"):
        reference = call.forward(function, sample)
        oracle = None if bits else _oracle(op, module, sample)
        exact = call.forward(*oracle) if oracle else None
        with nullcontext() if naive_function else _low_precision(sample):
            naive = call.forward(naive_function or function, sample)
    with backends.backend(backend):
        ran = set(library.trace_call(function, sample.args, sample.kwargs))
        with poisoned():
            got = call.forward(function, sample)
        again = call.forward(function, sample) if repeat else None
    worst = _compare(got, reference, exact, naive, bits, "output")
    if again is not None:
        for i, (a, b) in enumerate(zip(got, again)):
            try:
                assert_bit_equal(a, b, name=f"output {i} of two runs")
            except AssertionError as error:
                raise _Failed(str(error)) from None

    if not call.differentiable or call.mutated:
        return worst, False, ran
    with backends.backend(backend), poisoned():
        got, upstream = call.gradients(function, sample)
        ran |= _backward_kernels(function, call, sample)
    with backends.backend("reference"):
        reference, _ = call.gradients(function, sample, upstream)
        exact = call.gradients(*oracle, upstream)[0] if oracle and oracle[0] is function else None
        with nullcontext() if naive_function else _low_precision(sample):
            naive = call.gradients(naive_function or function, sample, upstream)[0]
    return max(worst, _compare(got, reference, exact, naive, bits, "gradient")), True, ran


def _backward_kernels(function: Callable[..., Any], call: _Call, sample: Sample) -> set[str]:
    def run(*args: Any, **kwargs: Any) -> None:
        given = [a.detach().requires_grad_() if i in call.differentiable else a for i, a in enumerate(args)]
        with torch.enable_grad():
            out = function(*given, **kwargs)
            outputs = [o for o in tree_leaves(out) if isinstance(o, Tensor) and o.requires_grad]
            leaves = [given[i] for i in call.differentiable]
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)

    return set(library.trace_call(run, sample.args, sample.kwargs))


def _chosen(
    op: library.Op, device: torch.device, limit: int | None, all_dtypes: bool
) -> list[tuple[str, Callable[[], Sample | None], bool]]:
    """(name, sample or None, whether it is one of the module's own): evenly spread where there is a limit.

    Samples cast to the other dtypes come after all of the module's own.
    """
    found = list(samples(op.name, device))
    if limit is not None and len(found) > limit:
        found = [found[round(i * (len(found) - 1) / (limit - 1))] for i in range(limit)]
    named = [(sample.name or f"sample {i}", sample) for i, sample in enumerate(found)]
    out: list[tuple[str, Callable[[], Sample | None], bool]] = []
    for name, sample in named:
        out.append((name, lambda sample=sample: sample, True))
    for dtype in DTYPES if all_dtypes else ():
        for name, sample in named:
            main = next((a for a in sample.args if _is_float(a)), None)
            if main is not None and main.dtype in DTYPES and main.dtype is not dtype:
                label = f"{name} in {str(dtype).removeprefix('torch.')}"
                out.append((label, lambda sample=sample, dtype=dtype: recast(op.function, sample, dtype), False))
    return out


def check_op(
    op_name: str,
    device: torch.device | str = "cpu",
    backend: str = "reference",
    *,
    limit: int | None = None,
    all_dtypes: bool = False,
    repeat: bool = True,
    seconds: float = math.inf,
) -> Check:
    """Checks one op on one backend. Never raises for what the op does.

    Args:
        op_name: listed in ``tilefuse.ops()``.
        device: where the samples live.
        backend: forced for the kernel under test.
        limit: at most this many samples, evenly spread (at least 2).
        all_dtypes: also check each sample in the other standard dtypes that the op takes.
        repeat: run twice and compare bits.
        seconds: begin no further sample after this time.
    """
    op, device = library.ops()[op_name], torch.device(device)
    began = time.perf_counter()
    count = gradients = 0
    worst, ran, problems, refused = 0.0, set(), [], ""
    try:
        module = inputs_module(op_name)
        chosen = _chosen(op, device, limit, all_dtypes)
    except Exception as error:
        return Check(op_name, op.family, backend, str(device), "failed", 0, 0, 0.0, (), _short(error))
    repeat = repeat and op_name not in getattr(module, "NOT_REPEATABLE", ())
    skipped, complete = 0, True
    for name, make, own in chosen:
        if time.perf_counter() - began > seconds:
            skipped += 1
            complete &= not own
            continue
        try:
            sample = make()
            if sample is None:
                continue
            ratio, with_gradients, kernels = _check_sample(op, module, sample, backend, repeat)
        except NotImplementedError as error:
            # a forced backend may refuse single calls (a shape it is not made for); none at all is another matter
            refused = _short(error)
            continue
        except _Failed as error:
            problems.append(f"{name}: {error}")
        except Exception as error:
            problems.append(f"{name}: {_short(error)}")
        else:
            worst = max(worst, ratio)
            gradients += with_gradients
            ran |= kernels
        count += 1
    status = "failed" if problems else "ok" if count else "unavailable"
    reason = f"{skipped} samples left out after {seconds:.0f} s" if skipped else "" if count else refused
    if problems:
        reason = problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
    took = round(time.perf_counter() - began, 2)
    return Check(
        op_name,
        op.family,
        backend,
        str(device),
        status,
        count,
        gradients,
        round(worst, 3),
        tuple(sorted(ran)),
        reason or ("" if count else "no sample inputs"),
        took,
        complete,
    )


def _short(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:400]
