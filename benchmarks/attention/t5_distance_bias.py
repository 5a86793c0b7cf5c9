"""T5's relative position bias by distance, against the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal

LENGTH, MAX_DISTANCE = 1024, 128


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
    """The buckets of the distances key - query by the published rule, both directions."""
    distance = torch.arange(LENGTH - 1, -LENGTH, -1, device=weight.device)
    half = weight.shape[0] // 2
    exact = half // 2
    far = torch.log(distance.abs().float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    # distance 0 is not far: its logarithm is not used
    far = (exact + far.clamp(min=0).long()).clamp(max=half - 1)
    bucket = torch.where(distance.abs() < exact, distance.abs(), far) + half * (distance > 0)
    return weight[bucket].T.contiguous()


def cases() -> Iterator[Case]:
    yield Case(
        op="t5_distance_bias",
        name="T5, 8 heads, 1024 tokens",
        dtype="float32",
        inputs=lambda device, generator: (normal((32, 8), torch.float32, device, generator),),
        run=lambda weight: tilefuse.t5_distance_bias(weight, LENGTH),
        peers={"eager": eager, "torch.compile": compiled(eager), "Hugging Face, dense": dense(LENGTH)},
        bytes=4 * 8 * (2 * LENGTH - 1),
        call_cost=True,
        suite="quick",
    )
