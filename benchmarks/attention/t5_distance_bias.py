"""T5's relative position bias by distance, against the dense one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, normal


def dense(length: int):
    """Hugging Face's T5Attention.compute_bias; the bias of each distance is a row and a column of it."""

    def load():
        from transformers import T5Config
        from transformers.models.t5.modeling_t5 import T5Attention

        attention = T5Attention(T5Config(num_heads=8), has_relative_attention_bias=True)

        def run(weight):
            attention.relative_attention_bias.weight = torch.nn.Parameter(weight, requires_grad=False)
            return attention.compute_bias(length, length, device=weight.device)

        return run

    def post(bias):
        # keys behind, from the furthest on, are the first row turned around; then the last row
        return torch.cat((bias[0, :, 0].flip(-1), bias[0, :, 1:, 0]), -1)

    return Peer(load=load, post=post)


def eager(weight):
    """The op itself, which is a few PyTorch operations."""
    return tilefuse.t5_distance_bias(weight, 1024)


def cases() -> Iterator[Case]:
    yield Case(
        op="t5_distance_bias",
        name="T5, 8 heads, 1024 tokens",
        dtype="float32",
        inputs=lambda device, generator: (normal((32, 8), torch.float32, device, generator),),
        run=lambda weight: tilefuse.t5_distance_bias(weight, 1024),
        naive=eager,
        peers={"Hugging Face, dense": dense(1024)},
        bytes=4 * 8 * 2047,
        call_cost=True,
        suite="quick",
    )
