// Panels on CPUs with AVX512-BF16: operands are bfloat16, and pairs along K feed one dot product.
#pragma once

#include "common/panel_operands_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {
namespace {

inline Operand operand_of(uint8_t code) { return static_cast<Operand>(fp8::bits_of(fp8::decode(code)) >> 16); }
inline Operand operand_of(bf16 value) { return value.bits; }

// the two bytes of the bfloat16 value of each e4m3 magnitude
struct CodeBytes {
  alignas(64) uint8_t low[128] = {};
  alignas(64) uint8_t high[128] = {};

  constexpr CodeBytes() {
    constexpr int kSubnormals[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    for (int i = 0; i < 128; ++i) {
      const int value = i == 127 ? 0x7fc0 : i < 8 ? kSubnormals[i] : (i << 4) + (120 << 7);
      low[i] = static_cast<uint8_t>(value & 255);
      high[i] = static_cast<uint8_t>(value >> 8);
    }
  }
};

constexpr CodeBytes kCodeBytes;

// 64 codes to two vectors of bfloat16: the first and the last eight of each 16 bytes
struct CodePairs {
  __m512i low[2], high[2];

  CodePairs() {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(kCodeBytes.low + 64 * i);
      high[i] = _mm512_load_si512(kCodeBytes.high + 64 * i);
    }
  }

  void unpack(__m512i codes, __m512i* pairs) const {
    const __m512i l = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    // magnitude | (codes & 0x80)
    const __m512i h = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    pairs[0] = _mm512_unpacklo_epi8(l, h);
    pairs[1] = _mm512_unpackhi_epi8(l, h);
  }
};

// [16][16] of 32 bits to their transpose
inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

template <typename Mask>
inline Mask first_lanes(int64_t count) {
  constexpr int64_t kLanes = 8 * sizeof(Mask);
  return count >= kLanes ? static_cast<Mask>(~Mask{0})
         : count <= 0    ? Mask{0}
                         : static_cast<Mask>((uint64_t{1} << count) - 1);
}

// K that one load of 16 rows covers
template <typename T>
constexpr int64_t kStep = 64 / sizeof(T);

inline __m512i load_row(const bf16* w, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count), w);
}
inline __m512i load_row(const uint8_t* w, int64_t count) {
  return _mm512_maskz_loadu_epi8(first_lanes<__mmask64>(count), w);
}

// 64 bytes of 16 rows, transposed. Rows past `rows` and elements past `count` are zeros; meanwhile asks for the lines
// of as many rows from `next` on.
template <typename T>
inline void load_rows(const T* w, int64_t stride, int64_t rows, int64_t count, const T* next, __m512i* out) {
  for (int64_t i = 0; i < 16; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + i * stride), _MM_HINT_T1);
  if (rows >= 16 && count >= kStep<T>) {
    for (int64_t i = 0; i < 16; ++i) out[i] = _mm512_loadu_si512(w + i * stride);
  } else {
    for (int64_t i = 0; i < 16; ++i) out[i] = i < rows ? load_row(w + i * stride, count) : _mm512_setzero_si512();
  }
  transpose16(out);
}

// pairs[i]: pair i of the next kStep of K, of 16 rows
inline void load_pairs(const bf16* w, int64_t stride, int64_t rows, int64_t count, const bf16* next, const CodePairs&,
                       __m512i* pairs) {
  load_rows(w, stride, rows, count, next, pairs);
}

inline void load_pairs(const uint8_t* w, int64_t stride, int64_t rows, int64_t count, const uint8_t* next,
                       const CodePairs& codes, __m512i* pairs) {
  __m512i quads[16];
  load_rows(w, stride, rows, count, next, quads);
  // of four rows at a time: all first pairs, then all second pairs
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int i = 0; i < 16; ++i) codes.unpack(_mm512_shuffle_epi8(quads[i], order), pairs + 2 * i);
}

// the panel of rows of the weight
template <typename T>
void panel_of_rows(const T* w, int64_t stride, int64_t rows, int64_t depth, Operand* panel) {
  const CodePairs codes;
  for (int64_t n = 0; n < kPanelWidth; n += 16) {
    for (int64_t k = 0; k < depth; k += kStep<T>) {
      __m512i pairs[kStep<T> / 2];
      const T* from = w + n * stride + k;
      load_pairs(from, stride, rows - n, depth - k, from, codes, pairs);
      for (int64_t i = 0; i < kStep<T> / 2; ++i) {
        _mm512_store_si512(panel + n * kPanelDepth + (k / 2 + i) * 32, pairs[i]);
      }
    }
  }
}

inline __m512i load32(const bf16* w, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count), w);
}

inline __m512i load32(const uint8_t* w, int64_t count) {
  alignas(64) Operand values[32];
  for (int64_t i = 0; i < 32; ++i) values[i] = i < count ? operand_of(w[i]) : Operand{0};
  return _mm512_load_si512(values);
}

// of columns: the elements of each k lie side by side
template <typename T>
void panel_of_columns(const T* w, int64_t stride, int64_t columns, int64_t depth, Operand* panel) {
  alignas(64) uint16_t places[2][32];
  for (int i = 0; i < 64; ++i) places[i / 32][i % 32] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  const __m512i low = _mm512_load_si512(places[0]), high = _mm512_load_si512(places[1]);
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t n = 0; n < kPanelWidth; n += 32) {
      const T* from = w + k * stride + n;
      const __m512i even = load32(from, columns - n);
      const __m512i odd = k + 1 < depth ? load32(from + stride, columns - n) : _mm512_setzero_si512();
      Operand* to = panel + n * kPanelDepth + k / 2 * 32;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(to + kStripWidth * kPanelDepth, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// packed strips [.., 16] as the strips of a panel, `stride` elements apart; side by side, as several streams are read
// faster than one
inline void unpack_strips(const bf16* packed, int64_t stride, int64_t strips, int64_t pairs, Operand* panel) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t s = 0; s < strips; ++s) {
      _mm512_store_si512(panel + s * kStrip + pair * 32, _mm512_loadu_si512(packed + s * stride + pair * 32));
    }
  }
}

inline void unpack_strips(const uint8_t* packed, int64_t stride, int64_t strips, int64_t pairs, Operand* panel) {
  const CodePairs codes;
  for (int64_t pair = 0; pair < pairs; pair += 2) {
    for (int64_t s = 0; s < strips; ++s) {
      const uint8_t* from = packed + s * stride + pair * 32;
      _mm_prefetch(reinterpret_cast<const char*>(from) + kFetchedBytes, _MM_HINT_T1);
      __m512i two[2];
      codes.unpack(_mm512_loadu_si512(from), two);
      _mm512_store_si512(panel + s * kStrip + pair * 32, two[0]);
      _mm512_store_si512(panel + s * kStrip + pair * 32 + 32, two[1]);
    }
  }
}

inline void place(Operand* panel, int64_t n, int64_t k, Operand value) {
  panel[n / kStripWidth * kStrip + (k / 2 * kStripWidth + n % kStripWidth) * 2 + k % 2] = value;
}

// packed bfloat16 strips are those of a panel
inline const Operand* in_place(const bf16* packed) { return reinterpret_cast<const Operand*>(packed); }
inline const Operand* in_place(const uint8_t*) { return nullptr; }

inline void operands_of(const bf16* from, int64_t count, Operand* out) {
  for (int64_t i = 0; i < kPanelDepth; i += 32) {
    _mm512_storeu_si512(out + i, _mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count - i), from + i));
  }
}

template <typename T>
void operands_of(const T* from, int64_t count, Operand* out) {
  for (int64_t i = 0; i < kPanelDepth; ++i) out[i] = i < count ? operand_of(from[i]) : Operand{0};
}

inline __m512bh pair_of(const Operand* a) {
  int32_t two;
  std::memcpy(&two, a, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}

// scale_a * scale_b, kept finite: zero codes times an overflown product would be NaN (a NaN scale, the second, stays)
inline __m512 joint_scale(float scale_a, const float* scale_b) {
  return _mm512_min_ps(_mm512_set1_ps(kLargest), _mm512_mul_ps(_mm512_set1_ps(scale_a), _mm512_loadu_ps(scale_b)));
}

// the strips of a panel as they lie
struct Strips {
  Panel panel;

  template <typename Add>
  void pair(int64_t at, const Add& add) const {
    __m512bh columns[kStrips];
    for (int j = 0; j < kStrips; ++j) {
      columns[j] = (__m512bh)_mm512_loadu_si512(panel.data + j * panel.stride + at * 32);
    }
    add(at, columns);
  }
};

// strips of packed codes, which the first tile of rows unpacks into a panel for the others
struct CodeStrips {
  const uint8_t* data;
  int64_t stride;
  Operand* panel;
  CodePairs codes;

  // of the pairs at 2 i and 2 i + 1, at the even one
  template <typename Add>
  void pair(int64_t at, const Add& add) const {
    if (at % 2 != 0) return;
    __m512bh columns[2][kStrips];
    for (int j = 0; j < kStrips; ++j) {
      __m512i two[2];
      codes.unpack(_mm512_loadu_si512(data + j * stride + at * 32), two);
      for (int i = 0; i < 2; ++i) {
        _mm512_store_si512(panel + j * kStrip + (at + i) * 32, two[i]);
        columns[i][j] = (__m512bh)two[i];
      }
    }
    add(at, columns[0]);
    add(at + 1, columns[1]);
  }
};

// c [R][64] += a [R][128] x panel, with scales c += (a x panel) * scale_a * scale_b
template <int R, bool kScaled, typename Columns>
void multiply(const Operand* a, const Columns& columns, int64_t pairs, const float* scale_a, const float* scale_b,
              float* c, Ahead ahead) {
  __m512 acc[R][kStrips];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kStrips; ++j) {
      acc[r][j] = kScaled ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelWidth + j * 16);
    }
  }
  // meanwhile the rows and the sums of the next tile, R rows on, come to the first cache
  constexpr int64_t kTileLines = R * kPanelDepth * sizeof(Operand) / 64;
  for (int64_t pair = 0; pair < pairs; ++pair, ahead.data += ahead.pair) {
    if (pair < kTileLines) {
      _mm_prefetch(reinterpret_cast<const char*>(a + R * kPanelDepth + pair * 32), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(c + R * kPanelWidth + pair * 16), _MM_HINT_T0);
    }
    for (int i = 0; i < ahead.share; ++i) _mm_prefetch(ahead.data + i * ahead.line, _MM_HINT_T1);
    columns.pair(pair, [&](int64_t at, const __m512bh* strips) {
      for (int r = 0; r < R; ++r) {
        const __m512bh row = pair_of(a + r * kPanelDepth + at * 2);
        for (int j = 0; j < kStrips; ++j) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], row, strips[j]);
      }
    });
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kStrips; ++j) {
      float* to = c + r * kPanelWidth + j * 16;
      if (kScaled) {
        acc[r][j] = _mm512_fmadd_ps(acc[r][j], joint_scale(scale_a[r], scale_b + j * 16), _mm512_loadu_ps(to));
      }
      _mm512_storeu_ps(to, acc[r][j]);
    }
  }
}

// rows for which the registers hold the sums of two panels
template <typename T>
constexpr int kFewRows = sizeof(T) == 2 ? 3 : 2;

// Few rows against two panels of packed bfloat16: eight strips are read to their end side by side, as one stream alone
// does not keep the memory busy. c and d [R][64]
template <int R>
void multiply_strips(const bf16* first, const bf16* second, int64_t stride, int64_t k, const FewRows& rows,
                     const ColumnScales&, const ColumnScales&, float* c, float* d) {
  constexpr int64_t kAhead = kFetchedBytes / 64;
  __m512 acc[2][R][kStrips];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kStrips; ++j) acc[0][r][j] = acc[1][r][j] = _mm512_setzero_ps();
  }
  const int64_t pairs = (k + 1) / 2;
  for (int64_t done = 0, block = 0; done < pairs; done += kPanelDepth / 2, ++block) {
    const int64_t count = pairs - done < kPanelDepth / 2 ? pairs - done : kPanelDepth / 2;
    const Operand* a = rows.a + block * rows.block;
    for (int64_t pair = 0; pair < count; ++pair, first += 32, second += 32, a += 2) {
      // past the end of these strips, the strips behind them
      const int64_t next = kAhead * 32 + (done + pair + kAhead < pairs ? 0 : (kStrips - 1) * stride);
      __m512bh row[R];
      for (int r = 0; r < R; ++r) row[r] = pair_of(a + r * kPanelDepth);
      for (int half = 0; half < 2; ++half) {
        const bf16* strips = half == 0 ? first : second;
        for (int j = 0; j < kStrips; ++j) {
          _mm_prefetch(reinterpret_cast<const char*>(strips + next + j * stride), _MM_HINT_T1);
          const __m512bh columns = (__m512bh)_mm512_loadu_si512(strips + j * stride);
          for (int r = 0; r < R; ++r) acc[half][r][j] = _mm512_dpbf16_ps(acc[half][r][j], row[r], columns);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kStrips; ++j) {
      _mm512_storeu_ps(c + r * kPanelWidth + j * 16, acc[0][r][j]);
      _mm512_storeu_ps(d + r * kPanelWidth + j * 16, acc[1][r][j]);
    }
  }
}

// the same of packed codes
template <int R>
void multiply_strips(const uint8_t* first, const uint8_t* second, int64_t stride, int64_t k, const FewRows& rows,
                     const ColumnScales& first_scales, const ColumnScales& second_scales, float* c, float* d) {
  constexpr int64_t kAhead = kFetchedBytes / 64;
  const CodePairs codes;
  std::memset(c, 0, R * kPanelWidth * sizeof(float));
  std::memset(d, 0, R * kPanelWidth * sizeof(float));
  const int64_t quads = (k + 3) / 4;
  for (int64_t done = 0, block = 0; done < quads; done += kPanelDepth / 4, ++block) {
    const int64_t count = quads - done < kPanelDepth / 4 ? quads - done : kPanelDepth / 4;
    const Operand* a = rows.a + block * rows.block;
    __m512 acc[2][R][kStrips];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kStrips; ++j) acc[0][r][j] = acc[1][r][j] = _mm512_setzero_ps();
    }
    for (int64_t quad = 0; quad < count; ++quad, first += 64, second += 64, a += 4) {
      const int64_t next = kAhead * 64 + (done + quad + kAhead < quads ? 0 : (kStrips - 1) * stride);
      for (int half = 0; half < 2; ++half) {
        const uint8_t* strips = half == 0 ? first : second;
        for (int j = 0; j < kStrips; ++j) {
          _mm_prefetch(reinterpret_cast<const char*>(strips + next + j * stride), _MM_HINT_T1);
          __m512i pairs[2];
          codes.unpack(_mm512_loadu_si512(strips + j * stride), pairs);
          for (int r = 0; r < R; ++r) {
            __m512& sum = acc[half][r][j];
            sum = _mm512_dpbf16_ps(sum, pair_of(a + r * kPanelDepth), (__m512bh)pairs[0]);
            sum = _mm512_dpbf16_ps(sum, pair_of(a + r * kPanelDepth + 2), (__m512bh)pairs[1]);
          }
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      alignas(64) float scale_b[kPanelWidth];
      (half == 0 ? first_scales : second_scales).load(block, 0, kPanelWidth, scale_b);
      for (int r = 0; r < R; ++r) {
        const float scale_a = rows.scale[block * rows.scale_block + r];
        for (int j = 0; j < kStrips; ++j) {
          float* to = (half == 0 ? c : d) + r * kPanelWidth + j * 16;
          const __m512 scale = joint_scale(scale_a, scale_b + j * 16);
          _mm512_storeu_ps(to, _mm512_fmadd_ps(acc[half][r][j], scale, _mm512_loadu_ps(to)));
        }
      }
    }
  }
}

// Few rows against rows of the weight: no panel is written, 16 weight rows are read to their end at a time.
template <int R, typename T>
__attribute__((noinline)) void multiply_rows(const T* w, int64_t stride, int64_t columns, int64_t k,
                                             const FewRows& rows, const ColumnScales& scales, float* c) {
  constexpr bool kScaled = sizeof(T) == 1;
  const CodePairs codes;
  for (int64_t n = 0; n < columns; n += 16) {
    __m512 total[R];
    for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t start = 0, block = 0; start < k; start += kPanelDepth, ++block) {
      const int64_t depth = k - start < kPanelDepth ? k - start : kPanelDepth;
      __m512 acc[R];
      for (int r = 0; r < R; ++r) acc[r] = kScaled ? _mm512_setzero_ps() : total[r];
      for (int64_t i = 0; i < depth; i += kStep<T>) {
        __m512i pairs[kStep<T> / 2];
        // what the stream comes to next, past the end of these rows the 16 rows behind them
        const int64_t at = start + i, then = at + kFetchedBytes / static_cast<int64_t>(sizeof(T));
        const T* next = w + n * stride + (then < k ? then : then - k + 16 * stride);
        load_pairs(w + n * stride + at, stride, columns - n, depth - i, next, codes, pairs);
        const Operand* a = rows.a + block * rows.block + i;
        const auto add = [&](int64_t p) {
          for (int r = 0; r < R; ++r) {
            acc[r] = _mm512_dpbf16_ps(acc[r], pair_of(a + r * kPanelDepth + 2 * p), (__m512bh)pairs[p]);
          }
        };
        const int64_t count = (depth - i + 1) / 2;
        if (count >= kStep<T> / 2) {
          for (int64_t p = 0; p < kStep<T> / 2; ++p) add(p);
        } else {
          for (int64_t p = 0; p < count; ++p) add(p);
        }
      }
      if (kScaled) {
        alignas(64) float scale_b[16];
        scales.load(block, n, 16, scale_b);
        for (int r = 0; r < R; ++r) {
          const float scale_a = rows.scale[block * rows.scale_block + r];
          total[r] = _mm512_fmadd_ps(acc[r], joint_scale(scale_a, scale_b), total[r]);
        }
      } else {
        for (int r = 0; r < R; ++r) total[r] = acc[r];
      }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(c + r * kPanelWidth + n, total[r]);
  }
}

}  // namespace
}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
