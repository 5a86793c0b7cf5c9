"""Inputs of ``lowbit_matmul``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ....reference.lowbit.quantize import int_quantize_fwd
from ...sample import Sample


def operands(
    m: int,
    n: int,
    k: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bits: int = 4,
    group_size: int = 32,
    zero: str = "none",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, and q, scale and zero of a weight; ``zero``: "none", "uint8" (asymmetric codes) or "float"."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    q, scale, middle = int_quantize_fwd(weight, bits, group_size, zero == "none", 1e-12)
    zeros = None if zero == "none" else middle.to(device)
    if zero == "float":
        zeros = (middle + torch.rand(middle.shape, generator=generator)).to(device)
    return x.to(device, dtype), q.to(device), scale.to(device), zeros


def _samples(device: torch.device) -> Iterator[Sample]:
    bias, perm = torch.linspace(-1, 1, 17, device=device), torch.arange(39, -1, -1, device=device, dtype=torch.int32)
    yield Sample((*operands(3, 17, 40, device, zero="uint8"), perm, bias), {"group_size": 32}, name="perm_bias")
    whole = operands(5, 33, 64, device, bits=8, group_size=0)
    yield Sample(whole, {"bits": 8, "group_size": 0, "out_dtype": torch.float32}, name="int8_weight")
    pairs = operands(2, 9, 24, device, bits=6, group_size=8, zero="uint8")
    yield Sample(pairs, {"bits": 6, "group_size": 8}, name="int6_weight")
    yield Sample(operands(7, 66, 130, device, torch.float32, zero="float"), {"group_size": 32}, name="float_zeros")


SAMPLES = {"lowbit_matmul": _samples}
