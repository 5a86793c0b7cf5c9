// Panels on other CPUs: operands are float32, in vectors of the instruction set.
#pragma once

#include "common/panel_operands_cpu.h"
#include "common/transpose_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kSlice = kLanes * kVectors;  // of N: what one register tile covers
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Operand operand_of(uint8_t code) { return fp8::decode(code); }
inline Operand operand_of(bf16 value) { return to_float(value); }

// panels are [64 / kSlice][128 of K][kSlice of N]
inline void place(Operand* panel, int64_t n, int64_t k, Operand value) {
  panel[(n / kSlice * kPanelDepth + k) * kSlice + n % kSlice] = value;
}

// Elements lie in memory in pairs along K, two bfloat16 in each 32 bits. A vector of pairs, of as many columns as there
// are lanes, is two vectors of float32: the bits of a bfloat16 are the upper half of its float's.
typedef uint32_t Pairs __attribute__((vector_size(kLanes * 4)));
constexpr int64_t kPieces = kStripWidth / kLanes;  // vectors of a strip

inline Vector even_of(Pairs pairs) { return reinterpret_cast<Vector>(pairs << 16); }
inline Vector odd_of(Pairs pairs) { return reinterpret_cast<Vector>(pairs & 0xffff0000u); }

// vectors of 32 bits that hold a vector of pairs: one of bfloat16, half of one of e4m3
template <typename T>
constexpr int64_t kPairsOf = 2 / sizeof(T);

inline void pairs_of(const bf16* from, Pairs* pairs) { std::memcpy(pairs, from, sizeof(Pairs)); }

// the low and the high bytes of the bfloat16 of subnormal codes
alignas(16) constexpr uint8_t kSubnormals[2][16] = {{0, 0, 0x80, 0xc0, 0, 0x20, 0x40, 0x60},
                                                    {0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c}};
// codes of four of K for each of four rows, to the order in which they give pairs
alignas(16) constexpr uint8_t kByPairs[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};

#if defined(__AVX512BW__)

// the same 16 bytes in each 16
inline __m512i sixteen(const uint8_t* bytes) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// 64 codes to the first and the last eight of each 16, as pairs
inline void decode_pairs(__m512i codes, Pairs* pairs) {
  // the two bytes of the bfloat16: exponent and mantissa moved down by 3, the exponent's bias by 120
  __m512i low = _mm512_and_si512(_mm512_slli_epi16(codes, 4), _mm512_set1_epi8(-16));
  __m512i high =
      _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(7)), _mm512_set1_epi8(60));
  const __mmask64 subnormal = _mm512_testn_epi8_mask(codes, _mm512_set1_epi8(0x78));
  const __m512i place = _mm512_and_si512(codes, _mm512_set1_epi8(7));
  low = _mm512_mask_shuffle_epi8(low, subnormal, sixteen(kSubnormals[0]), place);
  high = _mm512_mask_shuffle_epi8(high, subnormal, sixteen(kSubnormals[1]), place);
  const __mmask64 nan = _mm512_cmpeq_epi8_mask(_mm512_or_si512(codes, _mm512_set1_epi8(-128)), _mm512_set1_epi8(-1));
  low = _mm512_mask_mov_epi8(low, nan, _mm512_set1_epi8(-64));
  high = _mm512_mask_mov_epi8(high, nan, _mm512_set1_epi8(127));
  // high | (codes & 0x80)
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);
  pairs[0] = reinterpret_cast<Pairs>(_mm512_unpacklo_epi8(low, high));
  pairs[1] = reinterpret_cast<Pairs>(_mm512_unpackhi_epi8(low, high));
}

inline void pairs_of(const uint8_t* from, Pairs* pairs) { decode_pairs(_mm512_loadu_si512(from), pairs); }

inline __m512i by_pairs(Pairs quads) {
  return _mm512_shuffle_epi8(reinterpret_cast<__m512i>(quads), sixteen(kByPairs));
}

#elif defined(__AVX2__)

inline __m256i sixteen(const uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// 32 codes, likewise
inline void decode_pairs(__m256i codes, Pairs* pairs) {
  __m256i low = _mm256_and_si256(_mm256_slli_epi16(codes, 4), _mm256_set1_epi8(-16));
  __m256i high =
      _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(7)), _mm256_set1_epi8(60));
  const __m256i subnormal = _mm256_cmpeq_epi8(_mm256_and_si256(codes, _mm256_set1_epi8(0x78)), _mm256_setzero_si256());
  const __m256i place = _mm256_and_si256(codes, _mm256_set1_epi8(7));
  low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(sixteen(kSubnormals[0]), place), subnormal);
  high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(sixteen(kSubnormals[1]), place), subnormal);
  const __m256i nan = _mm256_cmpeq_epi8(_mm256_or_si256(codes, _mm256_set1_epi8(-128)), _mm256_set1_epi8(-1));
  low = _mm256_blendv_epi8(low, _mm256_set1_epi8(-64), nan);
  high = _mm256_blendv_epi8(high, _mm256_set1_epi8(127), nan);
  high = _mm256_or_si256(high, _mm256_and_si256(codes, _mm256_set1_epi8(-128)));
  pairs[0] = reinterpret_cast<Pairs>(_mm256_unpacklo_epi8(low, high));
  pairs[1] = reinterpret_cast<Pairs>(_mm256_unpackhi_epi8(low, high));
}

inline void pairs_of(const uint8_t* from, Pairs* pairs) {
  decode_pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), pairs);
}

inline __m256i by_pairs(Pairs quads) {
  return _mm256_shuffle_epi8(reinterpret_cast<__m256i>(quads), sixteen(kByPairs));
}

#else

// 16 codes, likewise
inline void pairs_of(const uint8_t* from, Pairs* pairs) {
  Pairs both[2] = {};
  for (int i = 0; i < 2 * kLanes; ++i) {
    const uint8_t* two = from + 2 * i;
    both[i / kLanes][i % kLanes] =
        fp8::bits_of(fp8::decode(two[0])) >> 16 | (fp8::bits_of(fp8::decode(two[1])) & 0xffff0000u);
  }
  std::memcpy(pairs, both, sizeof(both));
}

#endif

// K that a vector of one row covers
template <typename T>
constexpr int64_t kStep = sizeof(Pairs) / sizeof(T);

// pairs [kStep / 2] of the next kStep of K, of as many rows of the weight as there are lanes; zeros past `rows` and
// `count`
template <typename T>
inline void load_rows(const T* w, int64_t stride, int64_t rows, int64_t count, Pairs (&out)[kLanes]) {
  if (rows >= kLanes && count >= kStep<T>) {
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(out + i, w + i * stride, sizeof(Pairs));
  } else {
    const size_t bytes = static_cast<size_t>(count < kStep<T> ? count : kStep<T>) * sizeof(T);
    for (int64_t i = 0; i < kLanes; ++i) {
      out[i] = Pairs{};
      if (i < rows) std::memcpy(out + i, w + i * stride, bytes);
    }
  }
  transpose(out);
}

inline void load_pairs(const bf16* w, int64_t stride, int64_t rows, int64_t count, Pairs (&pairs)[kLanes]) {
  load_rows(w, stride, rows, count, pairs);
}

inline void load_pairs(const uint8_t* w, int64_t stride, int64_t rows, int64_t count, Pairs* pairs) {
  Pairs quads[kLanes];
  load_rows(w, stride, rows, count, quads);
#if defined(__AVX2__)
  for (int i = 0; i < kLanes; ++i) decode_pairs(by_pairs(quads[i]), pairs + 2 * i);
#else
  for (int i = 0; i < kLanes; ++i) {
    uint8_t codes[16], ordered[16];
    std::memcpy(codes, quads + i, sizeof(codes));
    for (int c = 0; c < 16; ++c) ordered[c] = codes[kByPairs[c]];
    pairs_of(ordered, pairs + 2 * i);
  }
#endif
}

// the operands of columns [n, n + kLanes) and the K pair that starts at k
inline void place_pair(Operand* panel, int64_t n, int64_t k, Pairs pairs) {
  Operand* to = panel + (n / kSlice * kPanelDepth + k) * kSlice + n % kSlice;
  const Vector even = even_of(pairs), odd = odd_of(pairs);
  std::memcpy(to, &even, sizeof(Vector));
  std::memcpy(to + kSlice, &odd, sizeof(Vector));
}

// not inline: beside a tile's products, registers would not do
template <typename T>
__attribute__((noinline)) void panel_of_rows(const T* w, int64_t stride, int64_t rows, int64_t depth, Operand* panel) {
  for (int64_t n = 0; n < kPanelWidth; n += kLanes) {
    for (int64_t k = 0; k < depth; k += kStep<T>) {
      Pairs pairs[kStep<T> / 2];
      load_pairs(w + n * stride + k, stride, rows - n, depth - k, pairs);
      for (int64_t i = 0; i < kStep<T> / 2; ++i) place_pair(panel, n, k + 2 * i, pairs[i]);
    }
  }
}

template <typename T>
void panel_of_columns(const T* w, int64_t stride, int64_t columns, int64_t depth, Operand* panel) {
  // whole pairs of K are multiplied
  for (int64_t k = 0; k < depth + depth % 2; ++k) {
    const T* from = w + k * stride;
    const int64_t there = k >= depth ? 0 : columns < kPanelWidth ? columns : kPanelWidth;
    for (int64_t n = 0; n < kPanelWidth; n += kSlice) {
      Operand* to = panel + (n * kPanelDepth + k * kSlice);
      const int64_t count = there - n < 0 ? 0 : there - n;
      if (count >= kSlice) {
        for (int64_t i = 0; i < kSlice; ++i) to[i] = operand_of(from[n + i]);
      } else {
        for (int64_t i = 0; i < kSlice; ++i) to[i] = i < count ? operand_of(from[n + i]) : 0.0f;
      }
    }
  }
}

template <typename T>
void unpack_strips(const T* packed, int64_t stride, int64_t strips, int64_t pairs, Operand* panel) {
  constexpr int64_t kTogether = kPairsOf<T>;
  for (int64_t pair = 0; pair < pairs; pair += kTogether) {
    for (int64_t s = 0; s < strips; ++s) {
      const T* from = packed + s * stride + pair * 2 * kStripWidth;
      for (int64_t j = 0; j < kPieces; ++j) {
        Pairs unpacked[kTogether];
        pairs_of(from + j * kStep<T>, unpacked);
        for (int64_t i = 0; i < kTogether; ++i) {
          place_pair(panel, s * kStripWidth + j * kLanes, 2 * (pair + i), unpacked[i]);
        }
      }
    }
  }
}

template <typename T>
inline const Operand* in_place(const T*) {
  return nullptr;
}

template <typename T>
void operands_of(const T* from, int64_t count, Operand* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = operand_of(from[i]);
  for (int64_t i = count; i < kPanelDepth; ++i) out[i] = 0.0f;
}

struct Strips {
  Panel panel;
};

// to += sum * scale_a * scale_b, the product of scales kept finite: zero codes times an overflown one would be NaN
inline void add_scaled(Vector sum, float scale_a, const float* scale_b, float* to) {
  Vector total, scale;
  std::memcpy(&total, to, sizeof(Vector));
  std::memcpy(&scale, scale_b, sizeof(Vector));
  const Vector factor = scale * scale_a;
  total = total + sum * (factor > kLargest ? Vector{} + kLargest : factor);
  std::memcpy(to, &total, sizeof(Vector));
}

// c [R][64] += a [R][128] x panel, or with scales c += (a x panel) * scale_a * scale_b
template <int R, bool kScaled>
void multiply(const Operand* a, const Strips& strips, int64_t pairs, const float* scale_a, const float* scale_b,
              float* c, Ahead ahead) {
  for (int64_t n = 0; n < kPanelWidth; n += kSlice) {
    Vector acc[R][kVectors] = {};
    if (!kScaled) {
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kVectors; ++j)
          std::memcpy(&acc[r][j], c + r * kPanelWidth + n + j * kLanes, sizeof(Vector));
      }
    }
    const Operand* slice = strips.panel.data + n * kPanelDepth;
    // the first slice asks for all
    const int share = n == 0 ? ahead.share : 0;
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      if (k % 2 == 0) {
        for (int i = 0; i < share; ++i) __builtin_prefetch(ahead.data + k / 2 * ahead.pair + i * ahead.line, 0, 2);
      }
      Vector columns[kVectors];
      for (int j = 0; j < kVectors; ++j) std::memcpy(&columns[j], slice + k * kSlice + j * kLanes, sizeof(Vector));
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kVectors; ++j) acc[r][j] += columns[j] * a[r * kPanelDepth + k];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        float* to = c + r * kPanelWidth + n + j * kLanes;
        if (kScaled) {
          add_scaled(acc[r][j], scale_a[r], scale_b + n + j * kLanes, to);
        } else {
          std::memcpy(to, &acc[r][j], sizeof(Vector));
        }
      }
    }
  }
}

// rows for which the registers hold the sums of two panels
template <typename T>
constexpr int kFewRows = kLanes == 16 ? 3 : 0;

// Few rows against two panels of packed weights: eight strips are read to their end side by side, and no panel is
// written. c and d [R][64]
template <int R, typename T>
void multiply_strips(const T* first, const T* second, int64_t stride, int64_t k, const FewRows& rows,
                     const ColumnScales& first_scales, const ColumnScales& second_scales, float* c, float* d) {
  constexpr bool kScaled = sizeof(T) == 1;
  constexpr int64_t kDepth = 2 * kPairsOf<T>, kAhead = kFetchedBytes / 64;
  Vector acc[2][R][kStrips] = {};
  if (kScaled) {
    std::memset(c, 0, R * kPanelWidth * sizeof(float));
    std::memset(d, 0, R * kPanelWidth * sizeof(float));
  }
  const int64_t steps = (k + kDepth - 1) / kDepth;
  for (int64_t done = 0, block = 0; done < steps; done += kPanelDepth / kDepth, ++block) {
    const int64_t count = steps - done < kPanelDepth / kDepth ? steps - done : kPanelDepth / kDepth;
    const Operand* a = rows.a + block * rows.block;
    for (int64_t step = 0; step < count; ++step, first += kStep<T>, second += kStep<T>, a += kDepth) {
      // past the end of these strips, the strips behind them
      const int64_t next = kAhead * kStep<T> + (done + step + kAhead < steps ? 0 : (kStrips - 1) * stride);
      for (int half = 0; half < 2; ++half) {
        const T* strips = half == 0 ? first : second;
        for (int j = 0; j < kStrips; ++j) {
          __builtin_prefetch(strips + next + j * stride, 0, 2);
          Pairs pairs[kPairsOf<T>];
          pairs_of(strips + j * stride, pairs);
          for (int i = 0; i < kPairsOf<T>; ++i) {
            const Vector even = even_of(pairs[i]), odd = odd_of(pairs[i]);
            for (int r = 0; r < R; ++r) {
              acc[half][r][j] += even * a[r * kPanelDepth + 2 * i];
              acc[half][r][j] += odd * a[r * kPanelDepth + 2 * i + 1];
            }
          }
        }
      }
    }
    for (int half = 0; half < 2 && kScaled; ++half) {
      alignas(64) float scale_b[kPanelWidth];
      (half == 0 ? first_scales : second_scales).load(block, 0, kPanelWidth, scale_b);
      for (int r = 0; r < R; ++r) {
        const float scale_a = rows.scale[block * rows.scale_block + r];
        for (int j = 0; j < kStrips; ++j) {
          add_scaled(acc[half][r][j], scale_a, scale_b + j * kLanes,
                     (half == 0 ? c : d) + r * kPanelWidth + j * kLanes);
          acc[half][r][j] = Vector{};
        }
      }
    }
  }
  for (int r = 0; r < R && !kScaled; ++r) {
    for (int j = 0; j < kStrips; ++j) {
      std::memcpy(c + r * kPanelWidth + j * kLanes, &acc[0][r][j], sizeof(Vector));
      std::memcpy(d + r * kPanelWidth + j * kLanes, &acc[1][r][j], sizeof(Vector));
    }
  }
}

}  // namespace
}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
