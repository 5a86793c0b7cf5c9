"""Attention over lists of blocks: BigBird's pattern and the strided one of Sparse Transformer."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from .window_attention import heads_first, heads_last, recomputed


@functools.cache
def pattern(kind: str, length: int, block: int):
    options = {"stride": 8, "causal": True} if kind == "strided" else {}
    return tilefuse.block_pattern(kind, length, length, block_size=block, **options)


def visible_pairs(kind: str, length: int, block: int, causal: bool) -> int:
    """(query, key) pairs of one head on the lists, less those that causality hides in the diagonal blocks."""
    listed = pattern(kind, length, block).col_index.numel() * block * block
    return listed - (length // block) * block * (block - 1) // 2 if causal else listed


def dense_blocks(row_offsets, col_index):
    """The lists as bool [row blocks, column blocks], for lists that all heads share."""
    counts = row_offsets[0, 0].diff()
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    dense = torch.zeros(counts.numel(), counts.numel(), dtype=torch.bool, device=counts.device)
    dense[rows, col_index.long()] = True
    return dense


def dense_tokens(row_offsets, col_index, block, causal):
    mask = dense_blocks(row_offsets, col_index).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return mask.tril() if causal else mask


def on_operands(block: int, causal: bool):
    def run(q, k, v, row_offsets, col_index):
        return recomputed(q, k, v, dense_tokens(row_offsets, col_index, block, causal))

    return run


def eager(block: int, causal: bool):
    """A dense mask of all tokens."""

    def run(q, k, v, row_offsets, col_index):
        mask = dense_tokens(row_offsets, col_index, block, causal)
        return F.scaled_dot_product_attention(*heads_first(q, k, v), mask).transpose(1, 2)

    return run


def gathered(block: int, causal: bool):
    """The listed blocks of keys gathered per block of queries, lists padded to the longest: no dense scores."""

    def prepare(q, k, v, row_offsets, col_index):
        counts = row_offsets[0, 0].diff().long()
        place = torch.arange(int(counts.max()), device=q.device)
        valid = place < counts[:, None]
        lists = col_index.long()[(row_offsets[0, 0, :-1, None] + place).clamp(max=col_index.numel() - 1)]
        token = torch.arange(block, device=q.device)
        # [row blocks, 1, list * block]
        mask = valid.repeat_interleave(block, 1)[:, None]
        if causal:
            keys = (lists[..., None] * block + token).flatten(1)
            rows = torch.arange(counts.numel(), device=q.device)[:, None] * block + token
            mask = mask & (keys[:, None] <= rows[..., None])
        return *heads_first(q, k, v), lists, mask

    def run(q, k, v, lists, mask):
        # [B, H, blocks, block, D]
        q, k, v = (x.unflatten(2, (-1, block)) for x in (q, k, v))
        k, v = (x[:, :, lists].flatten(3, 4) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).flatten(2, 3)

    # slow where memory is
    return Peer(run, prepare=prepare, post=heads_last, devices=("cuda",))


def flex(block: int, causal: bool, devices) -> Peer:
    def prepare(q, k, v, row_offsets, col_index):
        from torch.nn.attention.flex_attention import create_block_mask

        dense = dense_blocks(row_offsets, col_index)

        def visible(b, h, i, j):
            listed = dense[i // block, j // block]
            return listed & (j <= i) if causal else listed

        length = q.shape[1]
        mask = create_block_mask(visible, None, None, length, length, device=q.device, BLOCK_SIZE=max(block, 128))
        return *heads_first(q, k, v), mask

    def load():
        from torch.nn.attention.flex_attention import flex_attention

        return lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask)

    return Peer(load=load, prepare=prepare, post=heads_last, compile=True, devices=devices)


def cases() -> Iterator[Case]:
    for kind, length, heads, dim, block, mode, suite, devices in (
        ("bigbird", 4096, 12, 64, 64, "forward", "quick", ("cpu", "cuda")),
        ("strided", 4096, 8, 64, 64, "forward", "full", ("cpu", "cuda")),
        ("bigbird", 16384, 16, 128, 64, "forward", "full", ("cuda",)),
        ("bigbird", 16384, 16, 128, 64, "backward", "full", ("cuda",)),
        ("bigbird", 16384, 16, 128, 128, "forward", "full", ("cuda",)),
        ("strided", 16384, 16, 128, 64, "forward", "full", ("cuda",)),
    ):
        causal = kind == "strided"

        def tokens(length, heads, kind=kind, dim=dim, block=block):
            def inputs(device, generator):
                lists = pattern(kind, length, block)
                x = (normal((1, length, heads, dim), torch.bfloat16, device, generator) for _ in range(3))
                return *x, lists.row_offsets.to(device), lists.col_index.to(device)

            return inputs

        forward = mode == "forward"
        yield Case(
            op="block_sparse_attention",
            name=f"{kind}, {length} tokens, {heads} heads, D {dim}, blocks of {block}",
            dtype="bfloat16",
            mode=mode,
            inputs=tokens(length, heads),
            oracle_inputs=tokens(1024, 2),
            run=lambda *args, block=block, causal=causal: tilefuse.block_sparse_attention(
                *args, block_size=block, causal=causal
            )[0],
            naive=eager(block, causal) if forward else on_operands(block, causal),
            rows=forward,
            oracle=None if forward else on_operands(block, causal),
            peers={
                "eager": eager(block, causal),
                "gathered SDPA": gathered(block, causal),
                "FlexAttention": flex(block, causal, ("cpu", "cuda") if forward else ("cuda",)),
            },
            grads=(0, 1, 2),
            bytes=2 * (4 if forward else 8) * length * heads * dim,
            flops=(2 if forward else 5) * 2 * dim * heads * visible_pairs(kind, length, block, causal),
            suite=suite,
            devices=devices,
        )
