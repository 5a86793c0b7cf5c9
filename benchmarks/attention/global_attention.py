"""Window plus global tokens with projections of their own: Longformer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import LONGFORMER_BASE as M
from .window_attention import heads_first, pairs, recomputed


def is_global(global_index, length):
    mask = torch.zeros(global_index.shape[0], length, dtype=torch.bool, device=global_index.device)
    return mask.scatter_(1, global_index.long(), True)


def global_rows(q_global, k_global, v_global, global_index):
    """Dense attention of the global rows: [B, G, H, D] and where they go."""
    index = global_index.long()[..., None, None].expand(-1, -1, *q_global.shape[2:])
    rows = F.scaled_dot_product_attention(*heads_first(q_global.gather(1, index), k_global, v_global))
    return rows.transpose(1, 2), index


def eager(half: int):
    """A dense mask for the local rows, then the global rows over them."""

    def run(q, k, v, global_index, q_global, k_global, v_global):
        position = torch.arange(q.shape[1], device=q.device)
        near = (position[:, None] - position).abs() <= half
        mask = near[None] | is_global(global_index, q.shape[1])[:, None]
        out = F.scaled_dot_product_attention(*heads_first(q, k, v), mask[:, None]).transpose(1, 2)
        rows, index = global_rows(q_global, k_global, v_global, global_index)
        return out.scatter(1, index, rows)

    return run


def on_operands(half: int):
    def run(q, k, v, global_index, q_global, k_global, v_global):
        position = torch.arange(q.shape[1], device=q.device)
        near = (position[:, None] - position).abs() <= half
        out = recomputed(q, k, v, (near[None] | is_global(global_index, q.shape[1])[:, None])[:, None])
        index = global_index.long()[..., None, None].expand(-1, -1, *q_global.shape[2:])
        seen = torch.ones(1, dtype=torch.bool, device=q.device)
        return out.scatter(1, index, recomputed(q_global.gather(1, index), k_global, v_global, seen))

    return run


def flex(half: int) -> Peer:
    def prepare(q, k, v, global_index, *projections):
        from torch.nn.attention.flex_attention import create_block_mask

        chosen = is_global(global_index, q.shape[1])

        def visible(b, h, i, j):
            return ((i - j).abs() <= half) | chosen[b, j]

        mask = create_block_mask(visible, q.shape[0], None, q.shape[1], q.shape[1], device=q.device)
        return *heads_first(q, k, v), global_index, *projections, mask

    def load():
        from torch.nn.attention.flex_attention import flex_attention

        def run(q, k, v, global_index, q_global, k_global, v_global, mask):
            out = flex_attention(q, k, v, block_mask=mask).transpose(1, 2)
            rows, index = global_rows(q_global, k_global, v_global, global_index)
            return out.scatter(1, index, rows)

        return run

    return Peer(load=load, prepare=prepare, compile=True)


def huggingface(half: int) -> Peer:
    """The attention of Hugging Face's Longformer, with the projections given instead of computed."""

    class Given(torch.nn.Module):
        def forward(self, _):
            return self.value

    def prepare(q, k, v, global_index, q_global, k_global, v_global):
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        length, heads, dim = q.shape[1:]
        config = LongformerConfig(
            hidden_size=heads * dim, num_attention_heads=heads, attention_window=[2 * half], num_hidden_layers=1
        )
        module = LongformerSelfAttention(config, 0).eval()
        index = global_index.long()[..., None, None].expand(-1, -1, heads, dim)
        given = {"query": q, "key": k, "value": v, "key_global": k_global, "value_global": v_global}
        for name, value in (given | {"query_global": q_global.gather(1, index)}).items():
            layer = Given()
            # it works with tokens first
            layer.value = value.flatten(2).transpose(0, 1).contiguous()
            setattr(module, name, layer)
        chosen = is_global(global_index, length)
        # only its shape and dtype are read
        hidden = q.flatten(2)
        return module, hidden, chosen.to(q.dtype) * 10000.0, chosen

    def run(module, hidden, mask, chosen):
        return module(
            hidden,
            attention_mask=mask,
            is_index_masked=torch.zeros_like(chosen),
            is_index_global_attn=chosen,
            is_global_attn=True,
        )[0]

    return Peer(run, prepare=prepare, post=lambda out: out.unflatten(2, (M.heads, M.head_dim)), package="transformers")


def cases() -> Iterator[Case]:
    half = M.window // 2
    for length, count, mode, suite, devices in (
        (4096, 16, "forward", "quick", ("cpu", "cuda")),
        (4096, 16, "backward", "full", ("cuda",)),
        (16384, 64, "forward", "full", ("cuda",)),
        (65536, 256, "forward", "full", ("cuda",)),
    ):

        def tokens(length, count, heads):
            def inputs(device, generator):
                q, k, v, *projections = (
                    normal((1, length, heads, M.head_dim), torch.bfloat16, device, generator) for _ in range(6)
                )
                # scattered over the sequence, all different
                index = torch.randperm(length, generator=generator, device=device)[None, :count].sort().values
                return q, k, v, index, *projections

            return inputs

        # local rows: their windows and the global keys outside of them; then the global rows
        window = pairs(length, half, half) - 2 * count * (M.window + 1)
        scores = M.heads * (window + (length - count) * count + count * length)
        forward = mode == "forward"
        peers = {"eager": eager(half), "FlexAttention": flex(half)}
        if forward and length <= 16384:
            peers["Hugging Face"] = huggingface(half)
        size = 2 * length * M.heads * M.head_dim
        yield Case(
            op="global_attention",
            name=f"{M.name}, {length} tokens, {count} global",
            dtype="bfloat16",
            mode=mode,
            inputs=tokens(length, count, M.heads),
            oracle_inputs=tokens(1024, count if count < 64 else 32, M.heads),
            run=lambda q, k, v, index, *projections: tilefuse.global_attention(
                q, k, v, index, *projections, window=(half, half)
            )[0],
            naive=eager(half) if forward else on_operands(half),
            rows=forward,
            oracle=None if forward else on_operands(half),
            peers=peers,
            grads=(0, 1, 2, 4, 5, 6),
            # of q_global only the global rows are read, but its gradient is written whole
            bytes=(6 if forward else 13) * size,
            flops=(2 if forward else 5) * 2 * M.head_dim * scores,
            suite=suite,
            devices=devices,
        )
