"""The attention of Longformer, and of LED's encoder which is the same code, through ``global_attention``.

Longformer uses neither of the attention registries: its layers slice, pad and transpose chunks of the sequence. Here
one call does the window, the global tokens and their own projections, in O(S * (window + G)) memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.attention.global_attention import global_attention
from .swap import Left, Swap, original

_STOCK = {
    ("transformers.models.longformer.modeling_longformer", "LongformerSelfAttention"),
    ("transformers.models.led.modeling_led", "LEDEncoderSelfAttention"),
}


def swap(module: Any, config: Any) -> Swap | Left | None:
    stock = next((c for c in type(module).__mro__ if (c.__module__, c.__name__) in _STOCK), None)
    if stock is None:
        return None
    if type(module).forward is not stock.forward or not original(stock):
        return Left(f"{type(module).__name__} has a forward of its own")
    left = ["output_attentions"]
    if module.dropout > 0:
        left.append(f"training (attention dropout {module.dropout:g})")
    return Swap(forward, "attention: global_attention", " and ".join(left))


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    is_index_masked: Tensor | None = None,
    is_index_global_attn: Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """``LongformerSelfAttention.forward``.

    The model passes its mask already split: padding (negative in attention_mask) is ``is_index_masked``, global
    tokens (positive) are ``is_index_global_attn``.
    """
    if output_attentions or (self.training and self.dropout > 0):
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            is_index_masked,
            is_index_global_attn,
            is_global_attn,
            output_attentions,
        )
    assert is_index_masked is not None
    heads = (self.num_heads, self.head_dim)
    q, k, v = (layer(hidden_states).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    index = is_index_masked.new_empty((len(hidden_states), 0), dtype=torch.int64)
    q_global = k_global = v_global = None
    if is_global_attn and is_index_global_attn is not None:
        index, q_global, k_global, v_global = _of_globals(self, hidden_states, is_index_global_attn)
    half = self.one_sided_attn_window_size
    out, _ = global_attention(
        q, k, v, index, q_global, k_global, v_global, ~is_index_masked, window=(half, half), scale=self.head_dim**-0.5
    )
    return (out.flatten(2),)


def _of_globals(self: Any, hidden_states: Tensor, is_global: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the global tokens ``[B, G]``, -1 behind a row's last, and their projections ``[B, S, H, D]``."""
    length = hidden_states.shape[1]
    # G decides shapes, so the host must know it; the stock module asks for it too
    most = int(is_global.sum(1).max())
    position = torch.arange(length, device=is_global.device)
    # ascending; `length` marks places without a token
    place = torch.where(is_global, position, length).topk(most, dim=1, largest=False).values
    # only global rows need a query: projected on their own, then put where the op reads them
    rows = hidden_states.gather(1, place.clamp(max=length - 1)[..., None].expand(-1, -1, hidden_states.shape[2]))
    rows = self.query_global(rows)
    q_global = rows.new_zeros(rows.shape[0], length + 1, rows.shape[2])
    q_global = q_global.scatter(1, place[..., None].expand_as(rows), rows)[:, :length]
    heads = (self.num_heads, self.head_dim)
    projections = (q_global, self.key_global(hidden_states), self.value_global(hidden_states))
    return place.masked_fill(place == length, -1), *(x.unflatten(-1, heads) for x in projections)
