// Rows sixteen values at a time: loads widen to float32, stores round as from_float does. The same code, one value at a
// time, does what is left over.
#pragma once

#include "common/cpu.h"
#include "common/immintrin.h"

// what takes and returns vectors is inlined everywhere: there is no ABI that could differ
#pragma GCC diagnostic ignored "-Wpsabi"

namespace tilefuse {
namespace TILEFUSE_ISA {

constexpr int64_t kFloats = 16;
// narrower registers take one of these in pieces
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t FloatBits __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t HalfBits __attribute__((vector_size(32), aligned(2), may_alias));

#define TILEFUSE_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

TILEFUSE_INLINE __m512 load_bf16(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#endif

#if defined(__AVX512BF16__)

// as from_float rounds: the instruction differs from it in subnormals alone, which it makes 0
TILEFUSE_INLINE void store_bf16(bf16* p, __m512 x) {
  __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  const __mmask16 subnormal = _mm512_fpclass_ps_mask(x, 0x20);
  if (__builtin_expect(subnormal != 0, 0)) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm256_mask_mov_epi16(rounded, subnormal, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
}

#endif

// what `over_floats` hands on: whether the value at i, or those from i on, are meant
struct OneFloat {};
struct ManyFloats {};

template <typename T>
TILEFUSE_INLINE float get(const T* p, int64_t i, OneFloat) {
  return to_float(p[i]);
}

TILEFUSE_INLINE Floats get(const float* p, int64_t i, ManyFloats) { return *reinterpret_cast<const Floats*>(p + i); }

TILEFUSE_INLINE Floats get(const bf16* p, int64_t i, ManyFloats) {
#if defined(__AVX512F__)
  return (Floats)load_bf16(p + i);
#else
  const HalfBits bits = *reinterpret_cast<const HalfBits*>(p + i);
  return (Floats)(__builtin_convertvector(bits, FloatBits) << 16);
#endif
}

TILEFUSE_INLINE Floats get(const f16* p, int64_t i, ManyFloats) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)));
#else
  float values[kFloats];
  for (int64_t j = 0; j < kFloats; ++j) values[j] = to_float(p[i + j]);
  return *reinterpret_cast<const Floats*>(values);
#endif
}

template <typename T>
TILEFUSE_INLINE void put(T* p, int64_t i, float value) {
  p[i] = from_float<T>(value);
}

TILEFUSE_INLINE void put(float* p, int64_t i, Floats values) { *reinterpret_cast<Floats*>(p + i) = values; }

TILEFUSE_INLINE void put(bf16* p, int64_t i, Floats values) {
#if defined(__AVX512BF16__)
  store_bf16(p + i, (__m512)values);
#else
  const FloatBits bits = (FloatBits)values, high = bits >> 16;
  const FloatBits rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
  const FloatBits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? high | 0x40u : rounded;
  *reinterpret_cast<HalfBits*>(p + i) = __builtin_convertvector(chosen, HalfBits);
#endif
}

TILEFUSE_INLINE void put(f16* p, int64_t i, Floats values) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), bits);
#else
  for (int64_t j = 0; j < kFloats; ++j) p[i + j] = from_float<f16>(values[j]);
#endif
}

// f(i, lanes) for all of [0, n)
template <typename F>
TILEFUSE_INLINE void over_floats(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) f(i, ManyFloats{});
  for (; i < n; ++i) f(i, OneFloat{});
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
