"""Cached latent rows back in order, dequantised: the first step of chunked prefill."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import DEEPSEEK_V3 as M
from .mla_append_kv import FP8_WIDTH, PAGE
from .mla_compress_kv import WIDTH


def quantised(rows):
    """Rows [.., R + r] as an FP8 cache holds them."""
    groups = rows[..., : M.kv_lora_rank].float().unflatten(-1, (-1, 128))
    scale = torch.exp2((groups.abs().amax(-1) / 448).log2().ceil())
    codes = (groups / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn)
    pe = rows[..., M.kv_lora_rank :].bfloat16().contiguous()
    return torch.cat([part.view(torch.uint8) for part in (codes, scale, pe)], -1)


def widened(rows, dtype):
    """An FP8 cache's rows as values."""
    codes = rows[..., : M.kv_lora_rank].view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 128))
    # a copy: a row's scales need not lie at a multiple of four bytes of its own
    scale = rows[..., M.kv_lora_rank : -2 * M.rope_dim].contiguous().view(torch.float32)
    pe = rows[..., -2 * M.rope_dim :].contiguous().view(torch.bfloat16)
    return torch.cat(((codes * scale[..., None]).flatten(-2).to(dtype), pe.to(dtype)), -1)


def cache_of(tokens: int, layout: str, device, generator):
    """Random rows and a shuffled table of their pages: cache, page numbers."""
    pages = -(-tokens // PAGE)
    rows = normal((pages, PAGE, WIDTH), torch.bfloat16, device, generator)
    table = torch.randperm(pages, generator=generator, device=device).int()
    return quantised(rows) if layout == "fp8" else rows, table


def eager(layout: str):
    def run(cache, block_table, cu_seqlens, total):
        token = torch.arange(total, device=cache.device)
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
        place = token - cu_seqlens[sequence]
        rows = cache[block_table[sequence, place // PAGE].long(), place % PAGE]
        return widened(rows, torch.bfloat16) if layout == "fp8" else rows

    return run


def cases() -> Iterator[Case]:
    for batch, length, suite, devices in ((4, 1024, "quick", ("cpu", "cuda")), (16, 8192, "full", ("cuda",))):
        for layout in ("bf16", "fp8"):

            def inputs(device, generator, batch=batch, length=length, layout=layout):
                cache, table = cache_of(batch * length, layout, device, generator)
                starts = torch.arange(batch + 1, device=device) * length
                return cache, table.view(batch, -1), starts, batch * length

            yield Case(
                op="mla_gather_kv",
                name=f"{M.name}, {batch} sequences of {length}, {layout} cache",
                dtype="bfloat16",
                inputs=inputs,
                run=lambda cache, table, starts, total, layout=layout: tilefuse.mla_gather_kv(
                    cache, table, starts, total_tokens=total, layout=layout
                ),
                # codes times power-of-two scales are exact in bfloat16
                exact=True,
                peers={"eager": eager(layout), "torch.compile": compiled(eager(layout))},
                bytes=batch * length * (2 * WIDTH + (FP8_WIDTH if layout == "fp8" else 2 * WIDTH)),
                suite=suite if layout == "bf16" else "full",
                devices=devices,
            )
