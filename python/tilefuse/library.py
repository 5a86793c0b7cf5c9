"""How an op is defined, faked, dispatched and listed.

Two kinds of ops are registered in the ``tilefuse`` namespace of torch:

* a **kernel op** (``rope_fwd``, ``rope_bwd``): not differentiable, one implementation per backend, a fake.
  ``kernel(...)`` defines it; its implementations live at the op's path in each layer (below).
* a **public op** (``rope``): composite. ``@op(...)`` registers the documented Python function as
  ``torch.ops.tilefuse.<name>``; it checks its arguments and calls kernel ops, through an
  ``autograd.Function`` when a gradient is needed.

A schema is written once. That of a kernel op is also that of ``tilefuse_cpu::<name>`` and ``tilefuse_cuda::<name>``,
for which the compiled libraries register implementations alone; that of a public op follows from its function's
signature. The kernel ops have no default values in their schemas: torch's dispatcher drops trailing arguments that
equal a default.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import arch, backends, direct, native
from .backends import Candidate
from .packing import Weight

Function = TypeVar("Function", bound=Callable[..., Any])
FunctionClass = TypeVar("FunctionClass", bound=type[torch.autograd.Function])

LIBRARY = torch.library.Library("tilefuse", "FRAGMENT")
STANDARD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_kernels: dict[str, Kernel] = {}
_ops: dict[str, Op] = {}
# while `explain` traces a call, kernels of that thread note themselves and their arguments in `calls`;
# `in_forward` tells the forward of a Function from a user's no_grad
_trace = threading.local()
# what eager calls ask each time, bound once; torch's stubs lack some of it
_C: Any = torch._C
_autocast_on = _C._is_any_autocast_enabled
_compiling = torch.compiler.is_compiling
_compiled = torch.compiler.is_dynamo_compiling
_dispatch_modes = _C._len_torch_dispatch_stack
_function_modes = _C._len_torch_function_stack
_transforms = _C._functorch.peek_interpreter_stack
_profiling = _C._autograd._profiler_enabled


@dataclass(frozen=True)
class Op:
    """What ``tilefuse.ops()`` tells about an op."""

    name: str
    family: str
    module: str  # path of the op below each layer, such as "rope/rope_qk"
    schema: str
    kernels: tuple[str, ...]
    differentiable: tuple[str, ...]  # arguments that receive gradients
    dtypes: tuple[torch.dtype, ...]
    function: Callable[..., Any] = field(repr=False, compare=False)
    not_repeated: str | None = None  # why eager calls on the CPU are not repeated without Python

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that implement every kernel of this op; an op of plain PyTorch calls has no other."""
        if not self.kernels:
            return ("reference",)
        lists = [_kernels[k].backends for k in self.kernels]
        return tuple(b for b in backends.BACKENDS if all(b in names for names in lists))

    @property
    def architectures(self) -> Mapping[str, tuple[str, ...]]:
        """backend -> architectures that a real GPU of that kind has verified."""
        found: dict[str, tuple[str, ...]] = {}
        for name in ("triton", "cuda"):
            if name in self.backends:
                found[name] = tuple(
                    a
                    for a, kernels in backends.verified().items()
                    if all(name in kernels.get(k, ()) for k in self.kernels)
                )
        return MappingProxyType(found)


class Kernel:
    """A kernel op: one schema, a fake, and an implementation per backend, found by convention.

    ==========  =====================================================================================
    reference   ``tilefuse/reference/<module>.py``, function ``<name>``
    cpu         ``torch.ops.tilefuse_cpu.<name>``, registered by ``csrc/<module>_cpu.cpp``
    triton      ``triton_kernels/<module>.py``, function ``<name>``
    cuda        ``torch.ops.tilefuse_cuda.<name>``, registered by ``csrc/<module>.cu`` or ``<module>_sm90.cu``
    ==========  =====================================================================================

    All take the schema's arguments positionally. ``when[backend](*args)`` may refuse a call by returning a
    reason; it must only look at shapes, dtypes, strides, addresses and plain values.
    """

    def __init__(
        self,
        schema: str,
        module: str,
        names: tuple[str, ...],
        dtypes: Mapping[str, tuple[torch.dtype, ...]],
        when: Mapping[str, Callable[..., str | None]],
        dtype_arg: int,
        linear: Sequence[str],
    ):
        self.schema = schema
        self.name = schema.split("(", 1)[0]
        self.module = module
        self.backends = names
        self.dtypes = dtypes
        self.when = when
        self.dtype_arg = dtype_arg
        self.arguments = tuple(a.name for a in torch._C.parse_schema(schema).arguments)
        self.mutated = mutated_arguments(schema)
        self.linear = tuple(linear)
        # the autograd.Function that differentiates this kernel, see `gradient_of`
        self.gradient: type[torch.autograd.Function] | None = None
        # (generation of the setting, (device index, dtype) -> implementations in order of preference); replaced as
        # one object, so that another thread never sees choices of an older setting
        self._cache: tuple[int, dict[tuple[int, torch.dtype], list[tuple[str, Any, Any]]]] = (-1, {})

    def implementation(self, name: str) -> tuple[Callable[..., Any] | None, str | None]:
        """The callable of one backend, or the reason why it is not there."""
        if name in ("cpu", "cuda"):
            return native.find(name, self.schema)
        if name == "triton" and (missing := backends.triton_missing()):
            return None, missing
        layer = "reference" if name == "reference" else "triton_kernels"
        module = importlib.import_module(f"tilefuse.{layer}.{self.module.replace('/', '.')}")
        return getattr(module, self.name), None

    def choices(self, device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
        """``backends.pick`` for this kernel, this device and this process."""
        on = arch.of(device)
        decide = partial(
            backends.pick,
            requested=backends.backend(),
            device=device.type,
            arch=on,
            dtype=dtype,
            verified_backends=backends.verified().get(on, {}).get(self.name, ()),
            interpret=backends.interpreting(),
        )
        # only what could run is looked up: importing Triton takes a second that a CPU user need not wait
        possible, _ = decide([Candidate(b, dtypes=self.dtypes.get(b)) for b in self.backends])
        return decide(
            [
                Candidate(b, self.implementation(b)[1] if b in possible else None, self.dtypes.get(b))
                for b in self.backends
            ]
        )

    def __call__(self, *args: Any) -> Any:
        first = args[self.dtype_arg]
        generation, cached = self._cache
        if generation != backends.generation:
            cached = {}
            self._cache = (backends.generation, cached)
        key = (first.get_device(), first.dtype)
        choices = cached.get(key)
        if choices is None:
            usable, reasons = self.choices(first.device, first.dtype)
            if not usable:
                raise self._unavailable(first, reasons)
            choices = cached[key] = [(b, self.implementation(b)[0], self.when.get(b)) for b in usable]
        for _, run, when in choices:
            if when is None or when(*args) is None:
                try:
                    if _autocast_on():
                        # autocast must not reach the PyTorch calls inside an implementation
                        with torch.amp.autocast("cpu", enabled=False), torch.amp.autocast("cuda", enabled=False):
                            return run(*args)
                    return run(*args)
                except RuntimeError as error:
                    # C++ on the stable ABI can only raise RuntimeError; "tilefuse.op: x must be .." is about a value, a
                    # launch that failed is not
                    message = str(error)
                    if message.startswith("tilefuse.") and " must be " in message and type(error) is RuntimeError:
                        raise ValueError(message) from None
                    raise
        # another thread may have changed the setting meanwhile: what refused is what was tried
        _, reasons = self.choices(first.device, first.dtype)
        raise self._unavailable(first, reasons | {b: when(*args) for b, _, when in choices if when is not None})

    def _unavailable(self, first: Tensor, reasons: Mapping[str, str | None]) -> NotImplementedError:
        lines = "; ".join(f"{b}: {reason}" for b, reason in reasons.items())
        return NotImplementedError(
            f"tilefuse.{self.name}: no backend for {first.device} ({arch.of(first.device)}): {lines}"
        )


def kernel(
    schema: str,
    *,
    module: str,
    fake: Callable[..., Any],
    backends: Sequence[str] = ("reference", "cpu", "triton"),
    dtypes: Mapping[str, tuple[torch.dtype, ...]] | None = None,
    when: Mapping[str, Callable[..., str | None]] | None = None,
    dtype_arg: int = 0,
    linear: Sequence[str] = (),
) -> Callable[..., Any]:
    """Defines a kernel op and returns the function that calls it.

    ``torch.ops.tilefuse.<name>`` is the op; the returned function calls it too, except in plain eager mode, where it
    goes to the implementation directly: the dispatcher costs more than a small kernel.

    Args:
        schema: torch schema with name and without default values; mutated arguments marked ``Tensor(a!)``.
        module: path of the op below each layer, ``<family>/<op>``.
        fake: shapes, dtypes and strides of the outputs, the arguments taken positionally.
        backends: those that implement this kernel.
        dtypes: backend -> dtypes it takes, for the argument at ``dtype_arg`` (all dtypes when absent). The
            compiled backends default to float32, bfloat16 and float16.
        when: backend -> predicate that refuses a call with a reason.
        dtype_arg: position of the tensor whose device and dtype choose the backend.
        linear: for forward mode, the terms of the tangent. Each is a string of argument names that are replaced by
            their tangents; ``-name`` leaves an argument out. ``("q k",)``: linear in both together, ``("a -bias",
            "b bias")``: the product of a and b, plus bias. A tangent of any other argument is refused.
    """
    limits = {b: STANDARD_DTYPES for b in backends if b != "reference"} | dict(dtypes or {})
    entry = Kernel(schema, module, tuple(backends), limits, dict(when or {}), dtype_arg, linear)
    name = entry.name
    _kernels[name] = entry

    def traced_fake(*args: Any) -> Any:
        calls = getattr(_trace, "calls", None)
        if calls is not None:
            calls.append((entry, args))
        return fake(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # the bound method: calling an instance goes through a slot that costs 0.2 us
    run = _bumping_versions(entry) if entry.mutated else entry.__call__
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"tilefuse::{name}", traced_fake, lib=LIBRARY)
    overload = getattr(torch.ops.tilefuse, name).default

    def below_autograd(*args: Any) -> Any:
        first = args[dtype_arg]
        if type(first) is Tensor and not first.is_meta and not _dispatch_modes() and _transforms() is None:
            return run(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def call(*args: Any) -> Any:
        if _compiling():
            return overload(*args)
        args = _with_memory(args)
        first = args[dtype_arg]
        # fake and meta tensors, subclasses, modes, transforms, tracing, profiling and forward mode need the dispatcher
        if (
            type(first) is Tensor
            and not first.is_meta
            and not _dispatch_modes()
            and not _function_modes()
            and _transforms() is None
            and not _profiling()
            and forward_ad._current_level < 0
        ):
            return run(*args)
        return overload(*args)

    LIBRARY.impl(name, partial(_differentiated, entry, overload, below_autograd), "Autograd")
    call.__name__ = call.__qualname__ = name
    return call


def _with_memory(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with ordinary zeros in place of tensors of zeros that have no memory, as tangents can be.

    The dispatcher would hand kernels one zero with strides of 0, past the check that rows are contiguous.
    """
    # a loop: any() over a generator costs three times as much
    for a in args:
        if type(a) is Tensor and a._is_zerotensor():
            return tuple(a.clone() if isinstance(a, Tensor) and a._is_zerotensor() else a for a in args)
    return args


def mutated_arguments(schema: str) -> tuple[int, ...]:
    """Positions of the arguments that a schema marks as written to."""
    arguments = torch._C.parse_schema(schema).arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _bumping_versions(entry: Kernel) -> Callable[..., Any]:
    """Autograd notices a change of a saved tensor by its version, which C++ on the stable ABI cannot raise."""

    def run(*args: Any) -> Any:
        result = entry(*args)
        for i in entry.mutated:
            if args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return result

    return run


def gradient_of(kernel: Callable[..., Any]) -> Callable[[FunctionClass], FunctionClass]:
    """Decorates the ``autograd.Function`` that differentiates a kernel op and takes the same arguments.

    Eager calls apply it themselves; ``torch.func.grad`` and ``vjp``, eager and compiled, find it here.
    """

    def register(function: FunctionClass) -> FunctionClass:
        _kernels[kernel.__name__].gradient = function
        return function

    return register


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the ``backward`` of an ``autograd.Function``: differentiating its results raises.

    Unlike torch's decorator it also does where what they depend on is a saved tensor alone: the upstream gradient of
    a gradient penalty is a constant.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> Any:
        # under transforms the kernels inside refuse for themselves, at each level
        if _compiling() or not torch.is_grad_enabled() or _transforms() is not None:
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        op = backward.__module__.split(".")[-1]
        message = (
            f"tilefuse.{op}: the op is differentiable once, and this is a second derivative; "
            "take that of plain PyTorch (a patched model's after unpatch(model))"
        )
        return _refuse(message, (*upstream, *ctx.saved_tensors), gradients)

    return wrapper


class _Refused(torch.autograd.Function):
    """The identity, whose derivative raises, in the ``inputs`` first tensors too."""

    @staticmethod
    def forward(ctx: Any, message: str, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        with torch._C._AutoDispatchBelowAutograd(), _recording():
            return tuple(t.view_as(t) for t in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ctx.message)


@contextmanager
def _recording() -> Iterator[None]:
    """For the levels below that of a ``Function.forward``, which has switched off the derivatives of all levels."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` at one level of torch.func's transforms."""
    before, _trace.in_forward = getattr(_trace, "in_forward", False), True
    try:
        with enable_single_level_autograd_function():
            # past the check that keeps Functions without setup_context from transforms
            base: Any = super(torch.autograd.Function, function)
            return base.apply(*args)
    finally:
        _trace.in_forward = before


def _refuse(message: str, inputs: Sequence[Any], outputs: Any) -> Any:
    """The same outputs, but differentiating them raises if any of the inputs requires grad."""
    # all of them: a derivative in one does not pass the others
    anchors = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not anchors:
        return outputs
    listed = outputs if isinstance(outputs, tuple) else (outputs,)
    at = [i for i, t in enumerate(listed) if isinstance(t, Tensor) and t.is_floating_point()]
    marked = list(listed)
    for i, t in zip(at, _apply(_Refused, message, len(anchors), *anchors, *(listed[i] for i in at))):
        marked[i] = t
    return tuple(marked) if isinstance(outputs, tuple) else marked[0]


def _differentiated(entry: Kernel, overload: Any, below_autograd: Callable[..., Any], *args: Any) -> Any:
    """What a kernel op does at the Autograd key: every derivative is right or refused."""
    args = _with_memory(args)
    if forward_ad._current_level >= 0:
        duals = [torch._VF._unpack_dual(a, level=0) if isinstance(a, Tensor) else (a, None) for a in args]
        if any(tangent is not None for _, tangent in duals):
            return _pushed_forward(entry, overload, *zip(*duals))
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        if entry.mutated:
            raise NotImplementedError(f"tilefuse.{entry.name}: works in place and has no derivative")
        if entry.gradient is None:
            return _refuse(f"tilefuse.{entry.name}: has no derivative", args, below_autograd(*args))
        # its forward comes here again, with grad mode off
        return _apply(entry.gradient, *args)
    if getattr(_trace, "in_forward", False):
        _trace.in_forward = False
        try:
            with _recording():
                return below_autograd(*args)
        finally:
            _trace.in_forward = True
    return below_autograd(*args)


def _pushed_forward(entry: Kernel, overload: Any, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The dual outputs of a kernel that is linear in each argument that has a tangent."""
    terms = [term.split() for term in entry.linear]
    given = {name: t for name, t in zip(entry.arguments, tangents) if t is not None}
    for name in given:
        if not any(name in term for term in terms):
            raise NotImplementedError(f"tilefuse.{entry.name}: {name} has no forward-mode derivative")
    total: list[Any] = []
    for term in terms:
        if given.keys().isdisjoint(term):
            continue
        call = dict(zip(entry.arguments, primals))
        for name in term:
            if name.startswith("-"):
                call[name[1:]] = None
            elif call[name] is not None:
                call[name] = given[name] if name in given else torch.zeros_like(call[name])
        part = overload(*call.values())
        part = part if isinstance(part, tuple) else (part,)
        total = [*part] if not total else [a + b for a, b in zip(total, part)]
    out = overload(*primals)
    if isinstance(out, tuple):
        return tuple(forward_ad.make_dual(o, t) for o, t in zip(out, total))
    return forward_ad.make_dual(out, total[0])


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under ``torch.autocast``, the float32, bfloat16 and float16 tensors in its dtype; otherwise as they came.

    For public ops that PyTorch would run in the autocast dtype (matrix products, attention)::

        x, weight = library.autocast(x, weight)

    Kernels themselves always run with autocast switched off.
    """
    if not _autocast_on():
        return tensors
    return tuple(
        t.to(torch.get_autocast_dtype(t.device.type))
        if t is not None and t.dtype in STANDARD_DTYPES and torch.is_autocast_enabled(t.device.type)
        else t
        for t in tensors
    )


def takes_operations(x: Tensor) -> bool:
    """Whether a call had better be PyTorch operations than a kernel: transforms derive them, Inductor fuses them.

    For public ops that are a few operations anyway and whose only compiled kernel is the CPU's.
    """
    if _compiling():
        return x.device.type != "cpu"
    return _transforms() is not None or forward_ad._current_level >= 0


# annotation of a public op's argument -> its type in a schema. Sizes stay symbolic, so every int may be a symbol
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Weight: "Tensor",
    # a number as well, but for torch.ops
    Tensor | float | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    int: "SymInt",
    bool: "bool",
    float: "float",
    float | None: "float?",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


def signature_schema(function: Callable[..., Any], mutates: Sequence[str] = ()) -> str:
    """The torch schema of a function: its name, arguments, types and defaults.

    Arguments named in ``mutates`` are marked as written to. A function whose name ends in ``_`` returns them, which a
    schema cannot say: there it returns nothing.
    """
    hints = get_type_hints(function)
    arguments = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _SCHEMA_TYPES[hints[name]]
        if name in mutates:
            kind = f"Tensor({chr(ord('a') + mutates.index(name))}!)"
        default = parameter.default
        if isinstance(default, torch.dtype):
            default = str(default).removeprefix("torch.")
        elif default is not parameter.empty:
            default = repr([*default] if isinstance(default, tuple) else default)
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        arguments.append(f"{kind} {name}" if default is parameter.empty else f"{kind} {name}={default}")
    returns = hints["return"]
    if function.__name__.endswith("_") or returns is type(None):
        result = "()"
    elif returns is Tensor:
        result = "Tensor"
    else:
        result = f"({', '.join(_SCHEMA_TYPES[part] for part in get_args(returns))})"
    return f"{function.__name__}({', '.join(arguments)}) -> {result}"


def op(
    *,
    module: str,
    kernels: Sequence[str],
    mutates: Sequence[str] = (),
    differentiable: Sequence[str] = (),
    dtypes: tuple[torch.dtype, ...] = (*STANDARD_DTYPES, torch.float64),
    not_repeated: str | None = None,
) -> Callable[[Function], Function]:
    """Registers the decorated Python function as ``torch.ops.tilefuse.<name>`` and lists it in ``ops()``.

    Eager calls on the CPU that repeat an earlier one go to its kernel without the function (see ``direct``).

    Args:
        module: path of the op below each layer, ``<family>/<op>``.
        kernels: the kernel ops that it calls, gradients included.
        mutates: arguments that it writes to.
        differentiable: arguments that receive gradients.
        dtypes: those it takes on some backend.
        not_repeated: why each call is the function's (see ``direct``), such as several kernels in one; an op without
            kernels needs no reason.
    """

    def register(function: Function) -> Function:
        schema = signature_schema(function, mutates)

        def composite(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)

        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = function.__name__
        LIBRARY.impl(name, composite if schema.endswith("-> ()") else function, "CompositeImplicitAutograd")
        reason = not_repeated if kernels else "made of PyTorch calls"
        called = _entry(function, not reason, bool(mutates), bool(differentiable))
        _ops[name] = Op(
            name,
            module.split("/")[0],
            module,
            schema,
            tuple(kernels),
            tuple(differentiable),
            dtypes,
            called,
            reason,
        )
        return called

    return register


def _entry(function: Function, repeats: bool, writes: bool, differentiable: bool) -> Function:
    """What an op's name calls: behind a ``direct.Replay`` where calls repeat, and in compiled graphs."""
    replay = direct.replayed(function, _kernels, writes) if repeats and not direct.load().missing else None
    views = differentiable and not writes
    if replay is None and not views:
        return function
    eager = replay or function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # torch.compile looks into the function. Where other tracers are at work, `replay` sees their modes
        if not _compiled():
            return eager(*args, **kwargs)
        if views:
            args, kwargs = _distinct(args, kwargs)
        return function(*args, **kwargs)

    if replay is not None:
        vars(call)["replay"] = replay
    return call  # pyright: ignore[reportReturnType]


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments; a tensor that is given again is a view: a compiled ``autograd.Function`` takes none twice."""
    given: list[Any] = []
    for value in (*args, *kwargs.values()):
        again = isinstance(value, Tensor) and any(value is other for other in given)
        given.append(value.view_as(value) if again else value)
    return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :]))


def ops() -> Mapping[str, Op]:
    """Every tilefuse op by name, with its schema, kernels, backends, dtypes, gradients and verified GPUs."""
    return MappingProxyType(_ops)


def kernels() -> Mapping[str, Kernel]:
    """Every kernel op by name."""
    return MappingProxyType(_kernels)


@contextmanager
def tracing() -> Iterator[list[tuple[Kernel, tuple[Any, ...]]]]:
    previous, _trace.calls = getattr(_trace, "calls", None), []
    try:
        yield _trace.calls
    finally:
        _trace.calls = previous


def explain(op_name: str, *args: Any, **kwargs: Any) -> dict[str, dict[str, str]]:
    """Says which backend each kernel of a call would use, and why not the others. Runs nothing.

    Args:
        op_name: an op listed in ``tilefuse.ops()``.
        *args, **kwargs: what the op would be called with.

    Returns:
        kernel name -> {backend: ``"runs"``, ``"usable"`` (slower, or not preferred) or the reason against it}.

    Raises:
        ValueError: no such op.
    """
    if op_name not in _ops:
        raise ValueError(f"tilefuse.explain: op_name must be one of {sorted(_ops)}, got {op_name!r}")
    return trace_call(_ops[op_name].function, args, kwargs)


def trace_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """``explain`` for any function that calls tilefuse ops."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, dict(kwargs)))
    with tracing() as calls, mode:
        function(*args, **kwargs)
    answer = {}
    for entry, call in calls:
        first = call[entry.dtype_arg]
        usable, reasons = entry.choices(first.device, first.dtype)
        for name in usable:
            refused = entry.when[name](*call) if name in entry.when else None
            reasons[name] = refused or ("usable" if "runs" in reasons.values() else "runs")
        answer[entry.name] = {name: reasons[name] for name in entry.backends}
    return answer
