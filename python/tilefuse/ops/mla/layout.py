"""The bytes of a paged latent cache: the one place that every layer takes them from.

A cache is ``[pages, page_size, width]``. Token ``i`` of a sequence lives in row ``i % page_size`` of page
``block_table[b, i // page_size]``; a slot is ``page * page_size + row``. A row holds the ``R`` normed latent values
(``kv_lora_rank``) and the ``r`` rotated RoPE values of one token, shared by all heads:

``layout="bf16"``
    ``width = R + r`` elements of the cache's own dtype (bfloat16 or float16; float32 and float64 for checks)::

        element  [0, R)        normed latent
        element  [R, R + r)    rotated part

``layout="fp8"``
    uint8, ``width = R + 4 * (R / 128) + 2 * r`` bytes; with R = 512 and r = 64 the 656 bytes of FlashMLA's and
    vLLM's ``fp8_ds_mla``::

        byte  [0, R)                        R float8_e4m3fn codes of the normed latent
        byte  [R, R + R / 32)               R / 128 float32 scales, little endian; value = code * scale of its 128
        byte  [R + R / 32, width)           r bfloat16 rotated values, little endian, never quantised

    (512 codes, 4 scales at byte 512, 64 bfloat16 at byte 528.) tilefuse writes power-of-two scales and reads any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__: list[str] = []

LAYOUTS = ("bf16", "fp8")
# codes that share one scale
GROUP = 128


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of one cache row are; offsets and ``width`` in elements of the cache tensor."""

    layout: str
    rank: int
    rope_dim: int

    @property
    def is_fp8(self) -> bool:
        return self.layout == "fp8"

    @property
    def scale_offset(self) -> int:
        """Byte of the first scale (fp8)."""
        return self.rank

    @property
    def rope_offset(self) -> int:
        """First element of the rotated part; a byte for fp8."""
        return self.rank + 4 * (self.rank // GROUP) if self.is_fp8 else self.rank

    @property
    def width(self) -> int:
        return self.rope_offset + (2 * self.rope_dim if self.is_fp8 else self.rope_dim)


def row_layout(layout: str, rank: int, width: int) -> RowLayout | None:
    """The layout of rows ``width`` wide with ``rank`` latent values, or None where there is none such."""
    if rank <= 0 or (layout == "fp8" and rank % GROUP):
        return None
    rope_size = width - RowLayout(layout, rank, 0).width
    unit = 2 if layout == "fp8" else 1
    if rope_size < 0 or rope_size % unit:
        return None
    return RowLayout(layout, rank, rope_size // unit)


def fp8_parts(cache: torch.Tensor, row: RowLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of an fp8 cache: codes ``[.., R]`` uint8, scales ``[.., R / 128]`` float32, rotated ``[.., r]`` bf16."""
    codes = cache[..., : row.rank]
    scales = cache[..., row.scale_offset : row.rope_offset].view(torch.float32)
    rotated = cache[..., row.rope_offset :].view(torch.bfloat16)
    return codes, scales, rotated
