"""Tensors without memory until someone looks at an entry: masks (``mask``) and logits (``logits``).

A ``LazyTensor`` knows what it ``says`` in few numbers and how Hugging Face would have made its entries. tilefuse reads
the first; any other use of the tensor, by a model, ``generate``, a trainer or another library, finds the second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_aten = torch.ops.aten
# these give the same tensor again
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}


class _Entries:
    """What a tensor and its aliases have in common: what they say, how the entries are made, and those once made."""

    def __init__(self, says: Any, make: Callable[[], Any]):
        self.says = says
        self.make = make
        self.made: Tensor | None = None
        # in a graph, whose writes would reach the entries past the tensor
        self.traced = False


class LazyTensor(Tensor):
    """A tensor without entries until someone asks for them: ``dense()``.

    What it says, ``says``, holds until someone could have written an entry: from the first write to the tensor or to an
    alias, and from the first view or pointer into its memory on, the entries count and nothing else.
    """

    # in an error
    _what = "a tensor"

    _entries: _Entries

    # nothing is left to do when an op is called from Python: they are caught below
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(
        cls, says: Any, make: Callable[[], Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Any:
        return cls._with(_Entries(says, make), shape, dtype, device)

    @classmethod
    def _with(cls, entries: _Entries, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._entries = entries
        return made

    @property
    def says(self) -> Any:
        """What stands for the entries, or None if these have to be looked at."""
        return self._entries.says

    def derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an op on this tensor if that needs no entries either, else None."""
        return None

    @property
    def _made(self) -> Tensor:
        entries = self._entries
        made = entries.made = entries.make() if entries.made is None else entries.made
        return made

    def dense(self) -> Tensor:
        """The entries, to be read."""
        return self._made

    def _may_be_written(self, now: bool) -> None:
        if now and self._entries.traced:
            raise RuntimeError(
                f"tilefuse: a compiled function cannot write to {self._what} of a patched model, only to a clone"
            )
        self._entries.says = None

    def _exposed(self) -> Tensor:
        """The entries, for someone who may write to them."""
        self._may_be_written(True)
        return self._made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # in inference mode ops arrive whole that are made of others
        done = func.decompose(*args, **kwargs) if torch.is_inference_mode_enabled() else NotImplemented
        if done is not NotImplemented:
            return done
        first = args[0] if args else None
        if isinstance(first, LazyTensor):
            if func in _SAME:
                return type(first)._with(first._entries, tuple(first.shape), first.dtype, first.device)
            derived = first.derive(func, args, kwargs)
            if derived is not None:
                return derived
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None:
                # it is written to, or a result shares its memory
                for each in pytree.tree_leaves(given.get(argument.name)):
                    if isinstance(each, LazyTensor):
                        each._may_be_written(argument.alias_info.is_write)
        args, kwargs = pytree.tree_map_only(LazyTensor, LazyTensor.dense, (args, kwargs))
        return func(*args, **kwargs)

    # dynamo takes one that comes into a compiled region as the wrapper of its entries
    def __tensor_flatten__(self) -> tuple[list[str], type[LazyTensor]]:
        return ["_made"], type(self)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], cls: type[LazyTensor], size: Any, stride: Any) -> LazyTensor:
        made = inner["_made"]
        lazy: Any = Tensor._make_wrapper_subclass(cls, size, stride, dtype=made.dtype, device=made.device)
        lazy._entries = _Entries(None, lambda: made)
        lazy._entries.traced = True
        return lazy

    # what does not pass through the dispatcher, or not as a lazy tensor
    def __setitem__(self, index: Any, value: Any) -> None:
        self._exposed()[index] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __copy__(self) -> Tensor:
        return copy.copy(self._exposed())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype}, {self.says})"

    def numpy(self, *, force: bool = False) -> Any:
        return self._exposed().numpy(force=force)

    def tolist(self) -> Any:
        return self.dense().tolist()

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, entries: Tensor) -> None:
        self._may_be_written(True)
        self._entries.made = entries

    def storage(self) -> Any:
        return self._exposed().storage()

    def data_ptr(self) -> int:
        return self._exposed().data_ptr()

    def __dlpack__(self, **options: Any) -> Any:
        return self._exposed().__dlpack__(**options)
