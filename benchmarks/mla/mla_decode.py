"""Absorbed decode over the paged latent cache, and sparse decode over listed rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3 as M
from .mla_append_kv import FP8_WIDTH, PAGE
from .mla_attention import SCALE
from .mla_compress_kv import WIDTH
from .mla_gather_kv import cache_of, widened

R = M.kv_lora_rank


def absorbed(q, rows, visible):
    """Softmax over rows [B, n, R + r] whose first R values are the values."""
    scores = torch.einsum("bshd,bnd->bhsn", q, rows) * SCALE
    scores = scores.masked_fill(~visible, float("-inf"))
    probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("bhsn,bnr->bshr", probs, rows[..., :R])


def gathered(cache, block_table, seq_lens, layout):
    """All pages of each sequence in order: rows and which of them exist."""
    rows = cache[block_table.long()].flatten(1, 2)
    rows = widened(rows, torch.bfloat16) if layout == "fp8" else rows
    return rows, torch.arange(rows.shape[1], device=cache.device) < seq_lens[:, None]


def eager(layout: str):
    """The absorbed form of DeepSeek's own inference code: gather, einsum, softmax, einsum."""

    def run(q, cache, block_table, seq_lens):
        rows, exists = gathered(cache, block_table, seq_lens, layout)
        return absorbed(q, rows, exists[:, None, None])

    return run


def gathered_sdpa(layout: str):
    def run(q, cache, block_table, seq_lens):
        rows, exists = gathered(cache, block_table, seq_lens, layout)
        keys = rows[:, None]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, keys[..., :R], exists[:, None, None], scale=SCALE, enable_gqa=True
        )
        return out.transpose(1, 2)

    return run


def flash_mla_plan(q, cache, block_table, seq_lens):
    from flash_mla import get_mla_metadata

    return q, cache[:, :, None], block_table, seq_lens, *get_mla_metadata(seq_lens, q.shape[1] * q.shape[2], 1)


def flash_mla():
    from flash_mla import flash_mla_with_kvcache

    def run(q, cache, block_table, seq_lens, metadata, splits):
        return flash_mla_with_kvcache(
            q, cache, block_table, seq_lens, R, metadata, splits, softmax_scale=SCALE, causal=True
        )[0]

    return run


def flashinfer_plan(q, cache, block_table, seq_lens):
    """FlashInfer plans on the host, outside of the timing here. One query row per sequence."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=q.device))
    pages = -(-seq_lens // PAGE)
    indptr = F.pad(pages.cumsum(0), (1, 0)).int()
    indices = torch.cat([block_table[b, :n] for b, n in enumerate(pages.tolist())]).int()
    starts = torch.arange(q.shape[0] + 1, device=q.device, dtype=torch.int32)
    wrapper.plan(
        starts, indptr, indices, seq_lens.int(), q.shape[2], R, M.rope_dim, PAGE, False, SCALE, q.dtype, cache.dtype
    )
    return wrapper, q[:, 0, :, :R], q[:, 0, :, R:], cache[..., :R], cache[..., R:]


def flashinfer():
    import flashinfer.mla  # noqa: F401  (missing: the reason is recorded)

    return lambda wrapper, *args: wrapper.run(*args)


def on_rows(q, cache, block_table, seq_lens):
    """The pages' rows as one head's keys, their first part as its values, and the rows of each sequence: SGLang's."""
    slots = (block_table[..., None] * PAGE + torch.arange(PAGE, dtype=torch.int32)).flatten(1)
    rows = cache.flatten(0, 1)[:, None]
    return q, rows, rows[..., :R], slots, seq_lens, SCALE, None


def inputs_of(batch: int, heads: int, length: int, layout: str):
    def inputs(device, generator):
        # absorbed queries of a size that gives scores of a few units
        q = normal((batch, 1, heads, WIDTH), torch.bfloat16, device, generator, 0.5)
        cache, table = cache_of(batch * length, layout, device, generator)
        # the last page is partly filled
        lengths = torch.full((batch,), length - PAGE // 2, dtype=torch.int32, device=device)
        return q, cache, table.view(batch, -1), lengths

    return inputs


def sparse_inputs(batch: int, heads: int, length: int, top: int, layout: str):
    def inputs(device, generator):
        q, cache, *_ = inputs_of(batch, heads, length, layout)(device, generator)
        # different rows of one sequence each; a sequence's pages are consecutive here
        order = torch.rand(batch, length, generator=generator, device=device).argsort(-1)[:, :top]
        slots = order + torch.arange(batch, device=device)[:, None] * length
        return q, cache, slots[:, None].int()

    return inputs


def eager_sparse(layout: str):
    def run(q, cache, indices):
        slots = indices[:, 0].long()
        rows = cache.flatten(0, 1)[slots.clamp(min=0)]
        rows = widened(rows, torch.bfloat16) if layout == "fp8" else rows
        return absorbed(q, rows, (slots >= 0)[:, None, None])

    return run


def cases() -> Iterator[Case]:
    for batch, heads, length, layout, suite, devices in (
        (4, 16, 4096, "bf16", "quick", ("cpu", "cuda")),
        (4, 16, 4096, "fp8", "full", ("cpu", "cuda")),
        (4, 128, 4096, "bf16", "full", ("cpu", "cuda")),
        (1, 16, 65536, "bf16", "full", ("cpu", "cuda")),
        (128, 16, 8192, "bf16", "full", ("cuda",)),
        (128, 16, 8192, "fp8", "full", ("cuda",)),
        (128, 128, 8192, "bf16", "full", ("cuda",)),
        (128, 128, 8192, "fp8", "full", ("cuda",)),
    ):
        seen = length - PAGE // 2
        peers = {"eager": eager(layout), "torch.compile": compiled(eager(layout))}
        if layout == "bf16":
            peers["gathered SDPA"] = gathered_sdpa(layout)
            peers["vLLM"] = vllm.mla_decode_kvcache(SCALE)
            peers["SGLang"] = vllm.decode_attention_cpu(on_rows)
            peers["FlashMLA"] = Peer(load=flash_mla, prepare=flash_mla_plan, devices=("cuda",), package="flash-mla")
            peers["FlashInfer"] = Peer(
                load=flashinfer,
                prepare=flashinfer_plan,
                post=lambda out: out[:, None],
                devices=("cuda",),
                package="flashinfer-python",
            )
        yield Case(
            op="mla_decode",
            name=f"{M.name}, batch {batch}, {heads} heads, length {length}, {layout} cache",
            dtype="bfloat16",
            inputs=inputs_of(batch, heads, length, layout),
            oracle_inputs=inputs_of(2, heads, 512, layout),
            run=lambda q, cache, table, lengths, layout=layout: tilefuse.mla_decode(
                q, cache, table, lengths, softmax_scale=SCALE, layout=layout
            )[0],
            upcast=(0, 1) if layout == "bf16" else (0,),
            peers=peers,
            bytes=batch * (seen * (FP8_WIDTH if layout == "fp8" else 2 * WIDTH) + 2 * heads * (WIDTH + R)),
            flops=2 * batch * heads * seen * (WIDTH + R),
            reads=True,
            memory=True,
            suite=suite,
            devices=devices,
        )

    for batch, heads, length, top, layout, suite, devices in (
        (4, 16, 4096, 1024, "fp8", "quick", ("cpu", "cuda")),
        (128, 128, 16384, 2048, "fp8", "full", ("cuda",)),
        (128, 128, 16384, 2048, "bf16", "full", ("cuda",)),
    ):
        row = FP8_WIDTH if layout == "fp8" else 2 * WIDTH
        yield Case(
            op="mla_sparse_decode",
            name=f"{M.name}, batch {batch}, {heads} heads, {top} of {length} rows, {layout} cache",
            dtype="bfloat16",
            inputs=sparse_inputs(batch, heads, length, top, layout),
            oracle_inputs=sparse_inputs(2, heads, 512, 128, layout),
            run=lambda q, cache, indices, layout=layout: tilefuse.mla_sparse_decode(
                q, cache, indices, softmax_scale=SCALE, layout=layout
            )[0],
            upcast=(0, 1) if layout == "bf16" else (0,),
            peers={"eager": eager_sparse(layout), "torch.compile": compiled(eager_sparse(layout))},
            bytes=batch * (top * row + 2 * heads * (WIDTH + R)),
            flops=2 * batch * heads * top * (WIDTH + R),
            reads=True,
            suite=suite,
            devices=devices,
        )
