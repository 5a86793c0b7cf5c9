"""Decode over a paged key/value cache: Llama-3, and gpt-oss's window with sinks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm
from ..shapes import GPT_OSS_20B, LLAMA3_8B, Model

PAGE = 16


def gathered(cache, block_table):
    """[B, Hkv, length, D]: all pages of a sequence in order."""
    return cache[block_table.long()].flatten(1, 2).transpose(1, 2)


def eager(q, k_cache, v_cache, block_table, seq_lens):
    k, v = gathered(k_cache, block_table), gathered(v_cache, block_table)
    mask = torch.arange(k.shape[2], device=q.device) < seq_lens[:, None, None, None]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, enable_gqa=True).transpose(1, 2)


def eager_sinks(window: int):
    """The pages of the window only, sinks as one more column of scores."""

    def run(q, k_cache, v_cache, block_table, seq_lens, sinks):
        # a window reaches at most so many pages
        count = min(-(-window // PAGE) + 1, block_table.shape[1])
        last = (seq_lens - 1) // PAGE
        columns = (last[:, None] - torch.arange(count, device=q.device).flip(0)).long()
        pages = block_table.long().gather(1, columns.clamp(min=0))
        position = (columns[..., None] * PAGE + torch.arange(PAGE, device=q.device)).flatten(1)
        visible = (position >= (seq_lens[:, None] - window).clamp(min=0)) & (position < seq_lens[:, None])
        groups = q.shape[2] // k_cache.shape[2]
        k, v = (gathered(cache, pages).repeat_interleave(groups, 1) for cache in (k_cache, v_cache))
        scores = q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        probs = torch.cat((scores, column), -1).softmax(-1, dtype=torch.float32)[..., :-1].to(q.dtype)
        return (probs @ v).transpose(1, 2)

    return run


def flash_attn():
    from flash_attn import flash_attn_with_kvcache

    def run(q, k_cache, v_cache, block_table, seq_lens):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=seq_lens, block_table=block_table, causal=True
        )

    return run


def flashinfer_plan(q, k_cache, v_cache, block_table, seq_lens):
    """FlashInfer plans on the host, outside of the timing here."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    pages = -(-seq_lens // PAGE)
    indptr = F.pad(pages.cumsum(0), (1, 0)).int()
    indices = torch.cat([block_table[b, :n] for b, n in enumerate(pages.tolist())]).int()
    wrapper.plan(
        indptr,
        indices,
        ((seq_lens - 1) % PAGE + 1).int(),
        q.shape[2],
        k_cache.shape[2],
        q.shape[3],
        PAGE,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    return wrapper, q[:, 0], (k_cache, v_cache)


def flashinfer():
    import flashinfer  # noqa: F401  (missing: the reason is recorded)

    return lambda wrapper, q, caches: wrapper.run(q, caches)


def from_pages(q, k_cache, v_cache, block_table, seq_lens, sinks=None):
    """Sequences in order, for vLLM to put into pages of its own."""
    k, v = (cache[block_table.long()].flatten(1, 2) for cache in (k_cache, v_cache))
    return q, k, v, seq_lens, sinks


def on_rows(q, k_cache, v_cache, block_table, seq_lens, sinks=None):
    """The pages' rows, and the rows of each sequence: SGLang's form."""
    slots = (block_table[..., None] * PAGE + torch.arange(PAGE, dtype=torch.int32)).flatten(1)
    return q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), slots, seq_lens, q.shape[-1] ** -0.5, sinks


def cache_inputs(m: Model, batch: int, length: int, dtype: torch.dtype = torch.bfloat16, *, sinks: bool = False):
    def inputs(device, generator):
        q = normal((batch, 1, m.heads, m.head_dim), torch.bfloat16, device, generator)
        per_sequence = -(-length // PAGE)
        shape = (batch * per_sequence, PAGE, m.kv_heads, m.head_dim)
        caches = [normal(shape, dtype, device, generator) for _ in range(2)]
        table = torch.randperm(shape[0], generator=generator, device=device).int().view(batch, per_sequence)
        # the last page is partly filled
        lengths = torch.full((batch,), length - PAGE // 2, dtype=torch.int32, device=device)
        rest = [normal((m.heads,), torch.float32, device, generator)] if sinks else []
        return q, *caches, table, lengths, *rest

    return inputs


def cases() -> Iterator[Case]:
    m = LLAMA3_8B
    for batch, length, fp8, suite, devices in (
        (4, 4096, False, "quick", ("cpu", "cuda")),
        (4, 4096, True, "full", ("cpu", "cuda")),
        (64, 8192, False, "full", ("cuda",)),
        (64, 8192, True, "full", ("cuda",)),
    ):
        scales = {"k_scale": 0.5, "v_scale": 0.25} if fp8 else {}

        def run(*args, scales=scales):
            return tilefuse.paged_attention(*args, **scales)[0]

        def eager_fp8(q, k_cache, v_cache, *rest, scales=scales):
            k, v = (c.to(q.dtype) * s for c, s in zip((k_cache, v_cache), scales.values()))
            return eager(q, k, v, *rest)

        plain = eager_fp8 if fp8 else eager
        peers = {"eager": plain, "torch.compile": compiled(plain)}
        if not fp8:
            peers["vLLM"] = vllm.cpu_attention_with_kv_cache(causal=True, cached=from_pages)
            peers["SGLang"] = vllm.decode_attention_cpu(on_rows)
            peers["FlashAttention"] = Peer(load=flash_attn, devices=("cuda",), package="flash-attn")
            peers["FlashInfer"] = Peer(
                load=flashinfer,
                prepare=flashinfer_plan,
                post=lambda out: out[:, None],
                devices=("cuda",),
                package="flashinfer-python",
            )
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        yield Case(
            op="paged_attention",
            name=f"{m.name}, batch {batch}, length {length}, {'fp8' if fp8 else 'bf16'} cache",
            dtype="bfloat16",
            inputs=cache_inputs(m, batch, length, dtype),
            oracle_inputs=cache_inputs(m, 2, 256, dtype),
            run=run,
            upcast=(0,) if fp8 else (0, 1, 2),
            peers=peers,
            bytes=2 * batch * (length - PAGE // 2) * m.kv_heads * m.head_dim * (1 if fp8 else 2),
            flops=4 * batch * (length - PAGE // 2) * m.heads * m.head_dim,
            reads=True,
            suite=suite,
            devices=devices,
        )

    g = GPT_OSS_20B
    for batch, devices in ((8, ("cpu", "cuda")), (256, ("cuda",))):
        yield Case(
            op="paged_attention",
            name=f"{g.name}, window {g.window}, sinks, batch {batch}, length 4096",
            dtype="bfloat16",
            inputs=cache_inputs(g, batch, 4096, sinks=True),
            oracle_inputs=cache_inputs(g, 2, 256, sinks=True),
            run=lambda *args: tilefuse.paged_attention(*args, window=(g.window - 1, 0))[0],
            upcast=(0, 1, 2),
            peers={
                "eager": eager_sinks(g.window),
                "torch.compile": compiled(eager_sinks(g.window)),
                "vLLM": vllm.cpu_attention_with_kv_cache(causal=True, window=g.window, cached=from_pages),
                "SGLang": vllm.decode_attention_cpu(on_rows, window=g.window),
            },
            bytes=2 * 2 * batch * g.window * g.kv_heads * g.head_dim,
            flops=4 * batch * g.window * g.heads * g.head_dim,
            call_cost=batch == 8,
            reads=True,
            devices=devices,
        )
