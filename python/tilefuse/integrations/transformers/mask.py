"""Masks that say what they mean: tensors ``[B, 1, Sq, Sk]`` that have no memory until someone looks at an entry.

Hugging Face makes one mask per forward and kind of layer and hands it to each layer. A dense one costs O(S^2), and
what nearly all of them say fits in a few numbers (``compact.Compact``). A ``LazyMask`` holds these, and how Hugging
Face would have made the mask: tilefuse's attention reads the numbers, and any other use of the tensor, by a model,
``generate`` or another library, finds the entries that Hugging Face's own function makes, in its dtype.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as stock
from transformers.utils.import_utils import is_tracing

from . import rules
from .compact import Compact, describe
from .lazy import LazyTensor

_aten = torch.ops.aten


class LazyMask(LazyTensor):
    """A mask without entries until someone asks for them; it says its ``Compact``."""

    _what = "a mask"

    def derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compact, make = self.says, self._entries.make
        same_dtype = kwargs.get("dtype") in (None, self.dtype)
        if func is _aten._to_copy.default and same_dtype and kwargs.get("device") and compact is not None:
            device = torch.device(kwargs["device"])
            # made anew: what is written to a copy stays there
            return LazyMask.of(compact.to(device), lambda: make().to(device), tuple(self.shape), self.dtype, device)
        return None


class TracedMask(Tensor):
    """The same in a graph: Hugging Face's mask with ``compact`` at its side. Entries that no one uses are not made."""

    compact: Compact

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def compact_of(mask: Any) -> Compact | None:
    """What a mask says, or None if it has to be looked at."""
    return mask.says if type(mask) is LazyMask else getattr(mask, "compact", None)


def dense(mask: Any) -> Any:
    """The mask for someone else's eyes."""
    return mask.dense() if type(mask) is LazyMask else mask


def _function(stock_function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """``stock_function`` of Hugging Face's registry, ``sdpa_mask`` or ``eager_mask``, with lazy masks."""

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = stock.causal_mask_function,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Tensor | None:
        arguments = {
            "batch_size": batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "attention_mask": attention_mask,
            "device": device,
            **options,
        }
        rule = rules.of(mask_function)
        if rule is None or isinstance(kv_offset, Tensor) or options.get("use_vmap"):
            return stock_function(mask_function=mask_function, **arguments)
        # the contents of tensors decide below, and a graph cannot depend on them
        tracing = is_tracing(attention_mask) or is_tracing(q_offset if isinstance(q_offset, Tensor) else None)
        # torch.compile and torch.export
        compiling = torch.compiler.is_compiling()
        # one entry stands for all: what is asked is whether there is a mask at all
        found = stock_function(mask_function=mask_function if compiling else _everything, **arguments)
        if found is None:
            return None
        padding = stock.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, kv_offset : kv_offset + kv_length]
        compact = describe(
            rule, batch_size, q_length, kv_length, q_offset, kv_offset, padding, tracing, found.device
        )  # fmt: skip
        if compact is None:
            return found if compiling else stock_function(mask_function=mask_function, **arguments)
        if compiling:
            traced: Any = found.as_subclass(TracedMask) if torch.compiler.is_dynamo_compiling() else found
            traced.compact = compact
            return traced
        if isinstance(q_offset, Tensor):
            # a static cache counts in place
            arguments["q_offset"] = q_offset.clone()
        make = functools.partial(stock_function, mask_function=mask_function, **arguments)
        return LazyMask.of(compact, make, (batch_size, 1, q_length, kv_length), found.dtype, found.device)

    return mask


def _everything(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query.new_ones((1, 1, 1, 1), dtype=torch.bool)


sdpa_mask = _function(stock.sdpa_mask)
eager_mask = _function(stock.eager_mask)


class _Registry:
    """Hugging Face's registry of mask functions, with ours for models that run on ``sdpa`` or ``eager``."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        # someone may have registered another function under a name of Hugging Face's
        found = stock.ALL_MASK_ATTENTION_FUNCTIONS[name]
        if found is stock.sdpa_mask:
            return sdpa_mask
        return eager_mask if found is stock.eager_mask else found


def _ours(maker: Any) -> Any:
    """What makes lazy masks in place of a function of Hugging Face's, also behind a partial or in a table."""
    if isinstance(maker, dict):
        return {name: _ours(each) for name, each in maker.items()}
    if isinstance(maker, functools.partial):
        return functools.partial(_ours(maker.func), *maker.args, **maker.keywords)
    return MAKERS.get(maker, maker)


def _copy(function: types.FunctionType) -> types.FunctionType:
    made = types.FunctionType(
        function.__code__, _SCOPE, function.__name__, function.__defaults__, function.__closure__
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# the globals of masking_utils with ours; torch.compile would look names up in the module that __name__ says
_SCOPE: dict[str, Any] = {**vars(stock), **rules.NAMES, "ALL_MASK_ATTENTION_FUNCTIONS": _Registry()}
del _SCOPE["__name__"]
# Hugging Face's functions that a model's forward calls to make a mask -> those that make lazy ones
MAKERS: dict[Any, Callable[..., Any]] = {
    value: _copy(value) for name, value in vars(stock).items() if name.startswith("create_") and name.endswith("_mask")
}
_SCOPE.update({function.__name__: ours for function, ours in MAKERS.items()})
_SCOPE["LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING"] = _ours(stock.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)
_masks_for_generate = _copy(stock.create_masks_for_generate)


def for_generate(model: Any, **arguments: Any) -> Any:
    """``create_masks_for_generate`` of a model: ``generate`` makes the masks itself for a static cache."""
    return _masks_for_generate(**arguments)
