"""Multi-head latent attention: training, prefill and paged decode from one set of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.mla.merge_attention import merge_attention
from ..ops.mla.mla_absorb_query import mla_absorb_query
from ..ops.mla.mla_append_kv import mla_append_kv
from ..ops.mla.mla_attention import mla_attention
from ..ops.mla.mla_compress_kv import mla_compress_kv
from ..ops.mla.mla_decode import mla_decode
from ..ops.mla.mla_expand_kv import mla_expand_kv
from ..ops.mla.mla_gather_kv import mla_gather_kv
from ..ops.rope.rope import rope
from ..ops.rope.rope_tables import rope_type
from .common import check_hidden, check_positive, linear, packed_positions, readable, readable_norm, reset_linear
from .fp8_linear import FP8Linear
from .paged_cache import PagedLatentCache
from .rotary_embedding import RotaryEmbedding, make_tables

__all__ = ["MultiheadLatentAttention"]

_NAME = "nn.MultiheadLatentAttention"


class MultiheadLatentAttention(nn.Module):
    """The attention of DeepSeek-V2, V3 and Kimi K2, with one set of weights for three ways to run.

    With ``c = [norm(x W_a)_R | rope(x W_a)_r]`` (the latent row), per head ``q = [q_nope | rope(q_rope)]``,
    ``k = [W_uk c_R | c_r]``, ``v = W_uv c_R`` and ``out = W_o softmax(s q k^T) v``, where
    ``s = (P + r) ** -0.5 * mscale ** 2``.

    * Without a cache (training, scoring): ``mla_compress_kv``, ``mla_expand_kv``, ``mla_attention``. Differentiable.
    * With a cache and up to ``absorb_tokens`` new tokens per sequence (decode, speculative decode): ``mla_append_kv``,
      ``mla_absorb_query``, ``mla_decode``. The latent cache is read as it is, keys and values are never expanded. This
      reads the weight of ``kv_b_proj``, so it needs a plain ``nn.Linear`` or ``FP8Linear`` there.
    * With a cache and more new tokens (prefill, also in chunks): the new tokens as in training, and what the cache
      holds already is gathered, expanded and merged, ``prefix_chunk`` tokens at a time.

    The module chooses by itself. Whatever else stands in the place of ``kv_b_proj`` or ``kv_a_layernorm`` (an adapter,
    another quantised layer, one that is sharded, offloaded or has hooks) is called on latent rows instead, in decode as
    in prefill: right, but it expands what the cache holds at every step. Merge adapters before a long decode.

    Args:
        hidden_size, num_heads: width of x, and H.
        q_lora_rank: rank of the query's down-projection; None projects x directly.
        kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: R, P, r (even), V.
        bias: biases of the down-projections and of ``o_proj`` (Hugging Face's ``attention_bias``).
        rope_theta, rope_scaling, max_position_embeddings: of the rotary tables. A ``yarn`` dict also brings
            ``mscale_all_dim``, whose ``mscale ** 2`` enters the softmax scale.
        interleaved: pairs ``(2i, 2i + 1)``, as DeepSeek's weights want it (``rope_interleave``).
        norm_eps: of both inner norms; DeepSeek's is 1e-6 whatever ``rms_norm_eps`` says.
        rotary_emb: tables to share between layers; None makes own ones.
        layer_idx: which layer of a cache this is.
        absorb_tokens: see above; ``mla_decode`` is made for up to 16.
        prefix_chunk: tokens of a sequence's cached prefix that are expanded at a time; bounds the workspace.
        num_splits: of ``mla_decode``; a fixed number makes decode batch-invariant.
        initializer_range: standard deviation of ``reset_parameters``.
        device, dtype: of the parameters.

    State dict, as ``DeepseekV3Attention`` and ``DeepseekV2Attention`` have it: ``q_proj.weight [H (P + r), hidden]``
    or ``q_a_proj.weight [q_lora_rank, hidden]``, ``q_a_layernorm.weight``, ``q_b_proj.weight``;
    ``kv_a_proj_with_mqa.weight [R + r, hidden]``, ``kv_a_layernorm.weight [R]``, ``kv_b_proj.weight [H (P + V), R]``,
    ``o_proj.weight [hidden, H V]``; with ``bias`` also ``q_a_proj.bias``, ``kv_a_proj_with_mqa.bias``, ``o_proj.bias``.

    Raises:
        ValueError: sizes below 1, an odd r, tables of another width or pairing.

    Example::

        attn = tilefuse.nn.MultiheadLatentAttention(512, 8, kv_lora_rank=128, qk_nope_head_dim=32,
                                                    qk_rope_head_dim=16, v_head_dim=32)
        y = attn(torch.randn(2, 100, 512))                      # training
        cache = tilefuse.nn.PagedLatentCache(2, 256, kv_lora_rank=128, qk_rope_head_dim=16, dtype=torch.float32)
        with torch.no_grad():
            cache.extend(100)
            y = attn(torch.randn(2, 100, 512), cache=cache)     # prefill
            cache.extend(1)
            y = attn(torch.randn(2, 1, 512), cache=cache)       # decode

    Source: DeepSeek-AI, DeepSeek-V2 (arXiv 2405.04434), section 2.1, and DeepSeek-V3 (2412.19437).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        bias: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        max_position_embeddings: int = 4096,
        interleaved: bool = True,
        norm_eps: float = 1e-6,
        rotary_emb: RotaryEmbedding | None = None,
        layer_idx: int = 0,
        absorb_tokens: int = 16,
        prefix_chunk: int = 4096,
        num_splits: int = 0,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_positive(
            _NAME, hidden_size=hidden_size, num_heads=num_heads, kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim, v_head_dim=v_head_dim,
            prefix_chunk=prefix_chunk,
        )  # fmt: skip
        if q_lora_rank is not None:
            check_positive(_NAME, q_lora_rank=q_lora_rank)
        if qk_rope_head_dim % 2:
            errors.value_error(_NAME, "qk_rope_head_dim", "even", qk_rope_head_dim)
        if not norm_eps > 0:
            errors.value_error(_NAME, "norm_eps", "positive", norm_eps)
        if absorb_tokens < 1:
            errors.value_error(_NAME, "absorb_tokens", "at least 1", absorb_tokens)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.norm_eps, self.interleaved, self.layer_idx = norm_eps, interleaved, layer_idx
        self.absorb_tokens, self.prefix_chunk, self.num_splits = absorb_tokens, prefix_chunk, num_splits
        self.initializer_range = initializer_range
        factory = {"device": device, "dtype": dtype}
        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, num_heads * self.qk_head_dim, False, **factory)
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank, bias, **factory)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=norm_eps, **factory)
            self.q_b_proj = linear(q_lora_rank, num_heads * self.qk_head_dim, False, **factory)
        self.kv_a_proj_with_mqa = linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias, **factory)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=norm_eps, **factory)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), False, **factory)
        self.o_proj = linear(num_heads * v_head_dim, hidden_size, bias, **factory)
        if rotary_emb is None:
            rotary_emb = RotaryEmbedding(
                qk_rope_head_dim, max_position_embeddings, base=rope_theta, scaling=rope_scaling,
                interleaved=interleaved, device=device,
            )  # fmt: skip
        elif rotary_emb.dim != qk_rope_head_dim:
            errors.value_error(_NAME, "rotary_emb", f"of dim {qk_rope_head_dim}", rotary_emb.dim)
        elif rotary_emb.interleaved != interleaved:
            errors.value_error(_NAME, "rotary_emb", f"interleaved={interleaved}", rotary_emb.interleaved)
        self.rotary_emb = rotary_emb
        self.register_load_state_dict_post_hook(make_tables)
        self.softmax_scale = self.qk_head_dim**-0.5 * _mscale(rope_scaling or rotary_emb.scaling or {}) ** 2
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, layer_idx: int = 0, **kwargs: Any) -> MultiheadLatentAttention:
        """The module for a Hugging Face ``DeepseekV3Config`` or ``DeepseekV2Config`` (or anything with its fields)."""
        fields = {
            "q_lora_rank": config.q_lora_rank, "kv_lora_rank": config.kv_lora_rank,
            "qk_nope_head_dim": config.qk_nope_head_dim, "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim, "bias": config.attention_bias, "rope_scaling": config.rope_parameters,
            "max_position_embeddings": config.max_position_embeddings,
            "interleaved": getattr(config, "rope_interleave", True), "layer_idx": layer_idx,
            "initializer_range": config.initializer_range,
        }  # fmt: skip
        return cls(config.hidden_size, config.num_attention_heads, **fields | kwargs)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation ``initializer_range``, biases 0, norms 1. Same seed, same weights."""
        for child in self.children():
            if isinstance(child, nn.Linear):
                reset_linear(child, self.initializer_range, generator)
            elif isinstance(child, nn.RMSNorm):
                child.reset_parameters()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        cache: PagedLatentCache | None = None,
    ) -> Tensor:
        """Causal attention of x to itself, and to what the cache holds.

        Args:
            x: ``[B, S, hidden]``, or packed ``[T, hidden]`` with ``cu_seqlens`` and without a cache.
            positions: ``[B, S]`` or ``[T]`` int32 or int64; None counts from 0 in every sequence, or from the cache's
                lengths. Not with a cache.
            cu_seqlens: ``[N + 1]`` int32 or int64, starts of packed sequences.
            cache: of this model, after ``cache.extend(S)``. Inference only.

        Returns:
            x's shape and dtype. Without a cache differentiable; deterministic.

        Raises:
            ValueError: shapes; a cache of other sizes, or one whose ``extend`` did not announce S tokens.
            TypeError: dtypes. RuntimeError: a gradient is needed with a cache.
        """
        check_hidden(_NAME, x, self.hidden_size, cu_seqlens, cache)
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.num_heads, self.qk_head_dim))
        kv_a = self.kv_a_proj_with_mqa(x).flatten(0, -2)
        if cache is None:
            out = self._train(q, kv_a, positions, cu_seqlens)
        else:
            if positions is not None:
                errors.value_error(_NAME, "positions", "None with a cache, which knows them", positions)
            self._check_cache(cache, kv_a)
            step = cache._planned(_NAME, x, self.layer_idx)
            weight = self._up_projection(q.dtype) if x.shape[1] <= self.absorb_tokens else None
            if weight is None:
                out = self._prefill(q, kv_a, cache, step)
            else:
                out = self._decode(q, kv_a, weight, cache, step)
        return self.o_proj(out.flatten(-2))

    def _check_cache(self, cache: PagedLatentCache, kv_a: Tensor) -> None:
        if not isinstance(cache, PagedLatentCache):
            errors.value_error(_NAME, "cache", "a PagedLatentCache", cache)
        sizes = (self.kv_lora_rank, self.qk_rope_head_dim)
        if (cache.kv_lora_rank, cache.qk_rope_head_dim) != sizes:
            got = (cache.kv_lora_rank, cache.qk_rope_head_dim)
            errors.value_error(_NAME, "cache", f"of kv_lora_rank and qk_rope_head_dim {sizes}", got)
        if cache.layout == "bf16" and cache.rows.dtype != kv_a.dtype:
            errors.type_error(_NAME, "cache", f"of dtype {errors.dtype_name(kv_a.dtype)}", cache.rows)
        errors.check_device(_NAME, "cache", cache.rows, kv_a, "x")

    def _latent(self, kv_a: Tensor, positions: Tensor | None) -> Tensor:
        cos, sin = self.rotary_emb.tables(kv_a)
        norm = readable_norm(self.kv_a_layernorm, nn.RMSNorm)
        if norm is not None:
            return mla_compress_kv(
                kv_a, norm[0], cos, sin, positions, eps=norm[1], interleaved=self.rotary_emb.interleaved
            )
        latent, rotated = kv_a.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        row = torch.cat((self.kv_a_layernorm(latent).to(kv_a.dtype), rotated), -1)[:, None]
        options = {"interleaved": self.rotary_emb.interleaved, "rotary_offset": self.kv_lora_rank}
        return rope(row, cos, sin, positions, **options)[:, 0]

    def _append(self, kv_a: Tensor, cache: PagedLatentCache, step: Any) -> None:
        positions, slots = step.positions.view(-1), step.slots.view(-1)
        norm = readable_norm(self.kv_a_layernorm, nn.RMSNorm)
        if norm is not None:
            cos, sin = self.rotary_emb.tables(kv_a)
            mla_append_kv(
                kv_a, norm[0], cos, sin, positions, cache.rows[self.layer_idx], slots,
                eps=norm[1], interleaved=self.rotary_emb.interleaved, layout=cache.layout,
            )  # fmt: skip
        else:
            cache._store(self.layer_idx, self._latent(kv_a, positions), slots)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        weight = self._up_projection(latent.dtype)
        if weight is not None:
            return mla_expand_kv(latent, weight, kv_lora_rank=self.kv_lora_rank, nope_dim=sizes[0], v_dim=sizes[1])
        wide = self.kv_b_proj(latent[:, : self.kv_lora_rank]).to(latent.dtype)
        k, v = wide.unflatten(-1, (self.num_heads, sum(sizes))).split(sizes, -1)
        rotated = latent[:, None, self.kv_lora_rank :].expand(-1, self.num_heads, -1)
        return torch.cat((k, rotated), -1), v

    def _up_projection(self, dtype: torch.dtype) -> Tensor | None:
        """``[H (P + V), R]`` in the dtype of its input, which is narrower under autocast; None if it must be called."""
        layer: Any = self.kv_b_proj
        if not readable(layer, nn.Linear, FP8Linear) or layer.bias is not None:
            return None
        if layer.weight.dtype == torch.float8_e4m3fn:
            return layer.dequantize(dtype)
        return layer.weight.to(dtype)

    def _rotate(self, q: Tensor, positions: Tensor | None) -> Tensor:
        cos, sin = self.rotary_emb.tables(q)
        options = {"interleaved": self.rotary_emb.interleaved, "rotary_offset": self.qk_nope_head_dim}
        return rope(q, cos, sin, positions, **options)

    def _train(self, q: Tensor, kv_a: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if positions is None:
            if cu_seqlens is not None:
                positions = packed_positions(cu_seqlens, q.shape[0])
            else:
                positions = torch.arange(q.shape[1], device=q.device, dtype=torch.int32).expand(q.shape[0], -1)
        elif positions.shape != q.shape[:-2]:
            errors.value_error(_NAME, "positions", f"{[*q.shape[:-2]]}", positions)
        k, v = self._expand(self._latent(kv_a, positions.reshape(-1)))
        q = self._rotate(q, positions)
        k, v = k.view(*q.shape[:-2], *k.shape[1:]), v.view(*q.shape[:-2], *v.shape[1:])
        return mla_attention(q, k, v, cu_seqlens, cu_seqlens, softmax_scale=self.softmax_scale)[0]

    def _decode(self, q: Tensor, kv_a: Tensor, weight: Tensor, cache: PagedLatentCache, step: Any) -> Tensor:
        self._append(kv_a, cache, step)
        cos, sin = self.rotary_emb.tables(q)
        weight = weight.view(self.num_heads, -1, self.kv_lora_rank)
        w_uk, w_uv = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        absorbed = mla_absorb_query(
            q.flatten(0, 1), w_uk, cos, sin, step.positions.view(-1), interleaved=self.rotary_emb.interleaved
        )
        out, _ = mla_decode(
            absorbed.view(*q.shape[:2], *absorbed.shape[1:]), cache.rows[self.layer_idx], cache.block_table, step.ends,
            softmax_scale=self.softmax_scale, kv_lora_rank=self.kv_lora_rank, layout=cache.layout,
            num_splits=self.num_splits,
        )  # fmt: skip
        # [H, B S, R] @ [H, R, V]
        values = out.flatten(0, 1).transpose(0, 1) @ w_uv.transpose(1, 2)
        return values.transpose(0, 1).view(*q.shape[:3], self.v_head_dim)

    def _prefill(self, q: Tensor, kv_a: Tensor, cache: PagedLatentCache, step: Any) -> Tensor:
        batch, tokens = q.shape[:2]
        self._append(kv_a, cache, step)
        q = self._rotate(q, step.positions)
        k, v = self._expand(self._latent(kv_a, step.positions.view(-1)))
        k, v = k.view(batch, tokens, *k.shape[1:]), v.view(batch, tokens, *v.shape[1:])
        out, lse = mla_attention(q, k, v, softmax_scale=self.softmax_scale)
        pages_at_once = -(-self.prefix_chunk // cache.page_size)
        bounds = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * tokens
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        # a captured graph also serves the longer prefixes to come
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        longest = cache.max_length if capturing else cache._prefix_bound
        for first in range(0, -(-longest // cache.page_size), pages_at_once):
            start = first * cache.page_size
            table = cache.block_table[:, first : first + pages_at_once]
            width = min(table.shape[1] * cache.page_size, longest - start)
            lengths = (step.starts - start).clamp(0, width)
            prefix = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            latent = mla_gather_kv(
                cache.rows[self.layer_idx], table, prefix, total_tokens=batch * width, kv_lora_rank=self.kv_lora_rank,
                layout=cache.layout, out_dtype=q.dtype,
            )  # fmt: skip
            k, v = self._expand(latent)
            part, part_lse = mla_attention(
                q.flatten(0, 1), k, v, bounds, prefix, softmax_scale=self.softmax_scale, causal=False
            )
            out, lse = merge_attention(out, lse, part, part_lse)
        return out.view(batch, tokens, *out.shape[1:])

    def extra_repr(self) -> str:
        rank = "" if self.q_lora_rank is None else f"q_lora_rank={self.q_lora_rank}, "
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, {rank}kv_lora_rank={self.kv_lora_rank}, "
            f"qk_nope_head_dim={self.qk_nope_head_dim}, qk_rope_head_dim={self.qk_rope_head_dim}, "
            f"v_head_dim={self.v_head_dim}, softmax_scale={self.softmax_scale:.6g}"
        )


def _mscale(scaling: Mapping[str, Any]) -> float:
    """What DeepSeek multiplies queries and keys with: 1, or yarn's attention temperature for all dims."""
    kind = rope_type(scaling)
    weight, factor = scaling.get("mscale_all_dim"), scaling.get("factor")
    if kind == "default" or not weight or not factor or factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1.0
