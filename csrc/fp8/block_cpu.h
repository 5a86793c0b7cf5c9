// One 128-element block on the CPU: load, largest magnitude, encode. AVX-512 by hand, elsewhere by the compiler.
#pragma once

#include "common/cpu.h"
#include "common/fp8.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define TILEFUSE_FP8_AVX512
#endif
#if defined(__x86_64__)
#pragma GCC diagnostic push
// gcc 12 warns about its own intrinsics' undefined operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

namespace tilefuse {
namespace TILEFUSE_ISA {

constexpr int64_t kBlock = 128;

template <typename T>
static inline void load_block(const T* x, int64_t count, float* values) {
  if (count == kBlock) {
    for (int64_t i = 0; i < kBlock; ++i) values[i] = to_float(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[i]);
    for (int64_t i = count; i < kBlock; ++i) values[i] = 0.0f;
  }
}

// bits of the largest magnitude, NaN and infinities included: below 0x7f800000 the block is finite
static inline uint32_t largest_magnitude(const float* values) {
  // signed: gcc 12 makes slow code of an unsigned maximum
  int32_t largest = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t magnitude = static_cast<int32_t>(fp8::bits_of(values[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<uint32_t>(largest);
}

static inline uint32_t finite_amax(const float* values) {
  int32_t amax = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t magnitude = static_cast<int32_t>(fp8::finite_magnitude(values[i]));
    amax = magnitude > amax ? magnitude : amax;
  }
  return static_cast<uint32_t>(amax);
}

#ifdef TILEFUSE_FP8_AVX512
// fp8::encode of 16 values; FINITE: all are finite and at most a rounding error above 448
template <bool FINITE>
static inline __m128i encode16(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i clamped = FINITE ? magnitude : _mm512_min_epu32(magnitude, _mm512_set1_epi32(0x43e00000));
  // the bias of 120 exponents is taken off before the shift
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(clamped, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(clamped, odd), _mm512_set1_epi32(0x7ffff - (960 << 20)));
  const __m512i normal = _mm512_srli_epi32(rounded, 20);
  const __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(clamped), _mm512_set1_ps(16384.0f));
  const __mmask16 small = _mm512_cmplt_epu32_mask(clamped, _mm512_set1_epi32(0x3c800000));
  __m512i code = _mm512_mask_sub_epi32(normal, small, _mm512_castps_si512(shifted), _mm512_set1_epi32(0x46800000));
  // code | (bits >> 24 & 0x80)
  code = _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80), 0xf8);
  if (!FINITE) {
    const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
  }
  return _mm512_cvtepi32_epi8(code);
}
#endif

// codes of one block; `finite` says that it has neither NaN nor infinities and that scale is its own scale
static inline void encode_block(const float* values, float scale, bool finite, int64_t count, uint8_t* q) {
#ifdef TILEFUSE_FP8_AVX512
  if (count == kBlock) {
    const __m512 s = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < kBlock; i += 16) {
      const __m512 y = _mm512_div_ps(_mm512_loadu_ps(values + i), s);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), finite ? encode16<true>(y) : encode16<false>(y));
    }
    return;
  }
#endif
  (void)finite;
  for (int64_t i = 0; i < count; ++i) q[i] = fp8::quantize(values[i], scale);
}

// the same for a scale that is a power of two: the product with its inverse, which is exact, equals the quotient
static inline void encode_block_pow2(const float* values, float scale, bool finite, uint8_t* q) {
  const float inverse = fp8::float_of(0x7f000000u - fp8::bits_of(scale));
#ifdef TILEFUSE_FP8_AVX512
  for (int64_t i = 0; i < kBlock; i += 16) {
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), finite ? encode16<true>(y) : encode16<false>(y));
  }
#else
  (void)finite;
  for (int64_t i = 0; i < kBlock; ++i) q[i] = fp8::encode(values[i] * inverse);
#endif
}

// codes of one row of values under a scale for each column
static inline void encode_columns(const float* values, const float* scales, uint8_t* q) {
#ifdef TILEFUSE_FP8_AVX512
  for (int64_t i = 0; i < kBlock; i += 16) {
    const __m512 y = _mm512_div_ps(_mm512_loadu_ps(values + i), _mm512_loadu_ps(scales + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), encode16<false>(y));
  }
#else
  for (int64_t i = 0; i < kBlock; ++i) q[i] = fp8::quantize(values[i], scales[i]);
#endif
}

// [128, 128] bytes to their transpose
static inline void transpose_codes(const uint8_t* from, uint8_t* to) {
  for (int64_t r0 = 0; r0 < kBlock; r0 += 16) {
    for (int64_t c0 = 0; c0 < kBlock; c0 += 16) {
#if defined(__SSE2__)
      // four rounds of interleaving row i with row i + 8 move every byte to its mirrored place
      __m128i a[16], b[16];
      for (int i = 0; i < 16; ++i) {
        a[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(from + (r0 + i) * kBlock + c0));
      }
      for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 8; ++i) {
          b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
          b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; ++i) {
          a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
          a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
        }
      }
      for (int i = 0; i < 16; ++i) {
        _mm_store_si128(reinterpret_cast<__m128i*>(to + (c0 + i) * kBlock + r0), a[i]);
      }
#else
      for (int64_t c = c0; c < c0 + 16; ++c) {
        for (int64_t r = r0; r < r0 + 16; ++r) to[c * kBlock + r] = from[r * kBlock + c];
      }
#endif
    }
  }
}

// loads, scales and encodes one block; returns its scale
template <typename T>
static inline float quantize_block(const T* x, int64_t count, bool pow2, float eps, uint8_t* q) {
  alignas(64) float values[kBlock];
  load_block(x, count, values);
  const uint32_t largest = largest_magnitude(values);
  const bool finite = largest < 0x7f800000u;
  const float scale = fp8::block_scale(finite ? largest : finite_amax(values), eps, pow2);
  encode_block(values, scale, finite, count, q);
  return scale;
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#if defined(__x86_64__)
#pragma GCC diagnostic pop
#endif
