"""Inputs of ``int8_matmul``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...sample import Sample


def codes(
    rows: int, k: int, dtype: torch.dtype = torch.int8, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """``[rows, K]``, every code of the dtype."""
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max + 1, (rows, k), generator=generator).to(dtype).to(device)


def scales(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4).to(device)


def operands(
    m: int,
    n: int,
    k: int,
    device: torch.device | str = "cpu",
    *,
    a_groups: int = 0,
    b_groups: int = 0,
    with_bias: bool = False,
    asymmetric: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """a, a_scale, b, b_scale, bias and a_zero; 0 groups: scales without that dim."""
    a = codes(m, k, torch.uint8 if asymmetric else torch.int8, device, seed)
    a_scale = scales(*((m, a_groups) if a_groups else (m,)), device=device, seed=seed + 1)
    b_scale = scales(*((n, b_groups) if b_groups else (n,)), device=device, seed=seed + 2)
    bias = torch.linspace(-1, 1, n, device=device) if with_bias else None
    zero = codes(m, 1, torch.uint8, device, seed + 3)[:, 0] if asymmetric else None
    return a, a_scale, codes(n, k, device=device, seed=seed + 4), b_scale, bias, zero


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample(operands(3, 5, 7, device, with_bias=True, asymmetric=True), name="asymmetric_bias")
    yield Sample(operands(7, 65, 130, device, a_groups=2, b_groups=2), {"out_dtype": torch.float32}, name="groups")
    yield Sample(operands(2, 70, 96, device, b_groups=3, asymmetric=True), {"out_dtype": torch.float16}, name="mixed")


SAMPLES = {"int8_matmul": _samples}
