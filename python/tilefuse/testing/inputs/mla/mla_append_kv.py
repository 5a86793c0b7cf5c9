"""Inputs of ``mla_append_kv``: the widths of ``mla_compress_kv`` over both layouts and several page sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from . import mla_compress_kv


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (kv_a, weight, cos, sin, positions, cache, slot_mapping) and options; the cache is filled with 0xFF."""
    for name, (kv_a, weight, cos, sin, positions), options in mla_compress_kv.cases(device, dtype):
        tokens, rank = kv_a.shape[0], weight.shape[0]
        rope = kv_a.shape[1] - rank
        if positions is None:
            positions = torch.arange(tokens, device=device)
        for layout in ("bf16", "fp8") if rank % 128 == 0 else ("bf16",):
            page_size = 5 if name in ("half", "small") else 64
            pages = tokens // page_size + 3
            slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(tokens))[:tokens]
            slots = slots.to(device, torch.int32 if layout == "bf16" else torch.int64)
            if tokens > 4:
                # a skipped token, and tokens past the mapping's end
                slots[1] = -1
                slots = slots[: tokens - 1]
            if layout == "fp8":
                cache = torch.empty(pages, page_size, rank + rank // 32 + 2 * rope, device=device, dtype=torch.uint8)
            else:
                kind = torch.bfloat16 if name == "float_weight" else dtype
                cache = torch.empty(pages, page_size, rank + rope, device=device, dtype=kind)
            cache.view(torch.uint8).fill_(0xFF)
            if name == "view":
                # pages and rows further apart than they are wide
                wide = torch.empty(pages, 2 * page_size, cache.shape[2] + 16, device=device, dtype=cache.dtype)
                wide.view(torch.uint8).fill_(0xFF)
                cache = wide[:, :page_size, : cache.shape[2]]
            yield f"{name}_{layout}", (kv_a, weight, cos, sin, positions, cache, slots), options | {"layout": layout}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"mla_append_kv": _samples}
