"""Rotary position embedding as a module: the tables of one model, shared by its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.rope.rope import rope, rope_qk
from ..ops.rope.rope_tables import rope_tables, rope_type
from .common import keep_dtype

__all__ = ["RotaryEmbedding"]

_NAME = "nn.RotaryEmbedding"


def make_tables(owner: Any, _: Any = None) -> None:
    """After ``load_state_dict(assign=True)`` into a module on the meta device: the tables follow its parameters."""
    rotary, device = owner.rotary_emb, next(owner.parameters()).device
    if rotary.cos.is_meta and device.type != "meta":
        rotary.cos, rotary.sin = rotary._tables(device)


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions.

    Pair ``(a, b)`` at position p becomes ``(a cos - b sin, b cos + a sin)`` with the row p of the tables, in float32
    with one rounding (``tilefuse.rope_qk``). The tables are made once for ``max_positions`` rows.

    Args:
        dim: rotary dim R, even. Dims of a head outside of ``[rotary_offset, rotary_offset + R)`` pass through.
        max_positions: rows of the tables. A longer position is an error on the CPU and clamped on a GPU.
        base: theta; ``scaling``'s ``rope_theta`` wins over it.
        scaling: a Hugging Face ``rope_parameters`` or ``rope_scaling`` dict: default, linear, dynamic, yarn, longrope,
            llama3 (see ``tilefuse.rope_tables``). The attention factor is folded into the tables.
        seq_len: the length that ``dynamic`` and ``longrope`` adapt to; None is Hugging Face's state before the first
            forward. (Hugging Face changes its tables while it runs; here they are fixed.)
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R / 2)``.
        rotary_offset: first dim of the rotary slice.
        angle_dtype: float64 tables are right to the last bit; float32 has Hugging Face's bits.
        device: of the tables; on the meta device they are made when the module leaves it or is first called.

    Buffers, not in the state dict (nor are Hugging Face's): ``cos``, ``sin`` ``[max_positions, R / 2]``. They stay
    float32 whatever ``.to(dtype)``, ``.half()`` or ``to_empty`` do to the rest of a model.

    Raises:
        ValueError, TypeError: as ``tilefuse.rope_tables`` and ``tilefuse.rope_qk``.

    Example::

        rotary = tilefuse.nn.RotaryEmbedding(64, 4096)
        q, k = rotary(torch.randn(2, 512, 8, 64), torch.randn(2, 512, 2, 64))
    """

    def __init__(
        self,
        dim: int,
        max_positions: int = 4096,
        *,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        seq_len: int | None = None,
        interleaved: bool = False,
        rotary_offset: int = 0,
        angle_dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if dim < 2 or dim % 2:
            errors.value_error(_NAME, "dim", "even and at least 2", dim)
        if max_positions < 1:
            errors.value_error(_NAME, "max_positions", "at least 1", max_positions)
        if rotary_offset < 0:
            errors.value_error(_NAME, "rotary_offset", "at least 0", rotary_offset)
        self.dim, self.max_positions, self.base = dim, max_positions, base
        self.scaling = None if scaling is None else dict(scaling)
        self.seq_len, self.angle_dtype = seq_len, angle_dtype
        self.interleaved, self.rotary_offset = interleaved, rotary_offset
        cos, sin = self._tables(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        return rope_tables(
            self.dim, self.max_positions, base=self.base, scaling=self.scaling, seq_len=self.seq_len,
            angle_dtype=self.angle_dtype, device=device,
        )  # fmt: skip

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin``, made on the device of x if they are still on the meta device.

        That is where ``load_state_dict(assign=True)`` leaves them in a model that was built there.
        """
        if self.cos.is_meta and not x.is_meta:
            self.cos, self.sin = self._tables(x.device)
        return self.cos, self.sin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        moved = keep_dtype({"cos": self.cos, "sin": self.sin}, fn)
        if self.cos.is_meta and not moved["cos"].is_meta:
            moved["cos"], moved["sin"] = self._tables(moved["cos"].device)
        self._buffers.update(moved)
        return self

    def forward(
        self, q: Tensor, k: Tensor | None = None, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates q and k.

        Args:
            q: ``[B, S, Hq, D]`` or packed ``[T, Hq, D]``; float32, bfloat16 or float16.
            k: the same with its own number of heads, or None.
            positions: ``[B, S]`` or ``[T]`` int32 or int64; None counts 0, 1, .. in every sequence.
            cu_seqlens: ``[B + 1]``, starts of packed sequences; only without positions.

        Returns:
            ``(q', k')``, or ``q'`` alone without k. Differentiable in both.
        """
        options = {"interleaved": self.interleaved, "rotary_offset": self.rotary_offset}
        cos, sin = self.tables(q)
        if k is None:
            return rope(q, cos, sin, positions, cu_seqlens, **options)
        return rope_qk(q, k, cos, sin, positions, cu_seqlens, **options)

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, max_positions={self.max_positions}, base={self.base}"]
        if self.scaling:
            parts.append(f"scaling={rope_type(self.scaling)}")
        if self.interleaved:
            parts.append("interleaved=True")
        if self.rotary_offset:
            parts.append(f"rotary_offset={self.rotary_offset}")
        return ", ".join(parts)
