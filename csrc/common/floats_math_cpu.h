// The elementary functions of cpu_math.h for sixteen values at a time, with the same bits.
#pragma once

#include "common/cpu_math.h"
#include "common/floats_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

typedef int32_t FloatInts __attribute__((vector_size(64), aligned(4), may_alias));

TILEFUSE_INLINE Floats exp_f32(Floats x) {
  // written so that NaN passes both comparisons
#if defined(__AVX512F__)
  x = (Floats)_mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x));
#else
  x = x < -110.0f ? Floats{} - 110.0f : x;
  x = x > 89.0f ? Floats{} + 89.0f : x;
#endif
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors: n reaches below the smallest normal exponent and to 128
  const FloatInts whole = ((FloatInts)shifted << 23) >> 23, half = whole >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
#endif
}

// of float or Floats
template <typename V>
TILEFUSE_INLINE V sigmoid_of(V x) {
  return 1.0f / (1.0f + exp_f32(-x));
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
