"""How a live model is patched: parts say what becomes of a module, one walk applies it, ``undo`` takes it back.

A *part* is a module of this package with one function::

    def swap(module: nn.Module, config: PreTrainedConfig) -> Swap | Left | None

``None``: not a module of this part. ``Left(why)``: recognised, but stays as Hugging Face runs it. ``Swap(forward,
what)``: this instance gets a new forward. Only the instance changes: its class, parameters, hooks and ``state_dict``
stay as they are, because hooks that record router logits or offload weights sit on the module object.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import transformers
from torch import nn

from ... import packs
from . import calls

Part = Callable[[nn.Module, Any], "Swap | Left | None"]

# where the state of a patched model lives: an attribute goes along with copy.deepcopy
STATE = "_tilefuse_patch"


@dataclass(frozen=True)
class Swap:
    """A new forward for one instance.

    ``forward`` is a plain function that takes the module as its first argument (it is bound to the instance, so that
    a deep copy of the model calls it with the copy) and that pickle finds by its name, or None if the change needs no
    new forward. ``what`` names the parts that changed ("" keeps the module out of the report), ``left`` what the same
    module still does as Hugging Face does it, and why. ``methods`` are others than forward, ``options`` keywords that
    forward is called with.
    """

    forward: Callable[..., Any] | None
    what: str
    left: str = ""
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[packs.Source, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The methods that change."""
        return (*self.methods, *(() if self.forward is None else ("forward",)))


@dataclass(frozen=True)
class Left:
    """A module that a part knows and leaves alone, with a reason that a user understands."""

    why: str


def _joined(first: Swap | Left | None, second: Swap | Left | None) -> Swap | Left | None:
    """What two parts say of one module, which change different methods of it."""
    if first is None or second is None:
        return first or second
    if isinstance(first, Left) and isinstance(second, Left):
        return Left(f"{first.why}; {second.why}")
    a, b = (Swap(None, "", each.why) if isinstance(each, Left) else each for each in (first, second))
    return Swap(
        a.forward or b.forward,
        ", ".join(filter(None, (a.what, b.what))),
        "; ".join(filter(None, (a.left, b.left))),
        {**a.methods, **b.methods},
        {**a.options, **b.options},
        a.sources + b.sources,
    )


@dataclass(frozen=True)
class Change:
    """One line of the report: what runs on tilefuse now, and what was left to Hugging Face with the reason."""

    changed: str = ""
    left: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (self.changed, self.left and f"left: {self.left}") if part)


class Report(Mapping[str, Change]):
    """Module path -> ``Change``, in the order of ``model.named_modules()``. Prints with equal layers on one line."""

    def __init__(self, changes: Mapping[str, Change], memory: packs.PackedMemory | None = None):
        self._changes = dict(changes)
        # bytes of the weights that were packed, before and with their packs; None without any
        self.memory = memory
        self._model: weakref.ref[nn.Module] | None = None

    def __reduce__(self) -> Any:
        # a copy is that of another model
        return Report, (self._changes, self.memory)

    def belongs_to(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __getitem__(self, path: str) -> Change:
        return self._changes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    @property
    def changed(self) -> dict[str, str]:
        """Only the modules that run on tilefuse now."""
        return {path: change.changed for path, change in self._changes.items() if change.changed}

    @property
    def left(self) -> dict[str, str]:
        """Only what stays with Hugging Face, with the reason."""
        return {path: change.left for path, change in self._changes.items() if change.left}

    def calls(self) -> dict[str, dict[str, int]]:
        """What the attention and loss calls of each module ran on since it was patched: an op of tilefuse, or Hugging
        Face's function with the reason. Calls inside of compiled graphs are not counted."""
        model = None if self._model is None else self._model()
        modules = {} if model is None else dict(model.named_modules())
        found = {path: calls.of(modules[path]) for path in self if path in modules}
        return {path: counts for path, counts in found.items() if counts}

    def __repr__(self) -> str:
        if not self._changes:
            return "tilefuse: no module of this model has a tilefuse counterpart"
        groups: dict[tuple[str, Change], list[int]] = {}
        for path, change in self._changes.items():
            numbers = [part for part in path.split(".") if part.isdigit()]
            shown = ".".join("*" if part.isdigit() else part for part in path.split(".")) or "(model)"
            groups.setdefault((shown, change), []).append(int(numbers[0]) if numbers else -1)
        lines = [f"tilefuse: {len(self.changed)} of {len(self)} known modules run on tilefuse"]
        width = max(len(path) for path, _ in groups)
        for (path, change), numbers in groups.items():
            count = f" x{len(numbers)}" if len(numbers) > 1 else ""
            lines.append(f"  {path:<{width}}{count:<5} {change}")
        if self.memory is not None:
            before, after = (f"{n / 2**20:.1f} MiB" for n in self.memory)
            lines.append(f"packed weights: {before} before, {after} with their packs")
        return "\n".join(lines)


class Options(NamedTuple):
    """What a user asks ``patch`` for beyond the default."""

    pack: bool | str = False
    norm: bool = False
    loss: bool = False

    def and_before(self, before: Options) -> Options:
        """These, and what was asked for before."""
        return Options(self.pack or before.pack, self.norm or before.norm, self.loss or before.loss)


NOTHING = Options()


@dataclass
class _State:
    """What ``undo`` needs."""

    report: Report
    options: Options = NOTHING
    # module, name of the method, ours, what was in the instance's __dict__ (None: nothing)
    methods: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)


def _slot(module: nn.Module, name: str) -> str:
    """The attribute that holds an instance's method: accelerate's hooks wrap forward and keep it elsewhere."""
    return "_old_forward" if name == "forward" and "_old_forward" in module.__dict__ else name


def replaced(module: nn.Module, name: str) -> bool:
    """Whether someone gave this instance a method of its own, which a swap would drop; accelerate's hooks do not."""
    found = module.__dict__.get(_slot(module, name))
    return found is not None and getattr(found, "__func__", None) is not getattr(type(module), name, None)


def set_method(state: _State, module: nn.Module, name: str, method: Callable[..., Any], **options: Any) -> None:
    slot = _slot(module, name)
    # unlike a bound method, this is pickled as what it is
    bound = functools.partial(method, module, **options)
    state.methods.append((module, name, bound, module.__dict__.get(slot)))
    setattr(module, slot, bound)


def _replicate(module: nn.Module) -> nn.Module:
    """What ``nn.DataParallel`` calls for its copies, which share the instance's attributes: each gets methods of its
    own, on its own device."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name, method in module.__dict__.items():
        if isinstance(method, functools.partial) and method.args[:1] == (module,):
            replica.__dict__[name] = functools.partial(method.func, replica, *method.args[1:], **method.keywords)
    return replica


def _code_key(function: Any, bare: bool) -> tuple[Any, ...] | None:
    code = getattr(inspect.unwrap(function) if bare and function is not None else function, "__code__", None)
    if code is None:
        return None
    constants = code.co_consts
    if bare and isinstance(constants[0], str | None):
        # the docstring
        constants = constants[1:]
    # where in its file a function stands does not matter
    return code.co_code, code.co_names, code.co_varnames, constants


_LIBRARY = os.path.dirname(transformers.__file__)


def original(cls: type, method: str = "forward") -> bool:
    """Whether a method is the one of its class's file, through decorators of Hugging Face's alone: not one that someone
    put there since, on a class that others share."""
    function = getattr(cls, method, None)
    own = getattr(sys.modules.get(cls.__module__), "__file__", None)
    while function is not None:
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        if file != own and not file.startswith(_LIBRARY + os.sep):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


@functools.cache
def _known(classes: tuple[tuple[str, str, Any], ...], method: str, bare: bool) -> dict[tuple[Any, ...], Any]:
    found = {}
    for model, name, value in classes:
        file = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        cls = getattr(file, name, None)
        key = _code_key(getattr(cls, method, None), bare)
        if isinstance(cls, type) and key is not None and original(cls, method):
            found[key] = value
    return found


def same_code(
    module: Any, classes: tuple[tuple[str, str, Any], ...], method: str = "forward", bare: bool = False
) -> Any:
    """The value of the first of ``(model, class, value)`` whose method is, instruction by instruction, the module's
    or the class's. ``bare``: whatever decorates it and its docstring says.

    Hugging Face writes the same code out for each model that uses it, so this finds what a name would not.
    """
    cls = module if isinstance(module, type) else type(module)
    key = _code_key(getattr(cls, method, None), bare)
    return None if key is None else _known(classes, method, bare).get(key)


def hooked(module: nn.Module, ours: Callable[..., Any] | None = None) -> bool:
    """Whether calling a module is more than its class's forward, or than ``ours`` in its place: a fused op that does
    not call it would drop that."""
    forward = module.__dict__.get("forward")
    return bool(
        (forward is not None and (ours is None or getattr(forward, "func", None) is not ours))
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def undo(model: nn.Module) -> None:
    """Takes back what patching did to the model or to any part of it."""
    for module in model.modules():
        state = module.__dict__.pop(STATE, None)
        if state is None:
            continue
        for changed in {changed for changed, name, _, _ in state.methods if name in packs.METHODS}:
            packs.unpack(changed)
        for changed, name, bound, before in reversed(state.methods):
            for slot in {name, _slot(changed, name)}:
                if changed.__dict__.get(slot) is not bound:
                    continue
                if before is not None:
                    setattr(changed, slot, before)
                elif slot == name:
                    delattr(changed, name)
                else:
                    # a hook was added since: what it wraps is the class's forward again
                    changed._old_forward = types.MethodType(type(changed).forward, changed)


def _pack(state: _State, module: nn.Module, answer: Swap) -> tuple[Change, packs.PackedMemory]:
    """Packs the weights of a module that has just got its forward."""
    mode = "only" if state.options.pack == "only" else "keep"
    why = packs.why_not(module, answer.sources, mode)
    if why is not None:
        left = "; ".join(part for part in (answer.left, f"not packed: {why}") if part)
        return Change(answer.what, left), packs.PackedMemory(0, 0)
    for name, method in packs.METHODS.items():
        set_method(state, module, name, method)
    memory = packs.pack("integrations.transformers.patch", module, answer.sources, mode)
    return Change(f"{answer.what}, packed", answer.left), memory


def apply(
    model: nn.Module, parts: list[Part], options: Options = NOTHING, also: list[Part] | tuple[Part, ...] = ()
) -> _State:
    """Walks the model and asks the parts, in order, about each module; the first that knows it decides. Those in
    ``also`` are asked besides: they change other methods."""
    state = _State(Report({}), options)
    memory = packs.PackedMemory(0, 0)
    setattr(model, STATE, state)
    changes: dict[str, Change] = {}
    # path -> config of the closest module above that has one
    configs: dict[str, Any] = {}
    try:
        for path, module in model.named_modules():
            parent = path.rpartition(".")[0]
            config = configs[path] = module.__dict__.get("config") or (configs.get(parent) if path else None)
            answer = next((answer for part in parts if (answer := part(module, config)) is not None), None)
            for part in also:
                other = part(module, config)
                if isinstance(other, Swap) and isinstance(answer, Swap) and {*other.names} & {*answer.names}:
                    other = Left(f"{other.what}: its forward runs otherwise on tilefuse")
                answer = _joined(answer, other)
            if isinstance(answer, Left):
                changes[path] = Change(left=answer.why)
            elif answer is not None and any(replaced(module, name) for name in answer.names):
                if answer.what:
                    changes[path] = Change(left="someone replaced its forward")
            elif answer is not None:
                calls.forget(module)
                for name, method in answer.methods.items():
                    set_method(state, module, name, method)
                if answer.forward is not None:
                    set_method(state, module, "forward", answer.forward, **answer.options)
                set_method(state, module, "_replicate_for_data_parallel", _replicate)
                if answer.sources and options.pack:
                    changes[path], its = _pack(state, module, answer)
                    memory = packs.PackedMemory(memory.before + its.before, memory.after + its.after)
                elif answer.what or answer.left:
                    changes[path] = Change(answer.what, answer.left)
    except BaseException:
        undo(model)
        raise
    state.report = Report(changes, memory if memory.after else None)
    return state
