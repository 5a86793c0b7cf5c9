"""What Hugging Face's mask functions say: a rule in a few numbers instead of an entry for every query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as stock

MaskFunction = Callable[..., Any]


class Rule:
    """A mask function that knows what it computes; called, it is Hugging Face's own.

    A query sees the keys of its own sequence at distances ``-right`` to ``left`` (-1: no bound). ``chunk``: only those
    of its own chunk of so many positions, counted from ``origin`` ``[B]``. ``packed`` ``[B, S]``: only those with the
    same number.
    """

    def __init__(
        self,
        function: MaskFunction,
        left: int,
        right: int,
        chunk: int | None = None,
        origin: Tensor | None = None,
        packed: Tensor | None = None,
    ):
        self.function = function
        self.left, self.right = left, right
        self.chunk, self.origin = chunk, origin
        self.packed = packed

    def __call__(self, *indices: Any) -> Any:
        return self.function(*indices)

    @property
    def plain(self) -> bool:
        """Causal or not, and nothing else."""
        return self.left == -1 and self.chunk is None and self.packed is None


CAUSAL = Rule(stock.causal_mask_function, -1, 0)
EVERYTHING = Rule(stock.bidirectional_mask_function, -1, -1)


def sliding(window: int) -> Rule:
    """W keys with the query's own."""
    return Rule(stock.sliding_window_causal_mask_function(window), window - 1, 0)


def sliding_both_ways(window: int) -> Rule:
    return Rule(stock.sliding_window_bidirectional_mask_function(window), window, window)


def chunked(size: int, left_padding: Tensor) -> Rule:
    return Rule(stock.chunked_causal_mask_function(size, left_padding), -1, 0, size, left_padding)


def packed(function: MaskFunction, position_ids: Tensor, sequences: Tensor) -> MaskFunction:
    made = stock.packed_sequence_compatibility_function(function, position_ids, sequences)
    if not isinstance(function, Rule) or function.right != 0 or function.chunk is not None:
        return made
    return Rule(made, function.left, 0, packed=sequences)


# what the copies of Hugging Face's functions that make masks see instead of its own
NAMES = {
    "causal_mask_function": CAUSAL,
    "bidirectional_mask_function": EVERYTHING,
    "sliding_window_causal_mask_function": sliding,
    "sliding_window_bidirectional_mask_function": sliding_both_ways,
    "chunked_causal_mask_function": chunked,
    "packed_sequence_compatibility_function": packed,
}

# a function that Hugging Face composed is recognised by its code, and its parameters are in its closure
_AND = stock.and_masks(stock.causal_mask_function).__code__
_SLIDING = stock.sliding_window_overlay(1).__code__
_PACKED = stock.packed_sequence_mask_function(torch.empty(0)).__code__
_REMAPPED = stock.remap_positions_for_packed_sequence(stock.causal_mask_function, torch.empty(0)).__code__


def _closure(function: MaskFunction, code: Any) -> dict[str, Any] | None:
    """The closure of a function that was made from this code, else None."""
    if getattr(function, "__code__", None) is not code:
        return None
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def of(function: MaskFunction) -> Rule | None:
    """The rule of a mask function; those of models that ask for ``"tilefuse"`` by name are read off the closures."""
    if isinstance(function, Rule):
        return function
    if function is stock.causal_mask_function:
        return CAUSAL
    if function is stock.bidirectional_mask_function:
        return EVERYTHING
    # dynamo cannot look into closures
    both = None if torch.compiler.is_dynamo_compiling() else _closure(function, _AND)
    if both is None or len(both["mask_functions"]) != 2:
        return None
    first, second = both["mask_functions"]
    window = _closure(first, _SLIDING)
    if window is not None and second is stock.causal_mask_function:
        return Rule(function, window["sliding_window"] - 1, 0)
    ids, remapped = _closure(first, _PACKED), _closure(second, _REMAPPED)
    if ids is None or remapped is None:
        return None
    inner = of(remapped["mask_function"])
    if inner is None or inner.right != 0 or inner.chunk is not None:
        return None
    return Rule(function, inner.left, 0, packed=ids["packed_sequence_mask"])
