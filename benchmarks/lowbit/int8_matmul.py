"""W8A8 linears: codes that are quantised already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer


def scaled_int_mm(a, a_scale, b, b_scale):
    """PyTorch's int8 product, which gives int32, and the same epilogue."""
    product: Any = torch.ops.aten._int_mm
    return (product(a, b.t()).float() * (a_scale[:, None] * b_scale)).bfloat16()


def eager(a, a_scale, b, b_scale):
    """The same bits without integers: sums in float64 are exact."""
    return ((a.double() @ b.double().t()).float() * (a_scale[:, None] * b_scale)).bfloat16()


def dequantised(dtype):
    """The operands of an ordinary linear."""

    def prepare(a, a_scale, b, b_scale):
        return (a * a_scale[:, None]).to(dtype), (b * b_scale[:, None]).to(dtype)

    return prepare


def inputs_of(m: int, n: int, k: int):
    def inputs(device, generator):
        def codes(rows):
            return torch.randint(-127, 128, (rows, k), generator=generator, device=device, dtype=torch.int8)

        def scales(rows):
            return torch.rand(rows, generator=generator, device=device) * 0.01 + 1e-4

        return codes(m), scales(m), codes(n), scales(n)

    return inputs


def cases() -> Iterator[Case]:
    for n, k in ((4096, 4096), (2048, 7168), (11008, 4096)):
        for m in (1, 4, 16, 128):
            yield Case(
                op="int8_matmul",
                name=f"{m} x {n} x {k}",
                dtype="int8",
                inputs=inputs_of(m, n, k),
                oracle_inputs=inputs_of(min(m, 16), 256, 1024),
                run=tilefuse.int8_matmul,
                exact=True,
                upcast=(),
                peers={
                    "eager": eager,
                    # on a GPU cuBLASLt takes no fewer rows than 17
                    "torch._int_mm, scaled": Peer(scaled_int_mm, devices=("cpu", "cuda") if m > 16 else ("cpu",)),
                    "bfloat16 linear": Peer(F.linear, prepare=dequantised(torch.bfloat16), yardstick=True),
                    "float32 linear": Peer(F.linear, prepare=dequantised(torch.float32), yardstick=True),
                },
                bytes=m * k + n * k + 2 * m * n,
                # none that the roof knows: it has no rate of integer products
                flops=0,
                reads=m <= 16,
                suite="quick" if (n, k) == (4096, 4096) and m != 4 else "full",
            )
