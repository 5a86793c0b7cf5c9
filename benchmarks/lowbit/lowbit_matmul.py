"""Linears with weights of 4 and 8 bits, of bfloat16 activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal

GROUP = 128


def weight_of(q, scale, bits, dtype):
    """The weight as an ordinary linear has it."""
    group_size = GROUP if bits == 4 else 0
    return tilefuse.int_dequantize(q, scale, bits=bits, group_size=group_size, out_dtype=dtype)


def naive(bits):
    return lambda x, q, scale: F.linear(x, weight_of(q, scale, bits, x.dtype))


def oracle(bits):
    def run(x, q, scale):
        with tilefuse.backend("reference"):
            return x.double() @ weight_of(q, scale, bits, torch.float64).mT

    return run


def int4_peer() -> Peer:
    """PyTorch's own int4 product, with scales and zeros in bfloat16."""

    def prepare(x, q, scale):
        codes = torch.stack((q & 15, q >> 4), -1).flatten(1).int()
        pack: Any = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        scale = scale.mT.bfloat16()
        return x, pack(codes, 8), torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()

    def run(x, packed, scale):
        matmul: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
        return matmul(x, packed, GROUP, scale)

    return Peer(run, prepare=prepare, devices=("cpu",))


def int8_peer() -> Peer:
    def run(x, q, scale):
        matmul: Any = torch.ops.aten._weight_int8pack_mm
        return matmul(x, q, scale)

    return Peer(run, prepare=lambda x, q, scale: (x, q, scale[:, 0].bfloat16()), devices=("cpu",))


def inputs_of(m, n, k, bits):
    def inputs(device, generator):
        x = normal((m, k), torch.bfloat16, device, generator)
        w = normal((n, k), torch.bfloat16, device, generator, k**-0.5)
        q, scale, _ = tilefuse.int_quantize(w, bits=bits, group_size=GROUP if bits == 4 else 0)
        # as checkpoints have them
        return x, q, scale.bfloat16().float()

    return inputs


def cases() -> Iterator[Case]:
    for bits, n, k in ((4, 4096, 4096), (8, 4096, 4096), (4, 2048, 7168), (4, 11008, 4096)):
        for m in (1, 4, 16, 128):
            size = n * k * bits // 8
            yield Case(
                op="lowbit_matmul",
                name=f"int{bits} weight, {m} x {n} x {k}",
                dtype="bfloat16",
                inputs=inputs_of(m, n, k, bits),
                oracle_inputs=inputs_of(min(m, 16), 256, 1024, bits),
                run=lambda x, q, scale, bits=bits: tilefuse.lowbit_matmul(
                    x, q, scale, bits=bits, group_size=GROUP if bits == 4 else 0
                ),
                oracle=oracle(bits),
                upcast=(),
                naive=naive(bits),
                peers={
                    "eager": naive(bits),
                    "torch int4" if bits == 4 else "torch int8": int4_peer() if bits == 4 else int8_peer(),
                    "bfloat16 linear": Peer(
                        F.linear,
                        prepare=lambda x, q, scale, bits=bits: (x, weight_of(q, scale, bits, torch.bfloat16)),
                    ),
                },
                bytes=2 * m * k + size + 2 * m * n,
                flops=2 * m * n * k,
                reads=m <= 4,
                suite="quick" if (bits, n) == (4, 4096) and m in (1, 16) else "full",
            )
