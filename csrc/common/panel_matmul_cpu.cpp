// build-flags: -ffp-contract=fast
// The products of common/panel_matmul.h. Values of both operands are exact in bfloat16 and their products exact in
// float32, so contraction changes no bit of a product.
#include "common/fp8.h"
#include "common/immintrin.h"
#include "common/panel_matmul.h"

#if defined(__AVX512BF16__)
#define TILEFUSE_PAIRS 1
#endif

namespace tilefuse {

struct PanelStore {
  char* out;
  Dtype dtype;
  const void* bias;  // [G, N] or nullptr
  Dtype bias_dtype;
};

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kTileRows = 6;  // of M: one register tile
constexpr int64_t kStripWidth = 16, kStrips = kPanelWidth / kStripWidth;
constexpr int64_t kStrip = kStripWidth * kPanelDepth;  // operands of a strip of a panel
constexpr int64_t kFetchedBytes = 1024;                // how far ahead a stream of weights is asked for
constexpr float kLargest = 3.4028234663852886e38f;

#if defined(TILEFUSE_PAIRS)
using Operand = uint16_t;
#else
using Operand = float;
#endif

// Lines of the weight that the next panel is made of: `count` of them for each pair of K, `line` bytes apart, and the
// next pair's `pair` bytes on. A tile of rows asks for `share` of them.
struct Ahead {
  const char* data;
  int64_t pair, line;
  int share, count;
};

// four strips [64 pairs of K][16 of N][2], `stride` operands apart (elsewhere than on AVX512-BF16 another layout)
struct Panel {
  const Operand* data;
  int64_t stride;
};

// the scales of a weight's columns from n on
struct ColumnScales {
  const PanelWeight& w;
  int64_t group, n;

  // of columns [first, first + count) in one block of K; 0 past the last column
  void load(int64_t block, int64_t first, int64_t count, float* out) const {
    const float* scale = w.scale + group * w.scale_group + block * w.scale_block;
    for (int64_t i = 0; i < count;) {
      const int64_t column = n + first + i, row = column / w.scale_rows, end = (row + 1) * w.scale_rows - column;
      const float value = column < w.n ? scale[row * w.scale_row] : 0.0f;
      for (const int64_t stop = i + end < count ? i + end : count; i < stop; ++i) out[i] = value;
    }
  }
};

// element (n, k) of one group of a packed weight with `all` rows
template <typename T>
inline T packed_element(const T* data, int64_t all, int64_t padded, int64_t n, int64_t k) {
  if (n >= all / kStripWidth * kStripWidth) return data[n * padded + k];
  const int64_t c = n % kStripWidth;
  const T* strip = data + (n - c) * padded;
  if (sizeof(T) == 2) return strip[(k / 2 * kStripWidth + c) * 2 + k % 2];
  return strip[k / 4 * 64 + c / 4 * 16 + k % 4 / 2 * 8 + c % 4 * 2 + k % 2];
}

#if defined(TILEFUSE_PAIRS)

// operands are bfloat16, and pairs along K feed one dot product

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

// where few rows' operands and scales lie: `block` and `scale_block` lead from one 128 of K to the next
struct FewRows {
  const Operand* a;
  const float* scale;
  int64_t block, scale_block;
};

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

#else

// operands are float32, in vectors of the instruction set

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

template <typename T>
void panel_of_rows(const T* w, int64_t stride, int64_t rows, int64_t depth, Operand* panel) {
  for (int64_t n = 0; n < kPanelWidth; ++n) {
    for (int64_t k = 0; k < depth; ++k) place(panel, n, k, n < rows ? operand_of(w[n * stride + k]) : 0.0f);
    // whole pairs of K are multiplied
    if (depth % 2 != 0) place(panel, n, depth, 0.0f);
  }
}

template <typename T>
void panel_of_columns(const T* w, int64_t stride, int64_t columns, int64_t depth, Operand* panel) {
  // whole pairs of K are multiplied
  for (int64_t k = 0; k < depth + depth % 2; ++k) {
    for (int64_t n = 0; n < kPanelWidth; ++n) {
      place(panel, n, k, n < columns && k < depth ? operand_of(w[k * stride + n]) : 0.0f);
    }
  }
}

template <typename T>
void unpack_strips(const T* packed, int64_t stride, int64_t strips, int64_t pairs, Operand* panel) {
  for (int64_t n = 0; n < strips * kStripWidth; ++n) {
    const T* strip = packed + n / kStripWidth * stride;
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      place(panel, n, k, operand_of(packed_element(strip, kStripWidth, 2 * pairs, n % kStripWidth, k)));
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

// c [R][64] += a [R][128] x panel, or with scales c += (a x panel) * scale_a * scale_b
template <int R, bool kScaled>
void multiply(const Operand* a, const Strips& strips, int64_t pairs, const float* scale_a, const float* scale_b,
              float* c, Ahead) {
  for (int64_t n = 0; n < kPanelWidth; n += kSlice) {
    Vector acc[R][kVectors] = {};
    if (!kScaled) {
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kVectors; ++j)
          std::memcpy(&acc[r][j], c + r * kPanelWidth + n + j * kLanes, sizeof(Vector));
      }
    }
    const Operand* slice = strips.panel.data + n * kPanelDepth;
    for (int64_t k = 0; k < 2 * pairs; ++k) {
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
          Vector sum, s;
          std::memcpy(&sum, to, sizeof(Vector));
          std::memcpy(&s, scale_b + n + j * kLanes, sizeof(Vector));
          // kept finite: zero codes times an overflown product would be NaN
          const Vector factor = s * scale_a[r];
          acc[r][j] = sum + acc[r][j] * (factor > kLargest ? Vector{} + kLargest : factor);
        }
        std::memcpy(to, &acc[r][j], sizeof(Vector));
      }
    }
  }
}

#endif

template <int R>
struct Rows {
  static constexpr int kCount = R;
};

// calls body with a number of rows, at most kTileRows, as a type
template <typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  switch (rows) {
    case 1:
      return body(Rows<1>{});
    case 2:
      return body(Rows<2>{});
    case 3:
      return body(Rows<3>{});
    case 4:
      return body(Rows<4>{});
    case 5:
      return body(Rows<5>{});
    default:
      return body(Rows<kTileRows>{});
  }
}

// whether columns [n, n + 64) are strips of a packed weight
inline bool whole_strips(const PanelWeight& w, int64_t n) {
  const int64_t packed = w.n / kStripWidth * kStripWidth;
  return w.form == WeightForm::packed && n % kStripWidth == 0 && n + kPanelWidth <= packed;
}

// columns [n, n + 64) of a packed weight from `start` of K on: in place where strips are what a panel has, else in
// `room`
template <typename T>
Panel packed_panel(const PanelWeight& w, const T* data, int64_t n, int64_t start, int64_t depth, Operand* room) {
  const int64_t pairs = (depth + 1) / 2, stride = kStripWidth * w.stride;
  const int64_t there = n % kStripWidth == 0 ? (w.n - n) / kStripWidth : 0;
  const int64_t strips = there < kStrips ? there : kStrips;
  const T* first = data + n * w.stride + start * kStripWidth;
  if (strips == kStrips && in_place(first) != nullptr) return {in_place(first), stride};
  if (strips > 0) unpack_strips(first, stride, strips, pairs, room);
  for (int64_t c = strips * kStripWidth; c < kPanelWidth; ++c) {
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      const bool inside = n + c < w.n && k < depth;
      place(room, c, k, inside ? operand_of(packed_element(data, w.n, w.stride, n + c, start + k)) : Operand{0});
    }
  }
  return {room, kStrip};
}

template <typename T>
Panel panel_of(const PanelWeight& w, const T* data, int64_t n, int64_t start, int64_t depth, Operand* room) {
  switch (w.form) {
    case WeightForm::rows:
      panel_of_rows(data + n * w.stride + start, w.stride, w.n - n, depth, room);
      return {room, kStrip};
    case WeightForm::columns:
      panel_of_columns(data + start * w.stride + n, w.stride, w.n - n, depth, room);
      return {room, kStrip};
    default:
      return packed_panel(w, data, n, start, depth, room);
  }
}

// what is multiplied after the panel at (n, start): lines for `tiles` tiles of rows to ask for between them
template <typename T>
Ahead ahead_of(const PanelWeight& w, const T* data, int64_t n, int64_t start, int64_t tiles) {
  start += kPanelDepth;
  if (start >= w.k) {
    start = 0;
    n += kPanelWidth;
  }
  Ahead ahead{};
  if (start + kPanelDepth > w.k || n + kPanelWidth > w.n || w.form == WeightForm::columns) return ahead;
  constexpr int64_t kSize = sizeof(T);
  if (w.form == WeightForm::packed) {
    ahead = {reinterpret_cast<const char*>(data + n * w.stride + start * kStripWidth), 32 * kSize,
             kStripWidth * w.stride * kSize, 0, static_cast<int>(kStrips)};
  } else {
    ahead = {reinterpret_cast<const char*>(data + n * w.stride + start), w.stride * kSize, 64, 0,
             static_cast<int>(kPanelDepth * kSize / 64)};
  }
  ahead.share = static_cast<int>((ahead.count + tiles - 1) / tiles);
  return ahead;
}

template <bool kScaled, typename T>
void product_of(const PanelProduct& product, const Segment& part, int64_t n, float* c) {
  const PanelWeight& w = product.weight;
  const PanelRows& rows = product.rows;
  const T* data = static_cast<const T*>(w.data) + part.group * w.group;
  const ColumnScales scales{w, part.group, n};
  const int64_t k = w.k, count = part.end - part.begin, first = part.begin - rows.first;
  const Operand* a = static_cast<const Operand*>(rows.operands) + first * kPanelDepth;
#if defined(TILEFUSE_PAIRS)
  if (count <= kTileRows && w.form == WeightForm::rows) {
    const FewRows few{a, rows.scales + first, rows.rows * kPanelDepth, rows.rows};
    const int64_t columns = w.n - n < kPanelWidth ? w.n - n : kPanelWidth;
    return with_rows(count, [&](auto r) {
      multiply_rows<decltype(r)::kCount>(data + n * w.stride, w.stride, columns, k, few, scales, c);
    });
  }
#endif
  alignas(64) Operand room[kPanelDepth * kPanelWidth];
  alignas(64) float scale_b[kPanelWidth];
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  std::memset(c, 0, static_cast<size_t>(count * kPanelWidth) * sizeof(float));
  for (int64_t start = 0, block = 0; start < k; start += kPanelDepth, ++block) {
    const int64_t depth = k - start < kPanelDepth ? k - start : kPanelDepth;
#if defined(TILEFUSE_PAIRS)
    const bool unpacks = sizeof(T) == 1 && whole_strips(w, n);
#else
    constexpr bool unpacks = false;
#endif
    const Strips strips{unpacks ? Panel{room, kStrip} : panel_of(w, data, n, start, depth, room)};
    if (kScaled) scales.load(block, 0, kPanelWidth, scale_b);
    Ahead ahead = ahead_of(w, data, n, start, tiles);
    for (int64_t tile = 0, r = 0; tile < tiles; ++tile) {
      // tiles of equal height
      const int64_t height = (count - r + tiles - tile - 1) / (tiles - tile);
      const int64_t at = block * rows.rows + r;
      const auto add = [&](const auto& columns) {
        with_rows(height, [&](auto tile_rows) {
          multiply<decltype(tile_rows)::kCount, kScaled>(a + at * kPanelDepth, columns, (depth + 1) / 2,
                                                         rows.scales + first + at, scale_b, c + r * kPanelWidth, ahead);
        });
      };
#if defined(TILEFUSE_PAIRS)
      if constexpr (sizeof(T) == 1) {
        const uint8_t* codes = data + n * w.stride + start * kStripWidth;
        unpacks&& tile == 0 ? add(CodeStrips{codes, kStripWidth * w.stride, room, CodePairs{}}) : add(strips);
      } else {
        add(strips);
      }
#else
      add(strips);
#endif
      r += height;
      ahead.data += ahead.share * ahead.line;
      ahead.count -= ahead.share;
      if (ahead.count < ahead.share) ahead.share = ahead.count > 0 ? ahead.count : 0;
    }
  }
}

template <bool kScaled, typename T>
void products_of(const PanelProduct& product, const Segment& part, int64_t n, int64_t m, float* c, float* d) {
#if defined(TILEFUSE_PAIRS)
  const PanelWeight& w = product.weight;
  const PanelRows& rows = product.rows;
  const int64_t count = part.end - part.begin, first = part.begin - rows.first;
  if (count <= kFewRows<T> && whole_strips(w, n) && whole_strips(w, m)) {
    const T* data = static_cast<const T*>(w.data) + part.group * w.group;
    const Operand* a = static_cast<const Operand*>(rows.operands) + first * kPanelDepth;
    const FewRows few{a, rows.scales + first, rows.rows * kPanelDepth, rows.rows};
    return with_rows(count, [&](auto r) {
      // more rows than kFewRows are never asked for
      constexpr int kCount = decltype(r)::kCount < kFewRows<T> ? decltype(r)::kCount : kFewRows<T>;
      multiply_strips<kCount>(data + n * w.stride, data + m * w.stride, kStripWidth * w.stride, w.k, few,
                              ColumnScales{w, part.group, n}, ColumnScales{w, part.group, m}, c, d);
    });
  }
#endif
  product_of<kScaled, T>(product, part, n, c);
  if (m < product.weight.n) product_of<kScaled, T>(product, part, m, d);
}

template <typename T, typename Bias>
void store(const float* c, int64_t rows, int64_t columns, const Bias* bias, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, c += kPanelWidth, out += out_stride) {
    if (bias == nullptr) {
      for (int64_t n = 0; n < columns; ++n) out[n] = from_float<T>(c[n]);
    } else {
      for (int64_t n = 0; n < columns; ++n) out[n] = from_float<T>(c[n] + to_float(bias[n]));
    }
  }
}

template <typename T>
void unpack_rows(const PanelRows& rows, int64_t k, int64_t begin, int64_t end) {
  Operand* operands = static_cast<Operand*>(rows.operands);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = source_row(rows.source, rows.first + r);
    const T* from = static_cast<const T*>(rows.source.data) + at * rows.source.stride;
    for (int64_t start = 0, block = 0; start < k; start += kPanelDepth, ++block) {
      const int64_t to = block * rows.rows + r;
      if (at < 0) {
        std::memset(operands + to * kPanelDepth, 0, kPanelDepth * sizeof(Operand));
      } else {
        operands_of(from + start, k - start < kPanelDepth ? k - start : kPanelDepth, operands + to * kPanelDepth);
      }
      if (rows.scales != nullptr) {
        const bool own = rows.scale != nullptr && at >= 0;
        rows.scales[to] = own ? rows.scale[at * rows.scale_row + block * rows.scale_block] : 1.0f;
      }
    }
  }
}

}  // namespace

void panel_products(const PanelProduct& product, const Segment& part, int64_t n, int64_t m, float* c, float* d) {
  product.weight.codes ? products_of<true, uint8_t>(product, part, n, m, c, d)
                       : products_of<false, bf16>(product, part, n, m, c, d);
}

void panel_operand_bytes(int64_t* bytes) { *bytes = sizeof(Operand); }

// rows [begin, end) of those that are unpacked
void panel_unpack(const PanelRows& rows, int64_t k, int64_t begin, int64_t end) {
  rows.codes ? unpack_rows<uint8_t>(rows, k, begin, end) : unpack_rows<bf16>(rows, k, begin, end);
}

// the panels of a range of work, stored as rows of the output; c: two panels of a part's rows
void panel_store(const PanelProduct& product, const PanelStore& store_to, float* c, int64_t begin, int64_t end) {
  const int64_t n_all = product.weight.n;
  for_items(product, begin, end, [&](const Segment& part, int64_t item) {
    const int64_t first = item * 2 * kPanelWidth;
    float* halves[2] = {c, c + kPartRows * kPanelWidth};
    panel_products(product, part, first, first + kPanelWidth, halves[0], halves[1]);
    for (int half = 0; half < 2; ++half) {
      const int64_t n = first + half * kPanelWidth, columns = n_all - n < kPanelWidth ? n_all - n : kPanelWidth;
      if (columns <= 0) break;
      TILEFUSE_BY_DTYPE(store_to.dtype, T, {
        T* out = reinterpret_cast<T*>(store_to.out) + part.begin * n_all + n;
        TILEFUSE_BY_DTYPE(store_to.bias_dtype, Bias, {
          const Bias* bias = static_cast<const Bias*>(store_to.bias);
          if (bias != nullptr) bias += part.group * n_all + n;
          store(halves[half], part.end - part.begin, columns, bias, out, n_all);
        })
      })
    }
  });
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(panel_operand_bytes)
TILEFUSE_DISPATCH(panel_unpack)
TILEFUSE_DISPATCH(panel_store)

namespace {

constexpr int64_t kUnpackedRows = 2048;  // rows unpacked at a time

// rows per task of a parallel loop: about 32768 elements
int64_t unpack_grain(int64_t k) { return 1 + 32768 / (k + 1); }

}  // namespace

PanelRows panel_rows(const SourceRows& source) {
  PanelRows rows{};
  rows.source = source;
  return rows;
}

PanelRows panel_rows(const Tensor& a, const OptionalTensor& a_scale) {
  const SourceRows source{a.const_data_ptr(), a.size(0), stride_or_zero(a, 0), {}, 1};
  if (!a_scale) return panel_rows(source);
  PanelRows rows{};
  rows.source = source;
  rows.codes = true;
  rows.scale = pointer<const float>(*a_scale);
  rows.scale_row = stride_or_zero(*a_scale, 0);
  rows.scale_block = stride_or_zero(*a_scale, 1);
  return rows;
}

PanelWeight panel_weight(const Tensor& b, const OptionalTensor& b_scale, int64_t dims, int64_t k) {
  const int64_t lead = dims - 2;
  PanelWeight w{};
  w.data = b.const_data_ptr();
  w.codes = b.element_size() == 1;
  w.n = b.size(lead);
  w.k = k;
  w.group = lead > 0 ? stride_or_zero(b, 0) : 0;
  if (b.dim() > dims) {
    w.form = WeightForm::packed;
    w.stride = b.size(lead + 1) * 2;
  } else if (b.stride(lead + 1) == 1 || b.size(lead + 1) <= 1) {
    w.form = WeightForm::rows;
    w.stride = stride_or_zero(b, lead);
  } else {
    w.form = WeightForm::columns;
    w.stride = b.stride(lead + 1);
  }
  if (b_scale) {
    w.scale = pointer<const float>(*b_scale);
    w.scale_group = lead > 0 ? stride_or_zero(*b_scale, 0) : 0;
    w.scale_row = stride_or_zero(*b_scale, lead);
    w.scale_block = stride_or_zero(*b_scale, lead + 1);
    w.scale_rows = b_scale->size(lead) == w.n ? 1 : kPanelDepth;
  }
  return w;
}

void panel_matmul(PanelProduct product, const std::vector<Segment>& segments,
                  const std::function<void(const PanelProduct&, int64_t)>& run) {
  if (segments.empty() || product.weight.n == 0) return;
  const int64_t k = product.weight.k, blocks = panel_blocks(k), last = segments.back().end;
  PanelRows& rows = product.rows;
  int64_t bytes = 0;
  panel_operand_bytes(&bytes);
  rows.first = segments.front().begin;
  const int64_t most = last - rows.first < kUnpackedRows ? last - rows.first : kUnpackedRows;
  const int64_t room = most * blocks * kPanelDepth * bytes + 64;
  const std::unique_ptr<char[]> operands(new char[static_cast<size_t>(room)]);
  prefer_huge_pages(operands.get(), room);
  const std::unique_ptr<float[]> scales(new float[static_cast<size_t>(most * blocks + 1)]);
  // aligned to a cache line
  rows.operands = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(operands.get()) + 63) / 64 * 64);
  rows.scales = product.weight.codes ? scales.get() : nullptr;
  if (product.items == 0) product.items = (product.weight.n + 2 * kPanelWidth - 1) / (2 * kPanelWidth);
  for (; rows.first < last; rows.first += kUnpackedRows) {
    const int64_t stop = last - rows.first < kUnpackedRows ? last : rows.first + kUnpackedRows;
    rows.rows = stop - rows.first;
    run_parallel(panel_unpack, rows.rows, unpack_grain(k), rows, k);
    std::vector<Segment> parts;
    std::vector<int64_t> starts;
    int64_t units = 0;
    for (const Segment& s : segments) {
      const int64_t begin = s.begin > rows.first ? s.begin : rows.first, end = s.end < stop ? s.end : stop;
      for (int64_t r = begin; r < end; r += kPartRows) {
        parts.push_back({s.group, r, end - r < kPartRows ? end : r + kPartRows});
        starts.push_back(units);
        units += product.items * item_units(parts.back());
      }
    }
    product.parts = parts.data();
    product.starts = starts.data();
    product.count = static_cast<int64_t>(parts.size());
    run(product, units);
  }
}

void panel_matmul(const PanelProduct& product, const std::vector<Segment>& segments, const OptionalTensor& bias,
                  Tensor& out) {
  const PanelStore store_to{pointer<char>(out), dtype_of(out), pointer<const void>(bias),
                            bias ? dtype_of(*bias) : Dtype::f32};
  panel_matmul(product, segments, [&](const PanelProduct& chunk, int64_t units) {
    run_parallel(panel_store, units, 64, chunk, store_to, RangeScratch<float>{2 * kPartRows * kPanelWidth});
  });
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
