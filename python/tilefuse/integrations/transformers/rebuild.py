"""Methods of Hugging Face's classes that see other globals: how a part reaches what a class takes from its file.

``apply_rotary_pos_emb``, ``ALL_ATTENTION_FUNCTIONS`` and ``create_causal_mask`` are globals of each model's file. A
patched module gets a copy of its own method in whose globals they are tilefuse's; no other module changes, and
torch.compile traces the copy as it does the original. Copies pickle by name: which class, method and parts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

Function = types.FunctionType
# name and value of a global -> what takes its place, None: it stays
Replace = Callable[[str, Any, dict[str, Any]], Any]
# scope, name and value of globals
Used = list[tuple[dict[str, Any], str, Any]]

# with the function that each is the copy of, and the globals that it used
_built: dict[tuple[type, str, tuple[str, ...]], tuple[Function, Used, Function]] = {}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def copy(
    function: Function, replace: Replace, callers: tuple[Function, ...] = (), used: Used | None = None
) -> Function | None:
    """The function with other globals, also in the functions of its file that it calls and in those that it wraps.

    None if nothing that it uses changes. ``used`` receives the globals that were looked at.
    """
    if function in callers:
        return None
    callers = (*callers, function)
    scope = function.__globals__
    changed = {}
    for name in set(_names(function.__code__)) & scope.keys():
        value = scope[name]
        if used is not None:
            used.append((scope, name, value))
        new = replace(name, value, scope)
        if new is None and isinstance(value, Function) and value.__globals__ is scope:
            new = copy(value, replace, callers, used)
        if new is not None:
            changed[name] = new
    # a decorator keeps what it wraps in a cell
    cells = []
    for cell in function.__closure__ or ():
        inner = _contents(cell)
        new = copy(inner, replace, callers, used) if isinstance(inner, Function) else None
        cells.append(cell if new is None else types.CellType(new))
    if not changed and all(a is b for a, b in zip(cells, function.__closure__ or ())):
        return None
    if changed:
        scope = {**scope, **changed}
        # torch.compile would look names up in the module that __name__ says, and find the original functions
        scope.pop("__name__", None)
    made = Function(function.__code__, scope, function.__name__, function.__defaults__, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function, updated=())
    return made


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _of_a_model(cls: type) -> bool:
    """Whether a class comes from a model's file, Hugging Face's or remote code, and not from a library."""
    package = cls.__module__.partition(".")[0]
    return cls.__module__.startswith("transformers.models.") or package not in ("transformers", "torch", "builtins")


def methods(cls: type) -> dict[str, Function]:
    """The plain methods that a class or its bases in a model's file define."""
    found = {}
    for base in reversed(cls.__mro__):
        if _of_a_model(base):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("__")}
    return {name: value for name, value in found.items() if isinstance(value, Function)}


def uses(function: Function, wanted: Callable[[Any], bool]) -> bool:
    """Whether a global of this kind is used by a function, or by what ``copy`` would copy with it."""
    found = []

    def look(name: str, value: Any, scope: dict[str, Any]) -> None:
        if wanted(value):
            found.append(name)

    copy(function, look)
    return bool(found)


def method(cls: Any, name: str, parts: tuple[str, ...]) -> Function:
    """The copy of a class's method that runs these parts on tilefuse: ``"attention"``, ``"rope"``, ``"norm=0.0"``,
    ``"loss"``."""
    key = (cls, name, parts)
    stock = inspect.getattr_static(cls, name)
    if key not in _built or not _still(stock, *_built[key][:2]):
        from . import attention, loss, qk_norm, rope

        replaces = {"attention": attention.replace, "rope": rope.replace}
        wanted = [replaces[part] for part in parts if part in replaces]

        def replace(name: str, value: Any, scope: dict[str, Any]) -> Any:
            answers = (one(name, value, scope) for one in wanted)
            return next((answer for answer in answers if answer is not None), None)

        used: Used = []
        made = copy(stock, replace, used=used)
        if made is None:
            if "loss" not in parts:
                raise LookupError(f"{cls.__qualname__}.{name} has nothing of {', '.join(parts)}")
            made = stock
        for part in parts:
            if part.startswith("norm="):
                made = qk_norm.fuse(made, float(part[5:]))
                functools.update_wrapper(made, stock, updated=())
        if "loss" in parts:
            made = loss.fuse(made)
            functools.update_wrapper(made, stock, updated=())
        made.__module__, made.__qualname__ = __name__, _encode(cls, name, parts)
        _built[key] = stock, used, made
    return _built[key][2]


def _still(stock: Function, before: Function, used: Used) -> bool:
    """Whether a copy is still that of the method: others change classes and globals of a model's file too."""
    return stock is before and all(scope.get(name) is value for scope, name, value in used)


def _encode(cls: type, name: str, parts: tuple[str, ...]) -> str:
    # pickle takes a dot for an attribute's attribute
    return ":".join((cls.__module__, cls.__qualname__, name, *parts)).replace(".", "/")


def __getattr__(name: str) -> Function:
    """How pickle finds a copy: by the name that ``_encode`` gave it."""
    if ":" not in name:
        raise AttributeError(name)
    file, path, method_name, *parts = name.replace("/", ".").split(":")
    cls: Any = functools.reduce(getattr, path.split("."), importlib.import_module(file))
    try:
        return method(cls, method_name, tuple(parts))
    except Exception as error:
        warnings.warn(
            f"tilefuse: {path}.{method_name} was pickled patched and is loaded as Hugging Face's own ({error})",
            stacklevel=2,
        )
        return inspect.getattr_static(cls, method_name)
