"""``silu(gate) * up`` quantised, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import fp8_quantize_rows


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """float32 ``gate / (1 + exp(-gate)) * up`` from operations that are each rounded to nearest.

    Libraries' exponentials differ in their last bits; this one (2^n times a degree-7 Taylor polynomial on
    |r| <= ln(2) / 2) is the same on every backend.
    """
    # outside these bounds exp is 0 or infinite next to 1; a NaN gate takes a bound and stays NaN in the division
    y = -gate
    y = torch.where(y > -87.0, y, -87.0)
    y = torch.where(y < 128.0, y, 128.0)
    shifted = y * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    # ln(2) in two parts, the first short enough for an exact product
    r = y - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 1.98412698e-4 + 1.38888889e-3
    for coefficient in (8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0):
        p = p * r + coefficient
    # 2^n in two factors, since n reaches 185
    exponent = shifted.view(torch.int32) - 0x4B400000
    half = exponent >> 1
    low = ((half + 127) << 23).view(torch.float32)
    high = ((exponent - half + 127) << 23).view(torch.float32)
    return gate / (p * low * high + 1.0) * up


def silu_mul_quantize_fwd(gate_up: Tensor, pow2: bool, eps: float) -> tuple[Tensor, Tensor]:
    if gate_up.dtype == torch.float64:
        gate, up = gate_up.chunk(2, -1)
        return fp8_quantize_rows(F.silu(gate) * up, pow2, eps)
    gate, up = gate_up.to(torch.float32).chunk(2, -1)
    return fp8_quantize_rows(silu_mul(gate, up), pow2, eps)
