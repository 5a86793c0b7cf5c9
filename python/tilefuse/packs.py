"""The packed weights of a module: for calls without gradients, made again when a parameter changed, in no checkpoint.

``tilefuse.nn`` modules and patched Hugging Face modules keep a ``Packs`` in their attribute ``_packs``. Their forward
asks ``packed_weights`` for it; ``_apply``, ``_save_to_state_dict`` and ``_load_from_state_dict`` go through the
functions below, so that ``.to``, ``state_dict`` and ``load_state_dict`` see parameters in the checkpoint's form.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import errors
from .packing import PackedWeight, pack_data, unpack_into

__all__: list[str] = []

MODES = ("keep", "only")
_PACKS = "_packs"
_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)


class PackedMemory(NamedTuple):
    """Bytes of the weights that were packed, their packs included."""

    before: int
    after: int


class Source(NamedTuple):
    """A parameter that is packed: ``[.., N, K]``, or transposed ``[E, K, N]``.

    Interleaved rows are gate, up, gate, up, ..; the pack has all gates, then all ups. A bias ``[E, N]`` of such a
    weight gets a copy in that order.
    """

    name: str
    transposed: bool = False
    interleaved: bool = False

    @property
    def is_bias(self) -> bool:
        return self.name.endswith("_bias")

    def rows(self, w: Tensor) -> Tensor:
        """The parameter as what ``pack_data`` takes, a view."""
        if self.transposed:
            w = w.transpose(1, 2)
        return w.unflatten(1, (-1, 2)).transpose(1, 2) if self.interleaved else w


@dataclass
class Packs:
    """What is packed of one module, and the packs, in the order of ``sources``; () until they are made."""

    sources: tuple[Source, ...]
    only: bool
    weights: tuple[Any, ...] = ()
    # storage and version of the parameters that are still there
    seen: tuple[tuple[StorageWeakRef, int | None] | None, ...] = ()
    # the same for compiled graphs
    stamp: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))

    def __getstate__(self) -> dict[str, Any]:
        # a copy's parameters are others: it packs them when it needs them. Freed ones live here alone
        freed = tuple(w if self.frees(source) else None for source, w in zip(self.sources, self.weights))
        return {"sources": self.sources, "only": self.only, "weights": freed if self.only else ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packs:
        made = object.__new__(Packs)
        state = self.__getstate__()
        state["weights"] = tuple(
            w if w is None else PackedWeight(w.data.clone(), None, w.in_features) for w in state["weights"]
        )
        made.__setstate__(state)
        return made

    def frees(self, source: Source) -> bool:
        return self.only and not source.is_bias

    def held(self, module: nn.Module) -> list[tuple[Source, PackedWeight]]:
        """The packs whose parameters were freed."""
        return [
            (source, weight)
            for source, weight in zip(self.sources, self.weights)
            if weight is not None and not source.is_bias and _is_meta(_parameter(module, source))
        ]


def _parameter(module: nn.Module, source: Source) -> Any:
    return module._parameters.get(source.name)


def _is_meta(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.is_meta


def _current(parameter: Tensor) -> tuple[StorageWeakRef, int | None]:
    return StorageWeakRef(parameter.untyped_storage()), parameter._version


def _unfit(module: nn.Module, packs: Packs) -> str | None:
    """Why the parameters that are there cannot be packed."""
    held = {source for source, _ in packs.held(module)}
    for source in packs.sources:
        parameter = _parameter(module, source)
        if source in held:
            continue
        if parameter is None:
            return f"{source.name} is no parameter of its own"
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"{source.name} is a {type(parameter).__name__}"
        if parameter.device.type != "cpu":
            return f"{source.name} is on {parameter.device}, packed weights are for the CPU"
        if parameter.dtype not in _DTYPES:
            return (
                f"{source.name} is {errors.dtype_name(parameter.dtype)}, packed weights are bfloat16 or float8_e4m3fn"
            )
        if parameter.is_inference() and not packs.only:
            return f"{source.name} was made in inference mode, where changes are not counted"
    return None


def _takes_over(parameter: Tensor) -> bool:
    """Whether the memory of a tensor that nobody else holds can be written: no view or storage of it, no sharing."""
    storage = parameter.untyped_storage()
    return (
        # the tensor and our variable
        torch._C._storage_Use_Count(storage._cdata) <= 2
        and storage.resizable()
        and not storage.is_shared()
        and storage.nbytes() == parameter.nbytes
        and parameter.is_contiguous()
    )


def _pack_one(module: nn.Module, source: Source, free: bool, old: PackedWeight | None) -> Any:
    parameter = _parameter(module, source)
    if source.is_bias:
        return source.rows(parameter.detach()).flatten(1).contiguous()
    k = source.rows(parameter.detach()).shape[-1]
    into = None
    if free:
        module._parameters[source.name] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
        # what one variable of a function counts depends on the interpreter, and a call may add to it
        alone = object()
        if k % 4 == 0 and sys.getrefcount(parameter) <= sys.getrefcount(alone) and _takes_over(parameter):
            into = parameter.detach()
    elif old is not None and (old.dtype, old.data.numel()) == (parameter.dtype, parameter.numel()):
        into = old.data
    return PackedWeight(pack_data(source.rows(parameter.detach()), into), None, k)


# threads that share a module pack it once
_lock = threading.Lock()


def _make(module: nn.Module, packs: Packs) -> None:
    with _lock, torch.inference_mode(False), torch.no_grad():
        if _fresh(packs, module):
            return
        held = {source for source, _ in packs.held(module)}
        weights: list[Any] = list(packs.weights) or [None] * len(packs.sources)
        seen: list[Any] = []
        for i, source in enumerate(packs.sources):
            if source not in held:
                weights[i] = _pack_one(module, source, packs.frees(source), weights[i])
            parameter = _parameter(module, source)
            seen.append(None if parameter.is_meta else _current(parameter))
        packs.stamp = torch.tensor(
            [value for entry in seen if entry is not None for value in (entry[0].cdata, entry[1])],
            dtype=torch.int64,
            device="cpu",
        )
        packs.weights, packs.seen = tuple(weights), tuple(seen)


def _restore(module: nn.Module, packs: Packs) -> None:
    """Freed parameters back from their packs, which go."""
    with torch.inference_mode(False), torch.no_grad():
        for source, weight in packs.held(module):
            requires_grad = _parameter(module, source).requires_grad
            module._parameters[source.name] = nn.Parameter(
                _unpacked(module, source, weight), requires_grad=requires_grad
            )
            packs.weights = tuple(None if w is weight else w for w in packs.weights)
        packs.weights = packs.seen = ()


def _unpacked(module: nn.Module, source: Source, weight: PackedWeight) -> Tensor:
    parameter = _parameter(module, source)
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    unpack_into(source.rows(whole), weight.data)
    return whole


def _fresh(packs: Packs, module: nn.Module) -> bool:
    if not packs.weights or len(packs.seen) != len(packs.sources):
        return False
    for source, entry in zip(packs.sources, packs.seen):
        parameter = _parameter(module, source)
        if parameter is None:
            return False
        if entry is None:
            if not parameter.is_meta:
                return False
        elif entry[0].cdata != parameter.untyped_storage()._cdata or entry[1] != parameter._version:
            return False
    return True


@torch.library.custom_op("tilefuse_nn::check_packed", mutates_args=())
def _check_packed(like: Tensor, parameters: list[Tensor], stamp: Tensor) -> Tensor:
    """``like``, if the parameters are what was packed. A compiled graph cannot pack again, so it raises."""
    now = [value for p in parameters for value in (p.untyped_storage()._cdata, p._version)]
    if now != stamp.tolist():
        raise RuntimeError(
            "tilefuse: a weight changed since it was packed, and a compiled graph cannot pack it again: call pack() "
            "once more, or the module itself without torch.compile"
        )
    return like.clone()


@_check_packed.register_fake
def _(like: Tensor, parameters: list[Tensor], stamp: Tensor) -> Tensor:
    return torch.empty_like(like)


def memory(module: nn.Module) -> int:
    """Bytes of the parameters and packs of a module that is, or was, packed."""
    packs: Packs | None = module.__dict__.get(_PACKS)
    if packs is None:
        return 0
    parameters = [_parameter(module, source) for source in packs.sources]
    return sum(t.nbytes for t in (*parameters, *packs.weights) if t is not None and t.device.type != "meta")


def pack(name: str, module: nn.Module, sources: tuple[Source, ...], mode: str) -> PackedMemory:
    """Packs these parameters of a module for calls without gradients; mode "only" frees them.

    ``name``: whose errors these are. Raises ValueError where a parameter cannot be packed, and nothing has changed.
    """
    if mode not in MODES:
        errors.value_error(name, "mode", f"one of {', '.join(MODES)}", mode)
    unpack(module)
    why = why_not(module, sources, mode)
    if why is not None:
        raise ValueError(f"tilefuse.{name}: {why}")
    packs = Packs(sources, mode == "only")
    module.__dict__[_PACKS] = packs
    before = memory(module)
    _make(module, packs)
    return PackedMemory(before, memory(module))


def why_not(module: nn.Module, sources: tuple[Source, ...], mode: str) -> str | None:
    """Why ``pack`` would refuse these parameters."""
    return _unfit(module, Packs(sources, mode == "only"))


def unpack(module: nn.Module) -> None:
    """Takes ``pack`` back: packs go, and parameters that were freed are there again. Without packs, nothing."""
    packs: Packs | None = module.__dict__.get(_PACKS)
    if packs is not None:
        _restore(module, packs)
        del module.__dict__[_PACKS]


def packed_weights(module: nn.Module, *inputs: Tensor | None) -> tuple[Any, ...] | None:
    """The packs of a module for a call on these inputs, packed again where a parameter changed.

    None where the parameters themselves serve: without packs, where a gradient is needed, in ``torch.export``, and
    where a parameter can no longer be packed. Raises RuntimeError if it needs a gradient and was freed.
    """
    packs: Packs | None = module.__dict__.get(_PACKS)
    if packs is None:
        return None
    parameters = [_parameter(module, source) for source in packs.sources]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *parameters)):
        if packs.held(module):
            raise RuntimeError(
                f"tilefuse: the weights of this {type(module).__name__} are packed only, for inference: use "
                "torch.no_grad(), or unpack() before a gradient is needed"
            )
        return None
    if torch.compiler.is_compiling():
        unused = torch.compiler.is_exporting() and not packs.held(module)
        return None if unused or len(packs.weights) == 0 else packs.weights
    if not _fresh(packs, module):
        why = _unfit(module, packs)
        if why is not None and packs.held(module):
            raise RuntimeError(f"tilefuse: some weights of this {type(module).__name__} are packed only, but {why}")
        if why is not None:
            return None
        _make(module, packs)
    return packs.weights


def checked(module: nn.Module, like: Tensor) -> Tensor:
    """``like``, an operand of a call with packed weights: in a compiled graph it is where their age is looked at."""
    if not torch.compiler.is_compiling():
        return like
    packs: Packs = module.__dict__[_PACKS]
    parameters = [_parameter(module, source) for source in packs.sources]
    there = [p for p in parameters if not p.is_meta]
    return _check_packed(like, there, packs.stamp) if there else like


def refresh(module: nn.Module) -> None:
    """Packs what changed, or what a copy has not packed yet, where it can be packed."""
    packs: Packs | None = module.__dict__.get(_PACKS)
    if packs is not None and not _fresh(packs, module) and _unfit(module, packs) is None:
        _make(module, packs)


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Has the parameters in the checkpoint's form inside of the block, and packs them again behind it."""
    packs: Packs | None = module.__dict__.get(_PACKS)
    if packs is not None and packs.held(module):
        _restore(module, packs)
    try:
        yield
    finally:
        refresh(module)


def fill_state_dict(module: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """The checkpoint's form of freed parameters, in a state dict that has placeholders for them."""
    packs: Packs | None = module.__dict__.get(_PACKS)
    for source, weight in packs.held(module) if packs is not None else ():
        whole = _unpacked(module, source, weight)
        destination[prefix + source.name] = nn.Parameter(whole, requires_grad=False) if keep_vars else whole


def read(module: nn.Module, name: str) -> Tensor:
    """A parameter for someone who reads its elements; unpacked for him where it was freed."""
    packs: Packs | None = module.__dict__.get(_PACKS)
    for source, weight in packs.held(module) if packs is not None else ():
        if source.name == name:
            return _unpacked(module, source, weight)
    return getattr(module, name)


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    with unpacked(self):
        return type(self)._apply(self, fn, recurse)


def _save_to_state_dict(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
    type(self)._save_to_state_dict(self, destination, prefix, keep_vars)
    fill_state_dict(self, destination, prefix, keep_vars)


def _load_from_state_dict(self: nn.Module, *args: Any) -> None:
    with unpacked(self):
        type(self)._load_from_state_dict(self, *args)


# of an instance of a class that knows nothing of packs
METHODS = {
    "_apply": _apply,
    "_save_to_state_dict": _save_to_state_dict,
    "_load_from_state_dict": _load_from_state_dict,
}


class PackableModule(nn.Module):
    """A module whose parameters ``pack`` may replace."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with unpacked(self):
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        fill_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        with unpacked(self):
            super()._load_from_state_dict(*args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        refresh(self)
