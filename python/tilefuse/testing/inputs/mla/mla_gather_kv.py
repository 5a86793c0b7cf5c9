"""Inputs of ``mla_gather_kv``: both layouts, ragged and empty sequences, unused rows NaN, table tails wild."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .common import latent_cache, paged


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (cache, block_table, cu_seqlens) and options."""
    for layout in ("bf16", "fp8"):
        for name, lengths, page_size, rank, rope, spare in (
            ("ragged", [13, 0, 64, 1, 70], 64, 512, 64, 0),
            ("page5", [13, 5, 7], 5, 256, 64, 7),
            ("no_rope", [3, 9], 16, 128, 0, 0),
            ("all_empty", [0, 0], 16, 128, 64, 3),
        ):
            table, lens, pages = paged(lengths, page_size, 2, device)
            cache = latent_cache(lengths, table, pages, page_size, rank, rope, layout, dtype, device)
            bounds = torch.cat((lens.new_zeros(1), lens.cumsum(0))).to(lens.dtype)
            options = {
                "total_tokens": sum(lengths) + spare,
                "kv_lora_rank": rank,
                "layout": layout,
                "out_dtype": dtype,
            }
            yield f"{name}_{layout}", (cache, table, bounds), options


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"mla_gather_kv": _samples}
