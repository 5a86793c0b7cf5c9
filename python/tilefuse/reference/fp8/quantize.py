"""Block quantisation to e4m3 in plain PyTorch. ``quantize_blocks`` is the exact rule; everything else is layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0


def block_scale(amax: Tensor, eps: float, pow2: bool) -> Tensor:
    """float32 dequantisation scale of blocks whose largest finite magnitude is ``amax`` (float32)."""
    # a tensor divisor: torch multiplies by the rounded reciprocal when it divides by a number on a GPU
    scale = amax.clamp(min=torch.tensor(eps, dtype=torch.float32).item()) / torch.full_like(amax, E4M3_MAX)
    if pow2:
        # a mantissa other than zero carries into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, scale)


def encode(y: Tensor) -> Tensor:
    """e4m3 codes of float32 values: clamped, rounded to nearest even, every NaN 0x7f."""
    codes = y.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.where(y.isnan(), 0x7F, codes.view(torch.uint8)).to(torch.uint8).view(torch.float8_e4m3fn)


def quantize_blocks(x: Tensor, pow2: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Quantises float32 blocks that span the last dimension: codes of x's shape, scales ``x.shape[:-1]``."""
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    scale = block_scale(magnitude.amax(-1), eps, pow2)
    return encode(x / scale.unsqueeze(-1)), scale


def row_scale_layout(scale: Tensor) -> Tensor:
    """``[M, KB]`` scales in the physical layout of (1, 128) blocks: M contiguous, blocks round_up(M, 4) apart."""
    m, blocks = scale.shape
    return scale.new_empty_strided((m, blocks), (1, max(-(-m // 4) * 4, 4))).copy_(scale)


def fp8_quantize_rows(x: Tensor, pow2: bool, eps: float) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    blocks = -(-k // 128)
    padded = F.pad(x.to(torch.float32), (0, blocks * 128 - k)).unflatten(-1, (blocks, 128))
    q, scale = quantize_blocks(padded, pow2, eps)
    return q.flatten(-2)[..., :k].clone(memory_format=torch.contiguous_format), row_scale_layout(scale)


def fp8_quantize_tiles(x: Tensor, pow2: bool, eps: float) -> tuple[Tensor, Tensor]:
    m, k = x.shape[-2:]
    row_blocks, blocks = -(-m // 128), -(-k // 128)
    padded = F.pad(x.to(torch.float32), (0, blocks * 128 - k, 0, row_blocks * 128 - m))
    # [G, mb, kb, 128 * 128]
    tiles = padded.unflatten(-1, (blocks, 128)).unflatten(-3, (row_blocks, 128)).transpose(-3, -2).flatten(-2)
    q, scale = quantize_blocks(tiles, pow2, eps)
    q = q.unflatten(-1, (128, 128)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return q[..., :m, :k].clone(memory_format=torch.contiguous_format), scale.contiguous()


def fp8_quantize_dual_fwd(x: Tensor, pow2: bool, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *fp8_quantize_rows(x, pow2, eps), *fp8_quantize_rows(x.t(), pow2, eps)


def expand_scale(scale: Tensor, shape: tuple[int, ...], block_rows: int) -> Tensor:
    """The scale of every element of a tensor of this shape."""
    scale = scale.repeat_interleave(128, -1)[..., : shape[-1]]
    return scale if block_rows == 1 else scale.repeat_interleave(128, -2)[..., : shape[-2], :]


def fp8_dequantize_fwd(q: Tensor, scale: Tensor, block_rows: int, out_dtype: torch.dtype) -> Tensor:
    compute = torch.float64 if out_dtype == torch.float64 else torch.float32
    return (q.to(compute) * expand_scale(scale.to(compute), tuple(q.shape), block_rows)).to(out_dtype)
