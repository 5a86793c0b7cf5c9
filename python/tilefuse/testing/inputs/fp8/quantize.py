"""Inputs of ``fp8_quantize``, ``fp8_quantize_dual`` and ``fp8_dequantize``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...sample import Sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every bit pattern is as likely as any other: all exponents, NaN payloads, infinities, subnormals, -0."""
    integer = torch.iinfo(INTEGERS[dtype])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(integer.min, integer.max + 1, shape, generator=generator, dtype=INTEGERS[dtype]).view(dtype)


def magnitudes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values; row i is scaled by a power of ten, so blocks need very different scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    powers = torch.arange(x.shape[-2] if x.ndim > 1 else 1) % 9 - 4
    return (x * (10.0 ** powers.float())[:, None] if x.ndim > 1 else x).to(dtype)


def quantized(
    shape: tuple[int, ...], block_rows: int, device: torch.device | str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random codes (no NaN) and scales of plausible size."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(shape, generator=generator).mul(60).clamp(-448, 448).to(torch.float8_e4m3fn)
    *lead, rows, columns = shape
    grid = (*lead, -(-rows // block_rows), -(-columns // 128))
    scale = torch.rand(grid, generator=generator) * 0.02 + 1e-3
    return q.to(device), scale.to(device)


def _quantize(device: torch.device) -> Iterator[Sample]:
    yield Sample((magnitudes((5, 300), torch.bfloat16).to(device),), name="ragged")
    yield Sample((magnitudes((3, 128), torch.float32).to(device),), {"scale_format": "pow2"}, name="pow2")
    yield Sample((magnitudes((2, 3, 130), torch.float16).to(device),), {"eps": 1e-4}, name="leading")
    yield Sample((magnitudes((2, 130, 200), torch.bfloat16).to(device),), {"block": (128, 128)}, name="tiles")
    yield Sample((torch.zeros(0, 256, device=device),), name="empty")


def _dual(device: torch.device) -> Iterator[Sample]:
    yield Sample((magnitudes((130, 150), torch.bfloat16).to(device),), name="ragged")
    yield Sample((magnitudes((2, 3, 64), torch.float32).to(device),), {"scale_format": "pow2"}, name="leading")


def _dequantize(device: torch.device) -> Iterator[Sample]:
    yield Sample(quantized((5, 300), 1, device), name="rows")
    yield Sample(quantized((2, 130, 200), 128, device), {"block": (128, 128), "out_dtype": torch.float32}, name="tiles")


SAMPLES = {"fp8_quantize": _quantize, "fp8_quantize_dual": _dual, "fp8_dequantize": _dequantize}
