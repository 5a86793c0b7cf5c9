// The two products of latent decode on the CPU: scores of a block of keys, and their weighted sum.
#pragma once

#include "common/immintrin.h"
#include "mla/decode_keys_cpu.h"
#include "mla/latent_row_cpu.h"

// vectors wider than the CPU's registers never cross a call: every function that takes one is inlined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace tilefuse {
namespace TILEFUSE_ISA {

// The two products, for L query rows at a time: rows lie in the lanes of a vector, and a key's
// values are broadcast, so that no product ends in a sum across lanes. `Element` is what queries, keys and weights are
// held as; kStep of them are multiplied at once, and lie side by side.

// float32, with vectors that the compiler maps to whatever the CPU has
struct Float32 {
  using Element = float;
  static constexpr int64_t kStep = 1;
  // as many as registers hold
#if defined(__AVX512F__)
  static constexpr int64_t kKeysAtOnce = 8, kRowsAtOnce = 8;
#else
  static constexpr int64_t kKeysAtOnce = 4, kRowsAtOnce = 4;
#endif

  template <typename T>
  static inline const float* key(const MlaDecodeCall& call, const uint8_t* row, float* buffer) {
    if (call.fp8) {
      read_latent_codes(row, call.rank, buffer);
      const bf16* rotated = latent_rope(row, call.rank);
      for (int64_t i = 0; i < call.rope; ++i) buffer[call.rank + i] = to_float(rotated[i]);
    } else {
      const T* values = reinterpret_cast<const T*>(row);
      for (int64_t i = 0; i < call.rank + call.rope; ++i) buffer[i] = to_float(values[i]);
    }
    return buffer;
  }

  template <int64_t L>
  static inline void scores(const float* q, const float* const* keys_at, const float* const*, int64_t width,
                            float* scores) {
    typedef float Vector __attribute__((vector_size(4 * L), aligned(4), may_alias));
    Vector acc[kKeysAtOnce] = {};
    // sums of sums of 32 products: one sum of them all would round too often
    for (int64_t part = 0; part < width; part += 32) {
      Vector sums[kKeysAtOnce] = {};
      for (int64_t i = part; i < part + 32; ++i) {
        const Vector x = *reinterpret_cast<const Vector*>(q + i * L);
        for (int64_t j = 0; j < kKeysAtOnce; ++j) sums[j] += x * keys_at[j][i];
      }
      for (int64_t j = 0; j < kKeysAtOnce; ++j) acc[j] += sums[j];
    }
    for (int64_t j = 0; j < kKeysAtOnce; ++j) *reinterpret_cast<Vector*>(scores + j * L) = acc[j];
  }

  template <int64_t L>
  static inline void accumulate(const float* weights, const float* const* keys_at, int64_t keys, int64_t rank,
                                int64_t d, float* acc) {
    typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
    for (int64_t m = 0; m < L; m += kRowsAtOnce) {
      Vector sums[kRowsAtOnce];
      for (int64_t r = 0; r < kRowsAtOnce; ++r) sums[r] = *reinterpret_cast<Vector*>(acc + (m + r) * rank + d);
      for (int64_t n = 0; n < keys; ++n) {
        const Vector x = *reinterpret_cast<const Vector*>(keys_at[n] + d);
        for (int64_t r = 0; r < kRowsAtOnce; ++r) sums[r] += x * weights[n * L + m + r];
      }
      for (int64_t r = 0; r < kRowsAtOnce; ++r) *reinterpret_cast<Vector*>(acc + (m + r) * rank + d) = sums[r];
    }
  }
};

#if defined(__AVX512BF16__)
// bfloat16 pairs into float32
struct Bfloat16 {
  using Element = bf16;
  static constexpr int64_t kStep = 2;
  static constexpr int64_t kKeysAtOnce = 8;

  template <typename T>
  static inline const bf16* key(const MlaDecodeCall& call, const uint8_t* row, bf16* buffer) {
    const int64_t width = call.rank + call.rope;
    // rows of whole vectors are read where they lie
    if (!call.fp8 && width % 32 == 0) return reinterpret_cast<const bf16*>(row);
    if (call.fp8) {
      read_latent_codes(row, call.rank, buffer);
      std::memcpy(buffer + call.rank, latent_rope(row, call.rank), 2 * call.rope);
    } else {
      std::memcpy(buffer, row, 2 * width);
    }
    return buffer;
  }

  static inline int32_t pair(const bf16* from) {
    int32_t both;
    std::memcpy(&both, from, 4);
    return both;
  }

  template <int64_t L>
  static inline void scores(const bf16* q, const bf16* const* keys_at, const bf16* const* ahead, int64_t width,
                            float* scores) {
    const bf16* k[kKeysAtOnce];
    for (int64_t j = 0; j < kKeysAtOnce; ++j) k[j] = keys_at[j];
    if constexpr (L == 16) {
      __m512 acc[kKeysAtOnce];
      for (int64_t j = 0; j < kKeysAtOnce; ++j) acc[j] = _mm512_setzero_ps();
      for (int64_t line = 0; line < width; line += 32) {
        for (int64_t j = 0; j < kKeysAtOnce; ++j) __builtin_prefetch(ahead[j] + line);
        for (int64_t i = line; i < line + 32; i += 2) {
          const __m512bh x = (__m512bh)_mm512_loadu_si512(q + i * L);
#pragma GCC unroll 8
          for (int64_t j = 0; j < kKeysAtOnce; ++j) {
            acc[j] = _mm512_dpbf16_ps(acc[j], x, (__m512bh)_mm512_set1_epi32(pair(k[j] + i)));
          }
        }
      }
      for (int64_t j = 0; j < kKeysAtOnce; ++j) _mm512_storeu_ps(scores + j * L, acc[j]);
    } else {
      __m256 acc[kKeysAtOnce];
      for (int64_t j = 0; j < kKeysAtOnce; ++j) acc[j] = _mm256_setzero_ps();
      for (int64_t line = 0; line < width; line += 32) {
        for (int64_t j = 0; j < kKeysAtOnce; ++j) __builtin_prefetch(ahead[j] + line);
        for (int64_t i = line; i < line + 32; i += 2) {
          const __m256bh x = (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i * L));
#pragma GCC unroll 8
          for (int64_t j = 0; j < kKeysAtOnce; ++j) {
            acc[j] = _mm256_dpbf16_ps(acc[j], x, (__m256bh)_mm256_set1_epi32(pair(k[j] + i)));
          }
        }
      }
      for (int64_t j = 0; j < kKeysAtOnce; ++j) _mm256_storeu_ps(scores + j * L, acc[j]);
    }
  }

  template <int64_t L>
  static inline void accumulate(const bf16* weights, const bf16* const* keys_at, int64_t keys, int64_t rank, int64_t d,
                                float* acc) {
    // columns of two keys, side by side
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 sums[L];
#pragma GCC unroll 16
    for (int64_t r = 0; r < L; ++r) sums[r] = _mm512_loadu_ps(acc + r * rank + d);
    for (int64_t n = 0; n < keys; n += 2) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys_at[n] + d));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys_at[n + 1] + d));
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
      const __m512bh x = (__m512bh)_mm512_permutexvar_epi16(order, both);
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) {
        sums[r] = _mm512_dpbf16_ps(sums[r], x, (__m512bh)_mm512_set1_epi32(pair(weights + n * L + 2 * r)));
      }
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < L; ++r) _mm512_storeu_ps(acc + r * rank + d, sums[r]);
  }
};
#endif

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#pragma GCC diagnostic pop
