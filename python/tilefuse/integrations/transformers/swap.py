"""How a live model is patched: parts say what becomes of a module, one walk applies it, ``undo`` takes it back.

A *part* is a module of this package with one function::

    def swap(module: nn.Module, config: PreTrainedConfig) -> Swap | Left | None

``None``: not a module of this part. ``Left(why)``: recognised, but stays as Hugging Face runs it. ``Swap(forward,
what)``: this instance gets a new forward. Only the instance changes: its class, parameters, hooks and ``state_dict``
stay as they are, because hooks that record router logits or offload weights sit on the module object.
"""

from __future__ import annotations

import copy
import functools
import importlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# where the state of a patched model lives: an attribute goes along with copy.deepcopy
STATE = "_tilefuse_patch"


@dataclass(frozen=True)
class Swap:
    """A new forward for one instance.

    ``forward`` is a plain function that takes the module as its first argument (it is bound to the instance, so that
    a deep copy of the model calls it with the copy), or None if the change needs no new forward. ``what`` names the
    parts that changed, ``left`` what the same module still does as Hugging Face does it, and why.
    """

    forward: Callable[..., Any] | None
    what: str
    left: str = ""


@dataclass(frozen=True)
class Left:
    """A module that a part knows and leaves alone, with a reason that a user understands."""

    why: str


@dataclass(frozen=True)
class Change:
    """One line of the report: what runs on tilefuse now, and what was left to Hugging Face with the reason."""

    changed: str = ""
    left: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (self.changed, self.left and f"left: {self.left}") if part)


class Report(Mapping[str, Change]):
    """Module path -> ``Change``, in the order of ``model.named_modules()``. Prints with equal layers on one line."""

    def __init__(self, changes: Mapping[str, Change]):
        self._changes = dict(changes)

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

    def __repr__(self) -> str:
        if not self._changes:
            return "tilefuse: no module of this model has a tilefuse counterpart"
        groups: dict[tuple[str, Change], list[int]] = {}
        for path, change in self._changes.items():
            numbers = [part for part in path.split(".") if part.isdigit()]
            shown = ".".join("*" if part.isdigit() else part for part in path.split("."))
            groups.setdefault((shown, change), []).append(int(numbers[0]) if numbers else -1)
        lines = [f"tilefuse: {len(self.changed)} of {len(self)} known modules run on tilefuse"]
        width = max(len(path) for path, _ in groups)
        for (path, change), numbers in groups.items():
            count = f" x{len(numbers)}" if len(numbers) > 1 else ""
            lines.append(f"  {path:<{width}}{count:<5} {change}")
        return "\n".join(lines)


@dataclass
class _State:
    """What ``undo`` needs."""

    report: Report
    # module, our bound forward, the forward that was in the instance's __dict__ (None: the class's)
    forwards: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)
    # module, its own config, the copy it got
    configs: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)
    # config, its copy, the copy's values when it was made
    copies: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)


def _slot(module: nn.Module) -> str:
    """The attribute that holds an instance's forward: accelerate's hooks wrap it and keep it elsewhere."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def set_forward(state: _State, module: nn.Module, forward: Callable[..., Any]) -> None:
    slot = _slot(module)
    bound = types.MethodType(forward, module)
    state.forwards.append((module, bound, module.__dict__.get(slot)))
    setattr(module, slot, bound)


def _code_key(function: Any) -> tuple[Any, ...] | None:
    code = getattr(function, "__code__", None)
    # where in its file a function stands does not matter
    return code and (code.co_code, code.co_names, code.co_varnames, code.co_consts)


@functools.cache
def _known(classes: tuple[tuple[str, str, Any], ...]) -> dict[tuple[Any, ...], Any]:
    found = {}
    for model, name, value in classes:
        file = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        key = _code_key(getattr(file, name, nn.Module).forward)
        if key is not None:
            found[key] = value
    return found


def same_code(module: nn.Module, classes: tuple[tuple[str, str, Any], ...]) -> Any:
    """The value of the first of ``(model, class, value)`` whose forward is, instruction by instruction, the module's.

    Hugging Face writes the same code out for each model that uses it, so this finds what a name would not.
    """
    return _known(classes).get(_code_key(type(module).forward))


def own_configs(state: _State, model: nn.Module) -> None:
    """Gives the model configs of its own: ``from_config`` shares one object among models that must not change."""
    copies: dict[int, Any] = {}

    def own(config: Any) -> Any:
        if id(config) not in copies:
            made = copies[id(config)] = copy.copy(config)
            for key in getattr(config, "sub_configs", ()):
                if (sub := getattr(config, key, None)) is not None and not isinstance(sub, dict):
                    object.__setattr__(made, key, own(sub))
            state.copies.append((config, made, dict(vars(made))))
        return copies[id(config)]

    from transformers import PreTrainedConfig

    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            made = own(config)
            state.configs.append((module, config, made))
            module.config = made


def undo(model: nn.Module) -> None:
    """Takes back what patching did to the model or to any part of it."""
    for module in model.modules():
        state = module.__dict__.pop(STATE, None)
        if state is None:
            continue
        for changed, bound, before in reversed(state.forwards):
            for slot in ("forward", "_old_forward"):
                if changed.__dict__.get(slot) is not bound:
                    continue
                if before is not None:
                    setattr(changed, slot, before)
                elif slot == "forward":
                    del changed.forward
                else:
                    # a hook was added since: what it wraps is the class's forward again
                    changed._old_forward = types.MethodType(type(changed).forward, changed)
        for owner, config, made in state.configs:
            if owner.__dict__.get("config") is made:
                owner.config = config
        for config, made, before in state.copies:
            # settings that the user changed meanwhile stay
            for name, value in vars(made).items():
                if (name not in before or before[name] is not value) and name != "_attn_implementation_internal":
                    object.__setattr__(config, name, value)


def apply(
    model: nn.Module,
    parts: list[Callable[[nn.Module, Any], Swap | Left | None]],
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> _State:
    """Walks the model and asks the parts, in order, about each module; the first that knows it decides.

    ``prepare`` runs first, when the model has configs of its own.
    """
    state = _State(Report({}))
    own_configs(state, model)
    setattr(model, STATE, state)
    changes: dict[str, Change] = {}
    # path -> config of the closest module above that has one
    configs: dict[str, Any] = {}
    try:
        prepare(model)
        for path, module in model.named_modules():
            parent = path.rpartition(".")[0]
            config = configs[path] = module.__dict__.get("config") or (configs.get(parent) if path else None)
            for part in parts:
                answer = part(module, config)
                if isinstance(answer, Left):
                    changes[path] = Change(left=answer.why)
                elif answer is not None:
                    if answer.forward is not None:
                        set_forward(state, module, answer.forward)
                    changes[path] = Change(answer.what, answer.left)
                if answer is not None:
                    break
    except BaseException:
        undo(model)
        raise
    state.report = Report(changes)
    return state
