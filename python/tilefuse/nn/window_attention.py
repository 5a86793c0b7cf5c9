"""Sliding-window (or causal) attention with grouped heads: training, prefill and paged decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.attention.paged_attention import paged_attention
from ..ops.attention.window_attention import window_attention, window_from
from ..ops.rope.qk_norm_rope import qk_norm_rope
from ..ops.rope.rope import rope
from ..ops.rope.rope_append_kv import rope_append_kv
from .common import (
    OffsetRMSNorm,
    check_hidden,
    check_positive,
    linear,
    packed_positions,
    readable,
    readable_norm,
    reset_linear,
)
from .paged_cache import PagedKVCache
from .rotary_embedding import RotaryEmbedding, make_tables

__all__ = ["WindowAttention"]

_NAME = "nn.WindowAttention"
# up to this many new tokens per sequence, decode reads the pages; more of them and an empty cache need no pages
_DECODE_TOKENS = 16


class WindowAttention(nn.Module):
    """The attention of Llama, Mistral, Qwen2, Qwen3, Gemma and gpt-oss, with a window.

    ``q, k, v = x W_q, x W_k, x W_v`` per head, optionally an RMSNorm over each head of q and k, RoPE, softmax over the
    keys in the window, ``W_o``.

    * Without a cache (training, scoring): ``rope_qk`` or ``qk_norm_rope``, ``window_attention``. Differentiable.
    * With a cache: ``rope_append_kv`` writes keys and values; a first long chunk attends to itself with
      ``window_attention``, every later one and decode read the pages with ``paged_attention``.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: width of x, Hq, Hkv (divides Hq; None: Hq), D (None:
            ``hidden_size // num_heads``).
        window: ``(left, right)``, both inclusive, -1 = unbounded; ``(-1, 0)`` is causal. Hugging Face's
            ``sliding_window=W`` is ``tilefuse.window_from("hf", W)``. A cache needs ``right == 0``.
        qkv_bias, o_bias: biases of the projections.
        qk_norm: RMSNorm over the heads of q and k (Qwen3, Gemma-3). norm_eps: its epsilon. norm_weight_offset: 1.0
            for Gemma, whose weights are stored less 1.
        sinks: a learned logit per head (gpt-oss).
        scale: of the scores, None is ``D ** -0.5``. softcap: 0 is off.
        rotary_dim: rotated dims, None is D. rope_theta, rope_scaling, max_position_embeddings, interleaved: of the
            tables. rotary_emb: tables to share between layers; None makes own ones.
        layer_idx: which layer of a cache this is.
        initializer_range: standard deviation of ``reset_parameters``.
        device, dtype: of the parameters.

    State dict, as ``LlamaAttention``, ``MistralAttention``, ``Qwen2Attention``, ``Qwen3Attention`` and
    ``GptOssAttention`` have it: ``q_proj.weight [Hq D, hidden]``, ``k_proj.weight``, ``v_proj.weight [Hkv D, hidden]``,
    ``o_proj.weight [hidden, Hq D]``, their ``bias``, ``q_norm.weight``, ``k_norm.weight [D]``, ``sinks [Hq]``.

    Raises:
        ValueError: sizes below 1, head counts that do not divide, a window below -1, tables of another width.

    Example::

        attn = tilefuse.nn.WindowAttention(512, 8, 2, window=tilefuse.window_from("hf", 128))
        y = attn(torch.randn(2, 1000, 512))
        cache = tilefuse.nn.PagedKVCache(2, 1024, num_kv_heads=2, head_dim=64, dtype=torch.float32)
        with torch.no_grad():
            cache.extend(1000)
            y = attn(torch.randn(2, 1000, 512), cache=cache)
            cache.extend(1)
            y = attn(torch.randn(2, 1, 512), cache=cache)

    Sources: Mistral 7B (arXiv 2310.06825); Qwen3 (2505.09388); gpt-oss.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        window: Sequence[int] = (-1, 0),
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_weight_offset: float = 0.0,
        sinks: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        rotary_dim: int | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        max_position_embeddings: int = 4096,
        interleaved: bool = False,
        rotary_emb: RotaryEmbedding | None = None,
        layer_idx: int = 0,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(_NAME, hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            errors.value_error(_NAME, "num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
        if head_dim is None and hidden_size % num_heads:
            errors.value_error(_NAME, "head_dim", f"given where {num_heads} heads do not divide {hidden_size}", None)
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        check_positive(_NAME, head_dim=head_dim)
        if len(window) != 2 or min(window) < -1:
            errors.value_error(_NAME, "window", "(left, right), each >= 0 or -1 for unbounded", tuple(window))
        if not norm_eps > 0:
            errors.value_error(_NAME, "norm_eps", "positive", norm_eps)
        if not softcap >= 0:
            errors.value_error(_NAME, "softcap", "0 (off) or positive", softcap)
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = (
            hidden_size, num_heads, num_kv_heads, head_dim,
        )  # fmt: skip
        self.window = (int(window[0]), int(window[1]))
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap, self.norm_eps, self.norm_weight_offset = softcap, norm_eps, norm_weight_offset
        self.layer_idx, self.initializer_range = layer_idx, initializer_range
        factory = {"device": device, "dtype": dtype}
        self.q_proj = linear(hidden_size, num_heads * head_dim, qkv_bias, **factory)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias, **factory)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias, **factory)
        self.o_proj = linear(num_heads * head_dim, hidden_size, o_bias, **factory)
        self.q_norm, self.k_norm = (self._norm(**factory) if qk_norm else None for _ in range(2))
        if sinks:
            self.sinks = nn.Parameter(torch.empty(num_heads, **factory))
        else:
            self.register_parameter("sinks", None)
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim > head_dim:
            errors.value_error(_NAME, "rotary_dim", f"at most head_dim {head_dim}", rotary_dim)
        if rotary_emb is None:
            rotary_emb = RotaryEmbedding(
                rotary_dim, max_position_embeddings, base=rope_theta, scaling=rope_scaling, interleaved=interleaved,
                device=device,
            )  # fmt: skip
        elif rotary_emb.rotary_offset + rotary_emb.dim > head_dim:
            errors.value_error(_NAME, "rotary_emb", f"of dim at most {head_dim}", rotary_emb.dim)
        self.rotary_emb = rotary_emb
        self.register_load_state_dict_post_hook(make_tables)
        self.reset_parameters()

    def _norm(self, **factory: Any) -> nn.RMSNorm:
        if self.norm_weight_offset:
            return OffsetRMSNorm(self.head_dim, self.norm_weight_offset, eps=self.norm_eps, **factory)
        return nn.RMSNorm(self.head_dim, eps=self.norm_eps, **factory)

    @classmethod
    def from_config(cls, config: Any, layer_idx: int = 0, **kwargs: Any) -> WindowAttention:
        """The module for a Hugging Face config of type llama, mistral, mixtral, qwen2, qwen3 or qwen3_moe."""
        kind = config.model_type
        if kind not in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
            known = "llama, mistral, mixtral, qwen2, qwen3 or qwen3_moe"
            errors.value_error(f"{_NAME}.from_config", "config", f"of type {known}", kind)
        size = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        if layer_types and layer_types[layer_idx] != "sliding_attention":
            size = None
        fields = {
            "head_dim": getattr(config, "head_dim", None), "window": window_from("hf", size) if size else (-1, 0),
            "qkv_bias": kind == "qwen2" or getattr(config, "attention_bias", False),
            "o_bias": getattr(config, "attention_bias", False), "qk_norm": kind in ("qwen3", "qwen3_moe"),
            "norm_eps": config.rms_norm_eps, "rope_scaling": config.rope_parameters,
            "max_position_embeddings": config.max_position_embeddings, "layer_idx": layer_idx,
            "initializer_range": config.initializer_range,
        }  # fmt: skip
        return cls(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, **fields | kwargs)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation ``initializer_range``, biases and sinks 0, norms 1 (less their offset).

        Same seed, same weights.
        """
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if isinstance(layer, nn.Linear):
                reset_linear(layer, self.initializer_range, generator)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.weight.fill_(1.0 - self.norm_weight_offset)
        if self.sinks is not None:
            self.sinks.zero_()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        cache: PagedKVCache | None = None,
    ) -> Tensor:
        """Attention of x to itself, and to what the cache holds.

        Args:
            x: ``[B, S, hidden]``, or packed ``[T, hidden]`` with ``cu_seqlens`` and without a cache.
            positions: ``[B, S]`` or ``[T]`` int32 or int64 for RoPE; None counts from 0 in every sequence, or from the
                cache's lengths. Not with a cache. The window goes by place, not by position.
            cu_seqlens: ``[N + 1]`` int32 or int64, starts of packed sequences.
            cache: of this model, after ``cache.extend(S)``. Inference only.

        Returns:
            x's shape and dtype. Without a cache differentiable; deterministic.

        Raises:
            ValueError: shapes; a cache of other sizes, or one whose ``extend`` did not announce S tokens.
            TypeError: dtypes. RuntimeError: a gradient is needed with a cache.
        """
        check_hidden(_NAME, x, self.hidden_size, cu_seqlens, cache)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if cache is None:
            if positions is None and cu_seqlens is not None:
                positions = packed_positions(cu_seqlens, x.shape[0])
            q, k = self._rotate(q, k, positions)
            out = self._attend(q, k, v, cu_seqlens)
        else:
            if positions is not None:
                errors.value_error(_NAME, "positions", "None with a cache, which knows them", positions)
            self._check_cache(cache, k)
            out = self._cached(q, k, v, cache, cache._planned(_NAME, x, self.layer_idx))
        return self.o_proj(out.flatten(-2))

    def _rotate(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is None or k_norm is None:
            return self.rotary_emb(q, k, positions)
        rotary = self.rotary_emb
        of_q, of_k = (readable_norm(norm, nn.RMSNorm, OffsetRMSNorm) for norm in (q_norm, k_norm))
        if of_q is None or of_k is None or of_q[1:] != of_k[1:] or not readable(rotary, RotaryEmbedding):
            return rotary(q_norm(q).to(q.dtype), k_norm(k).to(k.dtype), positions)
        _, eps, offset = of_q
        cos, sin = rotary.tables(q)
        return qk_norm_rope(
            q, k, of_q[0], of_k[0], cos, sin, positions, eps=eps, weight_offset=offset,
            interleaved=rotary.interleaved, rotary_offset=rotary.rotary_offset,
        )  # fmt: skip

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return window_attention(
            q, k, v, self.sinks, None, cu_seqlens, cu_seqlens, window=self.window, scale=self.scale,
            softcap=self.softcap,
        )[0]  # fmt: skip

    def _check_cache(self, cache: PagedKVCache, k: Tensor) -> None:
        if not isinstance(cache, PagedKVCache):
            errors.value_error(_NAME, "cache", "a PagedKVCache", cache)
        if self.window[1] != 0:
            errors.value_error(_NAME, "window", "(left, 0) with a cache", self.window)
        shape = (self.num_kv_heads, self.head_dim)
        for stored in (cache.k, cache.v):
            if tuple(stored.shape[3:]) != shape:
                errors.value_error(_NAME, "cache", f"of num_kv_heads and head_dim {shape}", tuple(stored.shape[3:]))
        if cache.k.dtype not in (k.dtype, torch.float8_e4m3fn):
            errors.type_error(_NAME, "cache", f"of dtype {errors.dtype_name(k.dtype)} or float8_e4m3fn", cache.k)
        errors.check_device(_NAME, "cache", cache.k, k, "x")

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: PagedKVCache, step: Any) -> Tensor:
        rotary, pages = self.rotary_emb, (cache.k[self.layer_idx], cache.v[self.layer_idx])
        alone = q.shape[1] > _DECODE_TOKENS and cache._prefix_bound == 0
        scales: dict[str, Any] = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
        options: dict[str, Any] = {"interleaved": rotary.interleaved, "rotary_offset": rotary.rotary_offset}
        if self.q_norm is None and readable(rotary, RotaryEmbedding):
            cos, sin = rotary.tables(q)
            rotated = rope(k, cos, sin, step.positions, **options) if alone else k
            q = rope_append_kv(q, k, v, cos, sin, step.positions, *pages, step.slots, **options, **scales)
            k = rotated
        else:
            q, k = self._rotate(q, k, step.positions)
            # norm and rotation are done: the table of angle 0 stores k as it is
            one, zero = (torch.full((1, 1), value, dtype=torch.float32, device=q.device) for value in (1.0, 0.0))
            origin = torch.zeros_like(step.positions)
            q = rope_append_kv(q, k, v, one, zero, origin, *pages, step.slots, **scales)
        if alone:
            return self._attend(q, k, v)
        return paged_attention(
            q, *pages, cache.block_table, step.ends, self.sinks, window=self.window, scale=self.scale,
            softcap=self.softcap, **scales,
        )[0]  # fmt: skip

    def extra_repr(self) -> str:
        parts = [
            f"{self.hidden_size}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
            f"head_dim={self.head_dim}, window={self.window}",
        ]
        if self.sinks is not None:
            parts.append("sinks=True")
        if self.softcap:
            parts.append(f"softcap={self.softcap}")
        return ", ".join(parts)
