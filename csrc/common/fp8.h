// The exact quantisation rule of the fp8 family, for host and device code.
//
//   amax  = largest magnitude of the block's finite elements
//   scale = 1 if amax == 0, else max(amax, eps) / 448, rounded to nearest; with pow2 rounded up to a power of two
//   code  = round_to_nearest_even(clamp(x / scale, -448, 448)), the division rounded to nearest
//
// NaN becomes 0x7f, infinities become +-448, -0 stays. Magnitudes are compared as integers and powers of two are
// found by bits, so that neither NaN nor flushed subnormals change a result. The Python form of the rule is
// tilefuse/reference/fp8/quantize.py, Triton's is triton_kernels/common/fp8.py; tests compare all bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/values.h"

namespace tilefuse::fp8 {

// internal linkage: each CPU kernel is compiled once per instruction set and the copies must not be merged
TILEFUSE_HD static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

TILEFUSE_HD static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// operations that stay IEEE and apart whatever the compiler flags say
#ifdef __CUDA_ARCH__
__device__ static inline float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ static inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ static inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
#else
static inline float div_rn(float a, float b) { return a / b; }
static inline float mul_rn(float a, float b) { return a * b; }
static inline float add_rn(float a, float b) { return a + b; }
#endif

// bits of |x|, 0 for NaN and infinities: blocks take the maximum of these
TILEFUSE_HD static inline uint32_t finite_magnitude(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  return magnitude < 0x7f800000u ? magnitude : 0u;
}

TILEFUSE_HD static inline float block_scale(uint32_t amax_bits, float eps, bool pow2) {
  if (amax_bits == 0u) return 1.0f;
  const uint32_t eps_bits = bits_of(eps);
  const float scale = div_rn(float_of(amax_bits > eps_bits ? amax_bits : eps_bits), 448.0f);
  // a mantissa other than zero carries into the exponent
  return pow2 ? float_of((bits_of(scale) + 0x7fffffu) & 0x7f800000u) : scale;
}

// e4m3 bits of clamp(y, -448, 448), round to nearest even; free of branches so that loops over it vectorise
TILEFUSE_HD static inline uint8_t encode(float y) {
  const uint32_t bits = bits_of(y);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t clamped = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;
  const uint32_t normal = ((clamped + 0x7ffffu + ((clamped >> 20) & 1u)) >> 20) - (120u << 3);
  // adding 2^14 puts the last bit of an e4m3 subnormal, 2^-9, at the last bit of the sum
  const uint32_t subnormal = bits_of(float_of(clamped) + 16384.0f) - 0x46800000u;
  const uint32_t code = (clamped < 0x3c800000u ? subnormal : normal) | ((bits >> 24) & 0x80u);
  return static_cast<uint8_t>(magnitude > 0x7f800000u ? 0x7fu : code);
}

TILEFUSE_HD static inline uint8_t quantize(float x, float scale) { return encode(div_rn(x, scale)); }

// exact value of an e4m3 code
TILEFUSE_HD static inline float decode(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  // 2^-9 units for subnormals; elsewhere the exponent bias moves from 7 to 127
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0.001953125f;
  const uint32_t value = magnitude < 8u ? bits_of(subnormal) : (magnitude << 20) + (120u << 23);
  return float_of((magnitude == 0x7fu ? 0x7fc00000u : value) | sign);
}

// silu(gate) * up = gate / (1 + exp(-gate)) * up from float32 operations that are each rounded to nearest, so that
// every backend finds the same bits. exp: 2^n times a degree-7 Taylor polynomial on |r| <= ln(2) / 2.
TILEFUSE_HD static inline float silu_mul(float gate, float up) {
  // outside these bounds exp is 0 or infinite next to 1; a NaN gate takes the upper bound and stays NaN below
  float y = -gate;
  y = y > -87.0f ? y : -87.0f;
  y = y < 128.0f ? y : 128.0f;
  const float shifted = add_rn(mul_rn(y, 1.44269504f), 12582912.0f);
  const float n = add_rn(shifted, -12582912.0f);
  // ln(2) in two parts, the first short enough for an exact product
  float r = add_rn(y, -mul_rn(n, 0.693359375f));
  r = add_rn(r, -mul_rn(n, -2.12194440e-4f));
  float p = 1.98412698e-4f;
  p = add_rn(mul_rn(p, r), 1.38888889e-3f);
  p = add_rn(mul_rn(p, r), 8.33333333e-3f);
  p = add_rn(mul_rn(p, r), 4.16666667e-2f);
  p = add_rn(mul_rn(p, r), 1.66666667e-1f);
  p = add_rn(mul_rn(p, r), 0.5f);
  p = add_rn(mul_rn(p, r), 1.0f);
  p = add_rn(mul_rn(p, r), 1.0f);
  // 2^n in two factors, since n reaches 185
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - 0x4b400000u);
  const int32_t half = exponent >> 1;
  const float low = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float high = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
  const float e = mul_rn(mul_rn(p, low), high);
  return mul_rn(div_rn(gate, add_rn(1.0f, e)), up);
}

}  // namespace tilefuse::fp8
