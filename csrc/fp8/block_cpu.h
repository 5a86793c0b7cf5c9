// One 128-element block on the CPU: load, largest magnitude, encode. AVX-512 by hand, elsewhere by the compiler.
#pragma once

#include "common/cpu.h"
#include "common/fp8.h"
#include "common/immintrin.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define TILEFUSE_FP8_AVX512
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

// below this scale the correction in `codes16` could underflow
constexpr float kSmallestFastScale = 0x1p-80f;

#ifdef TILEFUSE_FP8_AVX512
// What turns the float y in [0, 448] into its e4m3 code by one addition: for y of exponent e (at least -6, where
// subnormals begin) 2^(e + 20) makes the sum's last bit worth 2^(e - 3), an e4m3 code's, and 8 (e + 6) of those are the
// codes below 2^e. The sum's low bits are the code, rounded to nearest even. Looked up by the last 4 bits of the
// exponent.
static inline __m512 code_offsets() {
  const auto at = [](int e) {
    return fp8::float_of((static_cast<uint32_t>(e + 147) << 23) + 8u * static_cast<uint32_t>(e + 6));
  };
  return _mm512_setr_ps(at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), 0.0f, at(-6), at(-5), at(-4), at(-3),
                        at(-2), at(-1), at(0));
}

// codes of 16 magnitudes in the low 16 bits of each lane, for a finite block, its own scale and inverse = 1 / scale.
// One correction by the remainder brings the product to the rounded quotient wherever the code depends on it:
// tried for every significand of a scale and every float within 6 ulp of a midpoint between two codes.
static inline __m512i codes16(__m512 magnitude, __m512 scale, __m512 inverse, __m512 offsets) {
  __m512 y = _mm512_mul_ps(magnitude, inverse);
  y = _mm512_fmadd_ps(_mm512_fnmadd_ps(y, scale, magnitude), inverse, y);
  // 2^-6 at least
  const __m512i exponent =
      _mm512_srli_epi32(_mm512_max_epi32(_mm512_castps_si512(y), _mm512_set1_epi32(0x3c800000)), 23);
  return _mm512_castps_si512(_mm512_add_ps(y, _mm512_permutexvar_ps(exponent, offsets)));
}

// bits of `codes` under the mask, of `signs` elsewhere
static inline __m512i with_signs(__m512i codes, __m512i signs, __m512i mask) {
  return _mm512_ternarylogic_epi32(codes, signs, mask, 0xe4);
}

static inline uint32_t largest_word(__m512i words) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // there is a horizontal minimum only
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return ~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xffffu;
}

static inline __m512i load_words(const void* p) { return _mm512_loadu_si512(p); }

// bits of the largest magnitude of a whole block as a float; NaN and infinities count, at 0x7f800000 or above
static inline uint32_t block_magnitude(const float* x) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_and_si512(load_words(x), mask);
  for (int i = 16; i < kBlock; i += 16) largest = _mm512_max_epu32(largest, _mm512_and_si512(load_words(x + i), mask));
  return _mm512_reduce_max_epu32(largest);
}

static inline __m512i largest_words(const void* x) {
  const char* p = static_cast<const char*>(x);
  const __m512i mask = _mm512_set1_epi16(0x7fff);
  const __m512i a = _mm512_and_si512(load_words(p), mask), b = _mm512_and_si512(load_words(p + 64), mask);
  const __m512i c = _mm512_and_si512(load_words(p + 128), mask), d = _mm512_and_si512(load_words(p + 192), mask);
  return _mm512_max_epu16(_mm512_max_epu16(a, b), _mm512_max_epu16(c, d));
}

static inline uint32_t block_magnitude(const bf16* x) { return largest_word(largest_words(x)) << 16; }

static inline uint32_t block_magnitude(const f16* x) {
  return fp8::bits_of(to_float(f16{static_cast<uint16_t>(largest_word(largest_words(x)))}));
}

// 64 codes
static inline __m512i encode64(const bf16* x, __m512 scale, __m512 inverse, __m512 offsets) {
  __m512i words[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i bits = load_words(x + 32 * i);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    const __m512i even = _mm512_slli_epi32(magnitude, 16);
    const __m512i odd = _mm512_and_si512(magnitude, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    const __m512i low = codes16(_mm512_castsi512_ps(even), scale, inverse, offsets);
    const __m512i high = codes16(_mm512_castsi512_ps(odd), scale, inverse, offsets);
    const __m512i codes = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
    words[i] = with_signs(codes, _mm512_srli_epi16(bits, 8), _mm512_set1_epi16(0x7f));
  }
  // packing works on 128-bit lanes
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi16(words[0], words[1]));
}

static inline __m512 load_floats(const float* x) { return _mm512_loadu_ps(x); }

static inline __m512 load_floats(const f16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// signed codes of 16 values, one a lane
static inline __m512i codes_of(__m512 x, __m512 scale, __m512 inverse, __m512 offsets) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i codes = codes16(_mm512_castsi512_ps(magnitude), scale, inverse, offsets);
  return with_signs(codes, _mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x7f));
}

// 4 x 16 lanes to 64 bytes
static inline __m512i pack(const __m512i* codes) {
  const __m512i packed =
      _mm512_packus_epi16(_mm512_packus_epi32(codes[0], codes[1]), _mm512_packus_epi32(codes[2], codes[3]));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}

template <typename T>
static inline __m512i encode64(const T* x, __m512 scale, __m512 inverse, __m512 offsets) {
  __m512i codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = codes_of(load_floats(x + 16 * i), scale, inverse, offsets);
  return pack(codes);
}

// fp8::encode of 16 values
static inline __m128i encode16(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i clamped = _mm512_min_epu32(magnitude, _mm512_set1_epi32(0x43e00000));
  // the bias of 120 exponents is taken off before the shift
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(clamped, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(clamped, odd), _mm512_set1_epi32(0x7ffff - (960 << 20)));
  const __m512i normal = _mm512_srli_epi32(rounded, 20);
  const __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(clamped), _mm512_set1_ps(16384.0f));
  const __mmask16 small = _mm512_cmplt_epu32_mask(clamped, _mm512_set1_epi32(0x3c800000));
  __m512i code = _mm512_mask_sub_epi32(normal, small, _mm512_castps_si512(shifted), _mm512_set1_epi32(0x46800000));
  // code | (bits >> 24 & 0x80)
  code = _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80), 0xf8);
  const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
  return _mm512_cvtepi32_epi8(code);
}
#endif

// bits of the largest magnitude, NaN and infinities included: below 0x7f800000 the block is finite
template <typename T>
static inline uint32_t largest_magnitude(const T* x, int64_t count) {
#ifdef TILEFUSE_FP8_AVX512
  if (count == kBlock) return block_magnitude(x);
#endif
  alignas(64) float values[kBlock];
  load_block(x, count, values);
  // signed: gcc 12 makes slow code of an unsigned maximum
  int32_t largest = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t magnitude = static_cast<int32_t>(fp8::bits_of(values[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<uint32_t>(largest);
}

// bits of the largest finite magnitude
template <typename T>
static inline uint32_t finite_amax(const T* x, int64_t count) {
  alignas(64) float values[kBlock];
  load_block(x, count, values);
  int32_t amax = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t magnitude = static_cast<int32_t>(fp8::finite_magnitude(values[i]));
    amax = magnitude > amax ? magnitude : amax;
  }
  return static_cast<uint32_t>(amax);
}

// codes of one block; `finite` says that it has neither NaN nor infinities and that no value exceeds 448 scales
template <typename T>
static inline void encode_block(const T* x, float scale, bool finite, int64_t count, uint8_t* q) {
#ifdef TILEFUSE_FP8_AVX512
  if (count == kBlock && finite && scale >= kSmallestFastScale) {
    const __m512 offsets = code_offsets(), s = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
    for (int64_t i = 0; i < kBlock; i += 64) _mm512_storeu_si512(q + i, encode64(x + i, s, inverse, offsets));
    return;
  }
#endif
  (void)finite;
  alignas(64) float values[kBlock];
  load_block(x, count, values);
  int64_t i = 0;
#ifdef TILEFUSE_FP8_AVX512
  for (; i + 16 <= count; i += 16) {
    const __m512 y = _mm512_div_ps(_mm512_load_ps(values + i), _mm512_set1_ps(scale));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), encode16(y));
  }
#endif
  for (; i < count; ++i) q[i] = fp8::quantize(values[i], scale);
}

// loads, scales and encodes one block; returns its scale
template <typename T>
static inline float quantize_block(const T* x, int64_t count, bool pow2, float eps, uint8_t* q) {
  const uint32_t largest = largest_magnitude(x, count);
  const bool finite = largest < 0x7f800000u;
  const float scale = fp8::block_scale(finite ? largest : finite_amax(x, count), eps, pow2);
  encode_block(x, scale, finite, count, q);
  return scale;
}

constexpr int64_t kRun = 16;  // blocks of a run: two passes over it find it in L1

// quantises `count` consecutive elements in 1 x 128 blocks; scales[i] is block i's. `next`, if any, is where the caller
// goes on reading; `stream` stores past the caches, for outputs far larger than those.
template <typename T>
static inline void quantize_run(const T* x, int64_t count, bool pow2, float eps, uint8_t* q, float* scales,
                                [[maybe_unused]] const T* next, [[maybe_unused]] bool stream) {
#ifdef TILEFUSE_FP8_AVX512
  const __m512 offsets = code_offsets();
  alignas(64) uint32_t largest[kRun];
  alignas(64) float inverses[kRun];
  stream = stream && reinterpret_cast<uintptr_t>(q) % 64 == 0;
  while (count >= kBlock) {
    const int64_t blocks = count / kBlock < kRun ? count / kBlock : kRun;
    for (int64_t b = 0; b < blocks; ++b) largest[b] = block_magnitude(x + b * kBlock);
    const __mmask16 there = static_cast<__mmask16>((1u << blocks) - 1);
    __m512i magnitudes = _mm512_maskz_load_epi32(there, largest);
    __mmask16 fast = _mm512_cmplt_epu32_mask(magnitudes, _mm512_set1_epi32(0x7f800000));
    if (fast != 0xffff) {
      for (int64_t b = 0; b < blocks; ++b) {
        if (largest[b] >= 0x7f800000u) largest[b] = finite_amax(x + b * kBlock, kBlock);
      }
      magnitudes = _mm512_maskz_load_epi32(there, largest);
    }
    // fp8::block_scale
    const __m512i clamped = _mm512_max_epu32(magnitudes, _mm512_set1_epi32(static_cast<int>(fp8::bits_of(eps))));
    __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(clamped), _mm512_set1_ps(448.0f));
    if (pow2) {
      const __m512i up = _mm512_add_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(0x7fffff));
      scale = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(0x7f800000)));
    }
    scale = _mm512_mask_mov_ps(scale, _mm512_testn_epi32_mask(magnitudes, magnitudes), _mm512_set1_ps(1.0f));
    _mm512_mask_storeu_ps(scales, there, scale);
    _mm512_store_ps(inverses, _mm512_div_ps(_mm512_set1_ps(1.0f), scale));
    fast = _mm512_mask_cmp_ps_mask(fast, scale, _mm512_set1_ps(kSmallestFastScale), _CMP_GE_OQ);
    const T* ahead = count >= 2 * kRun * kBlock ? x + kRun * kBlock : next;
    for (int64_t b = 0; b < blocks; ++b, x += kBlock, q += kBlock) {
      if (ahead != nullptr) {
        for (size_t line = 0; line < kBlock * sizeof(T); line += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead + b * kBlock) + line, _MM_HINT_T0);
        }
      }
      if (fast >> b & 1) {
        const __m512 s = _mm512_set1_ps(scales[b]), inverse = _mm512_set1_ps(inverses[b]);
        const __m512i low = encode64(x, s, inverse, offsets), high = encode64(x + 64, s, inverse, offsets);
        if (stream) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(q), low);
          _mm512_stream_si512(reinterpret_cast<__m512i*>(q + 64), high);
        } else {
          _mm512_storeu_si512(q, low);
          _mm512_storeu_si512(q + 64, high);
        }
      } else {
        encode_block(x, scales[b], false, kBlock, q);
      }
    }
    scales += blocks;
    count -= blocks * kBlock;
  }
#endif
  for (; count > 0; count -= kBlock, x += kBlock, q += kBlock) {
    *scales++ = quantize_block(x, count < kBlock ? count : kBlock, pow2, eps, q);
  }
}

// after the last streaming store, before another thread reads
static inline void finish_streams() {
#ifdef TILEFUSE_FP8_AVX512
  _mm_sfence();
#endif
}

// codes of one row of values under a scale for each column; `fast` says that all columns are finite and no scale tiny
static inline void encode_columns(const float* values, const float* scales, [[maybe_unused]] const float* inverses,
                                  [[maybe_unused]] bool fast, uint8_t* q) {
#ifdef TILEFUSE_FP8_AVX512
  if (fast) {
    const __m512 offsets = code_offsets();
    for (int64_t i = 0; i < kBlock; i += 64) {
      __m512i codes[4];
      for (int j = 0; j < 4; ++j) {
        codes[j] = codes_of(_mm512_load_ps(values + i + 16 * j), _mm512_load_ps(scales + i + 16 * j),
                            _mm512_load_ps(inverses + i + 16 * j), offsets);
      }
      _mm512_storeu_si512(q + i, pack(codes));
    }
    return;
  }
  for (int64_t i = 0; i < kBlock; i += 16) {
    const __m512 y = _mm512_div_ps(_mm512_loadu_ps(values + i), _mm512_loadu_ps(scales + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), encode16(y));
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

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
