"""The exact quantisation rule of the fp8 family, for Triton kernels.

The same rule as ``tilefuse/reference/fp8/quantize.py`` and ``csrc/common/fp8.h``, to the bit: magnitudes are compared
as integers, powers of two are found by bits, divisions are correctly rounded. Codes are uint8 here, because
e4m3 stores of transposed tiles are miscompiled by older ptxas and sm_80 has no such type at all: pass
``q.view(torch.uint8)``.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ... import arch, backends


def float_bits(value: float) -> int:
    """Bits of a float rounded to float32; kernels take ``eps`` in this form."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def native_cast(device: torch.device) -> bool:
    """Whether ``.to(tl.float8e4nv)`` exists and rounds once on the device; so it does in the repaired interpreter."""
    return (backends.interpreting() and device.type == "cpu") or _casts(arch.of(device))


def _casts(name: str) -> bool:
    # on sm_89 triton converts through float16, which rounds twice
    return arch.capability(name) >= 90 or name.startswith(("gfx95", "gfx12"))


@triton.jit
def finite_magnitude(x):
    """Bits of |x| as int32, 0 for NaN and infinities: blocks take the maximum of these. ``x`` is float32."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, 0)


@triton.jit
def block_scale(amax_bits, eps_bits, POW2: tl.constexpr):
    """float32 dequantisation scale of blocks with these maxima."""
    scale = tl.div_rn(tl.maximum(amax_bits, eps_bits).to(tl.float32, bitcast=True), 448.0)
    if POW2:
        # a mantissa other than zero carries into the exponent
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(amax_bits == 0, 1.0, scale)


@triton.jit
def encode(y, NATIVE: tl.constexpr):
    """e4m3 bits (uint8) of clamp(y, -448, 448), round to nearest even, NaN -> 0x7f. ``y`` is float32."""
    if NATIVE:
        clamped = tl.minimum(tl.maximum(y, -448.0), 448.0)
        code = clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = y.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        # adding 2^14 puts the last bit of an e4m3 subnormal, 2^-9, at the last bit of the sum
        subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = (tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return tl.where(y == y, code, 0x7F).to(tl.uint8)


@triton.jit
def quantize(x, scale, POW2: tl.constexpr, NATIVE: tl.constexpr):
    """Codes (uint8) of ``x`` under scales that broadcast to it, both float32."""
    if POW2:
        # the reciprocal of a power of two is exact, and so this product equals the quotient
        inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return encode(x * inverse, NATIVE)
    else:
        return encode(tl.div_rn(x, scale), NATIVE)


@triton.jit
def decode(code):
    """Exact float32 value of e4m3 codes (uint8)."""
    bits = code.to(tl.int32)
    magnitude = bits & 0x7F
    # subnormals are multiples of 2^-9; elsewhere the exponent bias moves from 7 to 127
    subnormal = magnitude.to(tl.float32) * 0.001953125
    value = tl.where(magnitude < 8, subnormal.to(tl.int32, bitcast=True), (magnitude << 20) + 0x3C000000)
    value = tl.where(magnitude == 0x7F, 0x7FC00000, value)
    return (value | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def silu_mul(gate, up):
    """``silu(gate) * up`` in float32, the operations of csrc/common/fp8.h. Launch with enable_fp_fusion=False."""
    # a NaN gate takes a bound and stays NaN in the division
    y = -gate
    y = tl.where(y > -87.0, y, -87.0)
    y = tl.where(y < 128.0, y, 128.0)
    shifted = y * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = y - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 1.98412698e-4 + 1.38888889e-3
    p = p * r + 8.33333333e-3
    p = p * r + 4.16666667e-2
    p = p * r + 1.66666667e-1
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    # 2^n in two factors, since n reaches 185
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    e = p * low * high
    return tl.div_rn(gate, 1.0 + e) * up
