"""BigBird's block-sparse attention through ``block_sparse_attention``.

The pattern is Hugging Face's, list for list. In evaluation its "random" blocks are all block 0, which therefore counts
``num_random_blocks`` times more than others; in training they are drawn by the stock module's own methods from the
layer's seed, so that the lists are those of the stock model and NumPy's global generator ends in the same state.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from ...ops.attention.block_sparse_attention import block_sparse_attention
from .swap import Left, Swap, original

_STOCK = "transformers.models.big_bird.modeling_big_bird"
_ATTENTION = ("BigBirdBlockSparseAttention", "BigBirdSelfAttention")

# module -> {(length, device): (row_offsets, col_index, state of NumPy's generator afterwards)}
_drawn: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()


def swap(module: Any, config: Any) -> Swap | Left | None:
    stock = next((c for c in type(module).__mro__ if c.__module__ == _STOCK and c.__name__ in _ATTENTION), None)
    if stock is None:
        return None
    if type(module).forward is not stock.forward or not original(stock):
        return Left(f"{type(module).__name__} has a forward of its own")
    if stock.__name__ == _ATTENTION[1]:
        return Left("attention_type original_full is dense attention outside of Hugging Face's attention registry")
    if module.num_random_blocks < 1:
        return Left("num_random_blocks is 0, which the stock module cannot run either")
    return Swap(forward, "attention: block_sparse_attention", "output_attentions")


def forward(
    self: Any,
    hidden_states: Tensor,
    band_mask: Tensor | None = None,
    from_mask: Tensor | None = None,
    to_mask: Tensor | None = None,
    from_blocked_mask: Tensor | None = None,
    to_blocked_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``BigBirdBlockSparseAttention.forward``, without the dense matrix of attention weights."""
    if kwargs.get("output_attentions") or _recorded():
        return type(self).forward(
            self, hidden_states, band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask, **kwargs
        )
    assert from_mask is not None and to_mask is not None
    length = hidden_states.shape[1]
    if length % self.block_size != 0:
        raise ValueError("Query sided sequence length must be multiple of block size")
    heads = (self.num_attention_heads, self.attention_head_size)
    q, k, v = (layer(hidden_states).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    if self.training:
        row_offsets, col_index = _training_lists(self, length, hidden_states.device)
    else:
        row_offsets, col_index = _evaluation_lists(
            length // self.block_size, self.num_random_blocks, hidden_states.device
        )
    out, _ = block_sparse_attention(
        q,
        k,
        v,
        row_offsets,
        col_index,
        to_mask[:, 0, 0] != 0,
        block_size=self.block_size,
        scale=self.attention_head_size**-0.5,
    )
    # rows of padding are zero
    return out.flatten(2) * from_mask[:, 0], None


def _recorded() -> bool:
    """Whether the model collects attention weights: ``config.output_attentions`` reaches no module's arguments."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is not None and "attentions" in (collector.get() or ())


@functools.lru_cache(maxsize=64)
def _evaluation_lists(blocks: int, num_random: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _lists(np.zeros((1, blocks - 2, num_random), dtype=np.int64), device)


def _training_lists(self: Any, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lists of this layer; drawn once where it has a seed, since it then draws the same ones in every step."""
    known = _drawn.setdefault(self, {})
    if (length, device) in known:
        *lists, state = known[length, device]
        np.random.set_state(state)
        return tuple(lists)
    np.random.seed(self.seed)
    if length in (1024, 3072, 4096):
        drawn = [
            self._bigbird_block_rand_mask(
                self.max_seqlen,
                self.max_seqlen,
                self.block_size,
                self.block_size,
                self.num_random_blocks,
                last_idx=1024,
            )[: length // self.block_size - 2]
            for _ in range(self.num_attention_heads)
        ]
    else:
        ends, counts = self._get_rand_attn_plan(length, self.block_size, self.num_random_blocks)
        drawn = self._bigbird_block_rand_mask_with_head(
            length, length, self.block_size, self.block_size, self.num_attention_heads, ends, counts
        )
    lists = _lists(np.stack(drawn), device)
    if self.seed is not None:
        known[length, device] = (*lists, np.random.get_state())
    return lists


def _lists(random: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """CSR lists from random blocks ``[H, blocks - 2, num_random]`` of the inner rows.

    First and last row of blocks see everything; the others the first and the last block, themselves and their two
    neighbours, and their random blocks, repeated as often as drawn.
    """
    heads, inner, _ = random.shape
    blocks = inner + 2
    row = np.arange(1, blocks - 1)
    near = np.stack((np.zeros_like(row), row - 1, row, row + 1, np.full_like(row, blocks - 1)), 1)
    columns = np.concatenate((np.broadcast_to(near, (heads, *near.shape)), random), 2)
    listed = np.ones(columns.shape[1:], dtype=bool)
    # the outermost inner rows have a global block for a neighbour: it counts once
    listed[0, 1] = listed[-1, 3] = False
    every = np.broadcast_to(np.arange(blocks), (heads, blocks))
    columns = np.concatenate((every, columns[:, listed], every), 1)
    ends = np.concatenate(([0, blocks], blocks + listed.sum(1).cumsum(), columns.shape[1:]))
    offsets = ends + columns.shape[1] * np.arange(heads)[:, None]
    return (
        torch.from_numpy(offsets.astype(np.int32))[None].to(device),
        torch.from_numpy(columns.astype(np.int32).ravel()).to(device),
    )
