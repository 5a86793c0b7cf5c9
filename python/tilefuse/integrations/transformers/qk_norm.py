"""Attention with RMSNorm over each head of q and k before the rotary embedding, in one kernel (Qwen3, Gemma 3)."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from ...ops.rope.qk_norm_rope import qk_norm_rope
from . import norm, rope
from .swap import hooked, same_code

# model, class of the norm -> what its weight misses
_NORMS = (("qwen3", "Qwen3RMSNorm", 0.0), ("gemma3", "Gemma3RMSNorm", 1.0))
# classes whose forward is the one below, but for the place of a transpose
_ATTENTIONS = (
    ("qwen3", "Qwen3Attention", True),
    ("qwen3_moe", "Qwen3MoeAttention", True),
    ("gemma3", "Gemma3Attention", True),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# class of a norm -> what its weight misses, None: not of a known form
_offsets: dict[type, float | None] = {}


def weight_offset(module: Any) -> float | None:
    """What the norms add to their weights, or None if they are not of a known form."""
    if same_code(module, _ATTENTIONS) is None:
        return None
    offsets = {_offset(norm) for norm in (module.q_norm, module.k_norm)}
    return offsets.pop() if len(offsets) == 1 else None


def _offset(norm: Any) -> float | None:
    if type(norm) not in _offsets:
        _offsets[type(norm)] = same_code(norm, _NORMS)
    return _offsets[type(norm)]


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def fuse(otherwise: types.FunctionType, offset: float) -> types.FunctionType:
    """The fused forward; ``otherwise`` runs where it cannot, and has the registry of attention functions."""
    registry = otherwise.__globals__["ALL_ATTENTION_FUNCTIONS"]
    eager = otherwise.__globals__["eager_attention_forward"]

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert position_embeddings is not None
        cos, sin = position_embeddings
        q_norm, k_norm = self.q_norm, self.k_norm
        if (
            # a hook must run, and one that moves a weight must have moved it
            hooked(q_norm, norm.norm_forward)
            or hooked(k_norm, norm.norm_forward)
            # another module may have taken its place, around it or instead of it
            or not _offset(q_norm) == _offset(k_norm) == offset
            or _eps(q_norm) != _eps(k_norm)
            or q_norm.weight.dtype not in _DTYPES
            or cos.dim() != 3
            or cos.shape[0] not in (1, hidden_states.shape[0])
            or hidden_states.device.type not in ("cpu", "cuda")
        ):
            return otherwise(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        # tables hold every angle twice
        half = cos.shape[-1] // 2
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # [B, S, H, D]
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = rope.by_token(
            qk_norm_rope,
            q,
            k,
            cos[..., :half],
            sin[..., :half],
            q_norm.weight,
            k_norm.weight,
            eps=_eps(q_norm),
            weight_offset=offset,
        )
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        function = registry.get_interface(self.config._attn_implementation, eager)
        out, weights = function(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return forward
