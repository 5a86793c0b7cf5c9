"""Decoding over pages: bandwidth of the cache's visible part, against gathered SDPA and FlashInfer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..shapes import GPT_OSS_20B, LLAMA3_8B

PAGE = 16


def gathered(left: int):
    """Gathers every sequence's keys, then attends with a mask, as models without a paged kernel do."""

    def run(q, k_cache, v_cache, table, lengths):
        k, v = (x[table.long()].flatten(1, 2).transpose(1, 2) for x in (k_cache, v_cache))
        t = torch.arange(k.shape[2], device=q.device)
        mask = t[None, :] < lengths[:, None]
        if left >= 0:
            mask = mask & (t[None, :] >= lengths[:, None] - 1 - left)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None, None, :], enable_gqa=True)
        return out.transpose(1, 2)

    return run


def flashinfer(left: int):
    def load():
        import flashinfer

        def run(q, k_cache, v_cache, wrapper):
            return wrapper.run(q[:, 0], (k_cache, v_cache))[:, None]

        run.plan = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        return run

    def prepare(q, k_cache, v_cache, table, lengths):
        import flashinfer

        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=q.device), kv_layout="NHD", use_tensor_cores=True
        )
        counts = (lengths + PAGE - 1) // PAGE
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        pages = torch.cat([row[:n] for row, n in zip(table, counts.tolist())]).int()
        last = (lengths - 1) % PAGE + 1
        wrapper.plan(
            starts,
            pages,
            last.int(),
            q.shape[2],
            k_cache.shape[2],
            q.shape[3],
            PAGE,
            window_left=left,
            q_data_type=q.dtype,
        )
        return q, k_cache, v_cache, wrapper

    return Peer(load=load, prepare=prepare, devices=("cuda",))


def case(name, batch, length, heads, kv_heads, dim, left, *, suite="full", devices=("cpu", "cuda")):
    columns = -(-length // PAGE)

    def make(batch):
        def inputs(device, generator):
            q = normal((batch, 1, heads, dim), torch.bfloat16, device, generator)
            k, v = (normal((batch * columns, PAGE, kv_heads, dim), torch.bfloat16, device, generator) for _ in range(2))
            order = torch.randperm(batch * columns, device=device, generator=generator)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
            return q, k, v, order.view(batch, columns).int(), lengths

        return inputs

    def run(q, k, v, table, lengths):
        return tilefuse.paged_attention(q, k, v, table, lengths, window=(left, 0))[0]

    seen = length if left < 0 else min(length, left + 1)
    return Case(
        op="paged_attention",
        name=name,
        dtype="bfloat16",
        inputs=make(batch),
        oracle_inputs=make(1),
        upcast=(0, 1, 2),
        run=run,
        peers={
            "eager": gathered(left),
            "torch.compile": compiled(gathered(left)),
            "FlashInfer": flashinfer(left),
        },
        bytes=batch * (2 * seen * kv_heads * dim * 2 + 2 * heads * dim * 2),
        flops=4 * batch * heads * seen * dim,
        suite=suite,
        devices=devices,
    )


def cases() -> Iterator[Case]:
    m, w = LLAMA3_8B, GPT_OSS_20B
    yield case(f"{m.name}, 4 sequences of 2048", 4, 2048, m.heads, m.kv_heads, m.head_dim, -1, suite="quick")
    yield case(
        f"{w.name}, 4 sequences of 2048, window {w.window}", 4, 2048, w.heads, w.kv_heads, w.head_dim, w.window - 1
    )
    for batch, length in ((1, 131072), (64, 8192)):
        name = f"{m.name}, {batch} sequences of {length}"
        yield case(name, batch, length, m.heads, m.kv_heads, m.head_dim, -1, devices=("cuda",))
        name = f"{w.name}, {batch} sequences of {length}, window {w.window}"
        yield case(name, batch, length, w.heads, w.kv_heads, w.head_dim, w.window - 1, devices=("cuda",))
