"""Block-sparse attention: BigBird's lists and random ones, against FlexAttention and masked SDPA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal


def element_mask(q, offsets, index, block):
    pattern = tilefuse.BlockPattern(offsets, index, block, q.shape[1], q.shape[1])
    return pattern.to_dense().repeat_interleave(block, -1).repeat_interleave(block, -2)


def masked_sdpa(block):
    def prepare(q, k, v, offsets, index):
        return *(x.transpose(1, 2) for x in (q, k, v)), element_mask(q, offsets, index, block)

    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Peer(run, prepare=prepare, post=lambda out: out.transpose(1, 2))


def flex(block):
    def load():
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v, mask: compiled(q, k, v, block_mask=mask)

    def prepare(q, k, v, offsets, index):
        from torch.nn.attention.flex_attention import BlockMask

        dense = tilefuse.BlockPattern(offsets, index, block, q.shape[1], q.shape[1]).to_dense()
        counts = dense.sum(-1).int()
        order = dense.int().argsort(dim=-1, descending=True, stable=True).int()
        none = torch.zeros_like(counts)
        mask = BlockMask.from_kv_blocks(none, torch.zeros_like(order), counts, order, BLOCK_SIZE=block)
        return *(x.transpose(1, 2) for x in (q, k, v)), mask

    return Peer(load=load, prepare=prepare, post=lambda out: out.transpose(1, 2))


def dense(block):
    def run(q, k, v, offsets, index):
        mask = element_mask(q, offsets, index, block)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)

    return run


def case(name, length, heads, dim, block, pattern, mode, *, suite="full", devices=("cpu", "cuda")):
    def make(length):
        def inputs(device, generator):
            q, k, v = (normal((1, length, heads, dim), torch.bfloat16, device, generator) for _ in range(3))
            lists = pattern(length, device)
            return q, k, v, lists.row_offsets, lists.col_index

        return inputs

    def run(q, k, v, offsets, index):
        return tilefuse.block_sparse_attention(q, k, v, offsets, index, block_size=block)[0]

    lists = pattern(length, "cpu")
    pairs = lists.col_index.numel() * block * block * (heads if lists.row_offsets.shape[1] == 1 else 1)
    size = 2 * length * heads * dim
    traffic, products = (4 * size, 2) if mode == "forward" else (8 * size, 5)
    return Case(
        op="block_sparse_attention",
        name=name,
        dtype="bfloat16",
        mode=mode,
        inputs=make(length),
        oracle_inputs=make(min(length, 1024)),
        upcast=(0, 1, 2),
        run=run,
        naive=dense(block),
        peers={"masked SDPA": masked_sdpa(block), "FlexAttention": flex(block)},
        grads=(0, 1, 2),
        bytes=traffic,
        flops=2 * products * pairs * dim,
        suite=suite,
        devices=devices,
    )


def cases() -> Iterator[Case]:
    def bigbird(heads):
        return lambda length, device: tilefuse.block_pattern("bigbird", length, length, num_heads=heads, device=device)

    def scattered(block, each):
        def build(length, device):
            generator = torch.Generator().manual_seed(0)
            blocks = length // block
            mask = torch.rand(blocks, blocks, generator=generator).argsort(-1) < min(each, blocks)
            return tilefuse.block_pattern("from_mask", length, length, block_size=block, mask=mask, device=device)

        return build

    for mode in ("forward", "backward"):
        name = "BigBird, 12 heads of 64, 4096 tokens"
        yield case(name, 4096, 12, 64, 64, bigbird(12), mode, suite="quick" if mode == "forward" else "full")
        for block in (64, 128):
            name = f"16 heads of 128, 32768 tokens, 4096 random keys in blocks of {block}"
            yield case(name, 32768, 16, 128, block, scattered(block, 4096 // block), mode, devices=("cuda",))
