// Elementary functions of the CPU kernels: branch-free, so that loops over them vectorise, and without fused
// multiply-adds (-ffp-contract=off), so that every instruction set gives the same bits.
#pragma once

#include "common/cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// exp to about 1.5 ulp, subnormal results included; NaN stays NaN, -inf gives 0, above 88.73 gives inf
static inline float exp_f32(float x) {
  // written so that NaN passes both comparisons
  x = x < -110.0f ? -110.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches below the smallest normal exponent and to 128
  const int32_t whole =
      static_cast<int32_t>(float_to_bits(shifted) & 0x1ffu) - (float_to_bits(shifted) & 0x100u ? 512 : 0);
  const int32_t half = whole >> 1;
  const float a = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float b = bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  return p * a * b;
}

// log(1 + t) for 0 <= t <= 1 to about 2 ulp: 2 atanh(t / (2 + t)) as a series
static inline float log1p_unit_f32(float t) {
  const float z = t / (2.0f + t);
  const float q = z * z;
  float p = 1.0f / 17.0f;
  p = p * q + 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 0.2f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * z * p;
}

static inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

static inline float softplus_f32(float x) {
  const float t = exp_f32(x < 0.0f ? x : -x);
  return (x < 0.0f ? 0.0f : x) + log1p_unit_f32(t);
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
