"""Attention over listed blocks of keys as a module, with the lists made once per length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.attention.block_pattern import KINDS, BlockPattern, block_pattern
from ..ops.attention.block_sparse_attention import block_sparse_attention
from .common import check_positive, linear, reset_linear

__all__ = ["BlockSparseAttention"]

_NAME = "nn.BlockSparseAttention"


class BlockSparseAttention(nn.Module):
    """Block-sparse self-attention: BigBird, Sparse Transformer, Longformer blocks, or any list of blocks.

    ``q, k, v = x W_q, x W_k, x W_v`` per head; each block of queries sees the blocks of keys on its list in one
    softmax (``tilefuse.block_sparse_attention``); optionally an output projection. Time and memory are O(listed
    blocks). For training and prefill; there is no decode, because the lists belong to whole sequences.

    Args:
        hidden_size, num_heads: width of x, and H, which divides it.
        kind: of ``tilefuse.block_pattern``; ``"from_mask"`` only through ``pattern=`` of forward.
        block_size: tokens of a block.
        causal: hide keys after the query.
        bias: biases of the projections.
        output_projection: adds ``dense``. Hugging Face's module has none: BigBird keeps it in the block around.
        initializer_range: standard deviation of ``reset_parameters``.
        device, dtype: of the parameters.
        pattern: further options of ``tilefuse.block_pattern``: ``window``, ``global_blocks``, ``num_random``, ``seed``,
            ``stride``, ``summary``. ``seed=None`` is what Hugging Face's BigBird does in evaluation; in training it
            draws from NumPy's global generator, here ``seed`` fixes the lists for both modes.

    State dict, as ``BigBirdBlockSparseAttention`` has it: ``query``, ``key``, ``value``, each with
    ``weight [hidden, hidden]`` and ``bias [hidden]``; with ``output_projection`` also ``dense``.

    Raises:
        ValueError: sizes below 1, a head count that does not divide, an unknown kind.

    Example::

        attn = tilefuse.nn.BlockSparseAttention(256, 4, "bigbird", block_size=64, num_random=3)
        y = attn(torch.randn(2, 1024, 256))

    Sources: BigBird (arXiv 2007.14062); Sparse Transformer (1904.10509).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kind: str = "bigbird",
        *,
        block_size: int = 64,
        causal: bool = False,
        bias: bool = True,
        output_projection: bool = False,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **pattern: Any,
    ):
        super().__init__()
        check_positive(_NAME, hidden_size=hidden_size, num_heads=num_heads, block_size=block_size)
        if hidden_size % num_heads:
            errors.value_error(_NAME, "num_heads", f"a divisor of hidden_size {hidden_size}", num_heads)
        if kind not in KINDS:
            errors.value_error(_NAME, "kind", f"one of {', '.join(KINDS)}", kind)
        known = {"window", "global_blocks", "num_random", "seed", "stride", "summary"}
        if unknown := sorted(set(pattern) - known):
            errors.value_error(_NAME, "pattern", f"options among {', '.join(sorted(known))}", unknown)
        self.hidden_size, self.num_heads, self.kind = hidden_size, num_heads, kind
        self.block_size, self.causal, self.pattern_options = block_size, causal, pattern
        self.initializer_range = initializer_range
        self.query = linear(hidden_size, hidden_size, bias, device, dtype)
        self.key = linear(hidden_size, hidden_size, bias, device, dtype)
        self.value = linear(hidden_size, hidden_size, bias, device, dtype)
        self.dense = linear(hidden_size, hidden_size, bias, device, dtype) if output_projection else None
        self._patterns: dict[tuple[int, torch.device], BlockPattern] = {}
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, seed: int | None = 0, **kwargs: Any) -> BlockSparseAttention:
        """The module for a Hugging Face ``BigBirdConfig``."""
        if config.model_type != "big_bird":
            errors.value_error(f"{_NAME}.from_config", "config", "of type big_bird", config.model_type)
        fields = {
            "block_size": config.block_size, "num_random": config.num_random_blocks, "seed": seed,
            "bias": config.use_bias, "initializer_range": config.initializer_range,
        }  # fmt: skip
        return cls(config.hidden_size, config.num_attention_heads, "bigbird", **fields | kwargs)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation ``initializer_range``, biases 0. Same seed, same weights."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                reset_linear(layer, self.initializer_range, generator)

    def pattern(self, seq_len: int, device: torch.device | str | None = None) -> BlockPattern:
        """The lists for sequences of ``seq_len`` tokens, made at the first call for a length and device."""
        if device is None:
            device = next((p.device for p in self.parameters()), torch.get_default_device())
        key = (seq_len, torch.device(device))
        if key not in self._patterns:
            heads = {"num_heads": self.num_heads} if self.kind == "bigbird" else {}
            self._patterns[key] = block_pattern(
                self.kind, seq_len, seq_len, block_size=self.block_size, causal=self.causal, device=key[1], **heads,
                **self.pattern_options,
            )  # fmt: skip
        return self._patterns[key]

    def forward(self, x: Tensor, key_mask: Tensor | None = None, *, pattern: BlockPattern | None = None) -> Tensor:
        """Attention of x to itself over the listed blocks.

        Args:
            x: ``[B, S, hidden]`` float32, bfloat16 or float16.
            key_mask: ``[B, S]`` bool, False = padding that nobody sees.
            pattern: other lists than the module's own, for S queries and keys.

        Returns:
            x's shape and dtype, differentiable.

        Raises:
            ValueError: shapes, or a pattern for another length. TypeError: dtypes.
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            errors.value_error(_NAME, "x", f"[B, S, {self.hidden_size}]", x)
        errors.check_dtype(_NAME, "x", x, errors.FLOATS)
        if pattern is None:
            pattern = self.pattern(x.shape[1], x.device)
        elif (pattern.seq_len_q, pattern.seq_len_k) != (x.shape[1], x.shape[1]):
            got = (pattern.seq_len_q, pattern.seq_len_k)
            errors.value_error(_NAME, "pattern", f"for {x.shape[1]} queries and keys", got)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, self.hidden_size // self.num_heads))
            for layer in (self.query, self.key, self.value)
        )
        out, _ = block_sparse_attention(
            q, k, v, pattern.row_offsets, pattern.col_index, key_mask, block_size=pattern.block_size,
            causal=self.causal,
        )  # fmt: skip
        out = out.flatten(-2)
        return out if self.dense is None else self.dense(out)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.pattern_options.items())
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, kind={self.kind}, block_size={self.block_size}, "
            f"causal={self.causal}{options}"
        )
