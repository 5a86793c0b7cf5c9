"""What the gate compiles: calls of ops, and the launches that they make on a fake GPU."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ... import arch, library

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "i32": torch.int32,
    "i64": torch.int64,
}


@dataclass(frozen=True)
class Spec:
    """A tensor that exists only while its case is recorded."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def make(self, device: str) -> torch.Tensor:
        if self.strides is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


def tensor(dtype: str, *shape: int, strides: tuple[int, ...] | None = None) -> Any:
    """A tensor argument of a case, contiguous unless it has ``strides``; ``dtype`` is as Triton writes it."""
    return Spec(_DTYPES[dtype], shape, strides)


@dataclass(frozen=True)
class Call:
    """A function and its arguments, tensors as ``Spec``. ``kind``: see ``call``, ``train`` and ``launch``."""

    kind: str
    function: str | Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    outputs: int | None = None

    def __call__(self) -> None:
        device = "cpu" if self.kind == "train" else "cuda"
        args, options = tree_map_only(Spec, lambda s: s.make(device), (self.args, dict(self.options)))
        if not isinstance(self.function, str):
            self.function(*args, **options)
            return
        op = library.ops()[self.function]
        if self.kind == "call":
            op.function(*args, **options)
            return
        names = dict(zip(inspect.signature(op.function).parameters, args)) | options
        inputs = [x for name in op.differentiable for x in tree_leaves(names.get(name)) if x is not None]
        for x in inputs:
            x.requires_grad_()
        out = [x for x in tree_leaves(op.function(*args, **options)) if x.requires_grad][: self.outputs]
        torch.autograd.grad(out, inputs, [torch.empty_like(x) for x in out])


def call(op: str, *args: Any, **options: Any) -> Call:
    """A call of a public op; its kernels are recorded."""
    return Call("call", op, args, options)


def train(op: str, *args: Any, outputs: int | None = None, **options: Any) -> Call:
    """A call of a public op and its backward, with a gradient for the first ``outputs`` outputs; None is all."""
    return Call("train", op, args, options, outputs)


def launch(function: Callable[..., Any], *args: Any, **options: Any) -> Call:
    """A direct call of a function that launches kernels."""
    return Call("launch", function, args, options)


@dataclass(frozen=True)
class AotCase:
    """One call, whose kernels are compiled.

    Args:
        name: unique within the module; with a kernel's name it is the key of the baseline.
        run: what ``call``, ``train`` or ``launch`` returned.
        targets: architectures to compile for; None is all of ``arch.COMPILE_TARGETS``.
        expect: instructions that each kernel must have on NVIDIA targets, or a mapping from kernels and targets to
            them; a kernel's entry goes before a target's, and ``"nvidia"`` is every NVIDIA target that has none.
            ``"LDG.128"`` and ``"STG.128"`` mean a 128-bit access (or a bulk copy), ``"MMA"`` the matrix unit,
            anything else a mnemonic's start (``"HGMMA"``); ``"HGMMA|QGMMA"`` takes either.
        allow_spill: the reason why this case may spill; it is then only compared with its baseline.
    """

    name: str
    run: Callable[[], Any]
    targets: Sequence[str] | None = None
    expect: Sequence[str] | Mapping[str, Sequence[str]] = ()
    allow_spill: str | None = None

    def expected(self, kernel: str, target: str) -> tuple[str, ...]:
        """Instructions that one kernel must have on one target."""
        nvidia = ("nvidia",) if target.startswith("sm_") else ()
        if not isinstance(self.expect, Mapping):
            return tuple(self.expect) if nvidia else ()
        for name in (*((kernel,) if nvidia else ()), target, *nvidia):
            if name in self.expect:
                return tuple(self.expect[name])
        return ()

    def check(self) -> None:
        """Raises ValueError for targets that do not exist."""
        unknown = set(self.targets or ()) - set(arch.COMPILE_TARGETS)
        if unknown:
            raise ValueError(f"aot case {self.name}: targets must be of {arch.COMPILE_TARGETS}, got {sorted(unknown)}")


def modules(family: str | None = None, op: str | None = None) -> Iterator[tuple[str, str, Any]]:
    """(family, op, module) of every Triton module, or of one family's or one op's."""
    from ... import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

    for info in pkgutil.walk_packages(triton_kernels.__path__, triton_kernels.__name__ + "."):
        parts = info.name.removeprefix(triton_kernels.__name__ + ".").split(".")
        if len(parts) == 2 and parts[0] != "common" and family in (None, parts[0]) and op in (None, parts[1]):
            yield parts[0], parts[1], importlib.import_module(info.name)


def from_file(path: str) -> Iterator[tuple[str, str, Any]]:
    """The same of a Python file, in a family called ``file``; one of a package is imported as its module."""
    from ... import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

    file = Path(path).resolve()
    folder, names = file.parent, [file.stem]
    # this package's kernels lie in a folder that no parent package holds
    known = {Path(where).resolve(): triton_kernels.__name__ for where in triton_kernels.__path__}
    while folder not in known and (folder / "__init__.py").exists():
        names.insert(0, folder.name)
        folder = folder.parent
    if folder in known:
        names.insert(0, known[folder])
    if len(names) > 1:
        sys.path.insert(0, str(folder))
        yield "file", file.stem, importlib.import_module(".".join(names))
        return
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield "file", spec.name, module


def launched(module: Any) -> dict[str, Any]:
    """The JIT functions that a module launches, by their ``kernel[grid](...)`` calls."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        ):
            value = getattr(module, node.func.value.id, None)
            if value is not None and type(value).__module__.startswith("triton."):
                found[node.func.value.id] = value
    return found


def cases(module: Any) -> list[AotCase]:
    """The cases of one module, checked."""
    listed: list[AotCase] = list(getattr(module, "aot_cases", tuple)())
    if repeated := [name for name, count in Counter(case.name for case in listed).items() if count > 1]:
        raise ValueError(f"{module.__name__}: aot cases must have different names, got {repeated} more than once")
    for case in listed:
        case.check()
    return listed
