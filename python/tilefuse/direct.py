"""Repeated calls of a public op go to its CPU kernel without the op's Python.

What an op's function does with a call follows from the call's key: shapes, strides and dtypes of its tensors, which of
them are one object, its plain values and, where the op writes, the distances between tensors whose memory meets. A
``Replay`` of the compiled module ``_direct`` (``csrc/python/direct.cpp``) stands in front of the function and lets it
have every call until a key comes for the second time. That call is recorded here. If all that the function did was to
look at the key and to call one kernel of the CPU library, its plan is kept, and calls of that key repeat it: the checks
have passed and the backend is chosen. Contents of tensors are in no key, so a function that reads them is not repeated;
kernels check them in every call. A call that a kernel refuses is handed to the function, which raises the error.

The function has every call that is not plain: where a gradient or a tangent is needed, under modes, transforms,
tracing, autocast and the profiler, with subclasses, on other devices. Without the module it has them all.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from . import backends, native

if TYPE_CHECKING:
    from .library import Kernel

__all__: list[str] = []

_C: Any = torch._C
# each returns something true where a call is not plain
_MODES = (
    _C._is_any_autocast_enabled,
    _C._len_torch_dispatch_stack,
    _C._len_torch_function_stack,
    _C._functorch.peek_interpreter_stack,
    _C._autograd._profiler_enabled,
)
# what a key answers
_KEY = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cpu", "is_cuda")
        ),
        *(
            getattr(Tensor, name)
            for name in (
                "size",
                "stride",
                "dim",
                "numel",
                "element_size",
                "is_contiguous",
                "is_floating_point",
                "get_device",
                "__len__",
                # tensors without memory have no key
                "_is_zerotensor",
            )
        ),
    ]
)
# a key also tells whether these return the tensor itself
_ITSELF = frozenset([Tensor.contiguous, Tensor.to])
# types of a kernel's plain arguments, and their codes
_ARGUMENTS = {"int": "i", "bool": "b", "float": "f", "str": "s", "ScalarType": "d", "Optional[List[int]]": "l"}


class _Recorder(TorchFunctionMode):
    """Notes the kernels that a function calls, and whether it asks its tensors for anything that is not in the key."""

    def __init__(self, kernels: Mapping[str, Kernel], writes: bool):
        self.kernels = kernels
        self.calls: list[tuple[Kernel, tuple[Any, ...], Any]] = []
        # the same memory without its gradient, which a call that is repeated does not need
        self.detached: list[tuple[Tensor, Tensor]] = []
        # distances are in the key of an op that writes, and addresses serve for nothing else
        self.known = _KEY | {Tensor.data_ptr} if writes else _KEY
        self.plain = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::") if isinstance(func, torch._ops.OpOverload) else ("", "", "")
        if space == "tilefuse" and name in self.kernels and not kwargs:
            self.calls.append((self.kernels[name], args, result))
        elif func is Tensor.detach:
            self.detached.append((result, args[0]))
        elif func not in self.known and not (func in _ITSELF and result is args[0]):
            self.plain = False
        return result

    def plan(self, inputs: tuple[Any, ...], result: Any) -> tuple[Any, ...] | None:
        """What ``_direct`` repeats, or None where the function did anything else."""
        if not self.plain or len(self.calls) != 1:
            return None
        kernel, args, returned = self.calls[0]
        if not self._on_cpu(kernel, args):
            return None
        outputs = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        tensors: dict[int, int] = {}
        for value in inputs:
            if isinstance(value, Tensor):
                tensors.setdefault(id(value), len(tensors))
        read = dict(tensors)
        for view, of in self.detached:
            if id(of) in read:
                read[id(view)] = read[id(of)]
        arguments = []
        for value, argument in zip(args, torch._C.parse_schema(kernel.schema).arguments):
            item = _argument(value, str(argument.real_type), read)
            if item is None:
                return None
            arguments.append(item)
        results = []
        produced = {id(output): i for i, output in enumerate(outputs)}
        for value in result if type(result) is tuple else (result,):
            if id(value) in produced:
                results.append(("k", produced[id(value)]))
            elif id(value) in tensors:
                results.append(("t", tensors[id(value)]))
            elif value is None:
                results.append(("n", 0))
            else:
                return None
        written = tuple(tensors[id(args[i])] for i in kernel.mutated if args[i] is not None)
        name = f"tilefuse_cpu::{kernel.name}"
        return name, tuple(arguments), len(outputs), tuple(results), type(result) is tuple, written

    def _on_cpu(self, kernel: Kernel, args: tuple[Any, ...]) -> bool:
        """Whether the kernel ran on the CPU library, and the choice follows from the key."""
        first = args[kernel.dtype_arg]
        for backend in kernel.choices(first.device, first.dtype)[0]:
            when = kernel.when.get(backend)
            with self:
                refused = None if when is None else when(*args)
            if refused is None:
                return backend == "cpu" and self.plain
        return False


def _argument(value: Any, kind: str, tensors: Mapping[int, int]) -> tuple[str, Any] | None:
    """A kernel's argument as ``_direct`` takes it: a code of its type, and a value or the position of a tensor."""
    if value is None:
        return "n", 0
    if isinstance(value, Tensor):
        # one that the function made is not the call's
        at = tensors.get(id(value))
        return None if at is None else ("t" if kind == "Tensor" else "o", at)
    code = _ARGUMENTS.get(kind)
    if code == "d":
        # from which the number of the dtype is read
        value = torch.empty(0, dtype=value)
    return None if code is None else (code, tuple(value) if code == "l" else value)


@functools.cache
def load() -> native.Library:
    """Loads the compiled module once. Never raises: ``Library.missing`` says why calls are not repeated."""
    path = Path(__file__).with_name("_direct.abi3.so")
    if not path.exists():
        return native.Library(
            "direct", path, f"{path.name} was not built (needs g++, ninja, torch and Python's headers)"
        )
    try:
        samples = (torch.empty(2, 3), nn.Parameter(torch.empty(2)), torch.empty(0, dtype=torch.int32))
        importlib.import_module("tilefuse._direct").setup(
            Tensor,
            nn.Parameter,
            torch.dtype,
            Tensor.requires_grad,
            _MODES,
            _C.is_grad_enabled,
            _C._increment_version,
            vars(forward_ad),
            vars(backends),
            samples,
        )
    except (ImportError, AttributeError) as error:
        # what it asks of torch beyond the stable ABI may be another in a later version
        return native.Library("direct", path, f"{path.name} cannot be loaded: {error}")
    return native.Library("direct", path, None)


def replayed(function: Callable[..., Any], kernels: Mapping[str, Kernel], writes: bool) -> Any:
    """The ``Replay`` in front of a public op's function; the compiled module is there."""

    def record(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[Any, tuple[Any, ...] | None]:
        kwargs = kwargs or {}
        with _Recorder(kernels, writes) as recorder:
            result = function(*args, **kwargs)
        return result, recorder.plan((*args, *kwargs.values()), result)

    return importlib.import_module("tilefuse._direct").Replay(function, record, writes)
