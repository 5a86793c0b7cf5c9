// Blocked products of the family's projections on the CPU, on the product of attention/tiles_cpu.h.
#pragma once

#include "attention/tiles_cpu.h"
#include "rope/rope_cpu.h"

namespace tilefuse {

// tokens of one item of work, where items are made of tokens
constexpr int64_t kItemTokens = 240;

namespace TILEFUSE_ISA {

// columns of the result across the registers, rows of it at a time, and words of depth that are one sum
constexpr int kColumns = 64;
constexpr int64_t kResultRows = 48, kDepth = 64;
// panels of kColumns columns whose sums over tokens are kept at a time
constexpr int64_t kPanels = 4;

// c [count][kColumns] = sum over depth of columns [depth][kColumns] and rows, or the sum added to c. Sums of sums: one
// sum over all of the depth would round too often.
template <typename W>
static void multiply(const W* columns, const W* rows, int64_t row_step, int64_t depth_step, int64_t depth,
                     int64_t count, float* c, bool add = false) {
  for (int64_t d = 0; d < depth; d += kDepth, add = true) {
    const int64_t n = depth - d < kDepth ? depth - d : kDepth;
    if (add) {
      product<kColumns, Into::add>(columns + d * kColumns, rows + d * depth_step, row_step, depth_step, n, count, c);
    } else {
      product<kColumns, Into::set>(columns + d * kColumns, rows + d * depth_step, row_step, depth_step, n, count, c);
    }
  }
}

// rows as they lie, where they are made of whole words; null elsewhere
static inline const float* rows_in_place(const float* x, int64_t, int64_t) { return x; }
#if defined(__AVX512BF16__)
static inline const uint32_t* rows_in_place(const bf16* x, int64_t stride, int64_t width) {
  const bool whole = stride % 2 == 0 && width % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0;
  return whole ? reinterpret_cast<const uint32_t*>(x) : nullptr;
}
#else
static inline const float* rows_in_place(const bf16*, int64_t, int64_t) { return nullptr; }
#endif
static inline const float* rows_in_place(const f16*, int64_t, int64_t) { return nullptr; }

// up to kResultRows rows of `width` values as rows of words: where they lie, or packed into `packed`
template <typename T, typename W>
static inline const W* word_rows(const T* x, int64_t stride, int64_t width, int64_t count, W* packed, int64_t* step) {
  const W* direct = rows_in_place(x, stride, width);
  if (direct != nullptr) {
    *step = stride / Operand<T>::per_word;
    return direct;
  }
  const T* from[kResultRows];
  for (int64_t r = 0; r < count; ++r) from[r] = x + r * stride;
  pack_rows(from, count, width, packed);
  *step = words(width, Operand<T>::per_word);
  return packed;
}

// up to a word's number of rows of n <= kColumns values -> one row of words, zeros past n
template <typename T, typename W>
static inline void pack_columns(const T* x, int64_t stride, int64_t count, int64_t n, W* out) {
  constexpr int64_t per = Operand<T>::per_word;
  const T* from[per];
  T tail[per * kColumns];
  for (int64_t i = 0; i < count; ++i) {
    from[i] = x + i * stride;
    if (n == kColumns) continue;
    std::memset(static_cast<void*>(tail + i * kColumns), 0, kColumns * sizeof(T));
    std::memcpy(static_cast<void*>(tail + i * kColumns), static_cast<const void*>(from[i]), n * sizeof(T));
    from[i] = tail + i * kColumns;
  }
  pack_values(from, count, kColumns, out);
}

// all of a panel: `count` rows -> [words of count][kColumns]
template <typename T, typename W>
static void pack_panel(const T* x, int64_t stride, int64_t count, int64_t n, W* out) {
  constexpr int64_t per = Operand<T>::per_word;
  for (int64_t r = 0; r < count; r += per, out += kColumns) {
    pack_columns(x + r * stride, stride, count - r < per ? count - r : per, n, out);
  }
}

// into the second-level cache
template <typename T>
static inline void fetch(const T* row, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(row + i, 0, 2);
}

template <typename T>
static inline void store_panel(const float* c, int64_t count, int64_t n, T* out, int64_t stride) {
  for (int64_t r = 0; r < count; ++r, c += kColumns, out += stride) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(c[i]);
  }
}

// a matrix whose rows are tokens
template <typename T>
struct TokenRows {
  const T* data;
  int64_t stride, width;
};

// out [x.width][y.width] = sum over tokens of x[t][.] y[t][.], the gradient of a weight; up to kPanels * kColumns
// columns of y. The order of the sums depends on nothing but the number of tokens.
template <typename T>
class TokenSums {
  using W = typename Operand<T>::type;
  static constexpr int64_t kPer = Operand<T>::per_word, kChunk = kDepth * kPer;

 public:
  static size_t bytes(int64_t width) {
    return 4 * (kDepth * (row_words(width) + kColumns) + width * kColumns * kPanels) + 256;
  }

  // width: the largest of x
  TokenSums(Scratch& scratch, int64_t width)
      : rows_(scratch.take<W>(kDepth * row_words(width))),
        columns_(scratch.take<W>(kDepth * kColumns)),
        c_(scratch.take<float>(width * kColumns * kPanels)) {}

  void run(const TokenRows<T>& x, const TokenRows<T>& y, int64_t tokens, T* out, int64_t out_stride) {
    const int64_t step = row_words(x.width);
    if (tokens == 0) std::memset(c_, 0, x.width * kColumns * kPanels * sizeof(float));
    for (int64_t t0 = 0; t0 < tokens; t0 += kChunk) {
      const int64_t count = tokens - t0 < kChunk ? tokens - t0 : kChunk;
      for (int64_t t = 0; t < count; t += kPer) {
        const T* from[kPer];
        const int64_t there = count - t < kPer ? count - t : kPer;
        for (int64_t i = 0; i < there; ++i) from[i] = x.data + (t0 + t + i) * x.stride;
        pack_values(from, there, x.width, rows_ + t / kPer * step);
      }
      for (int64_t r0 = 0; r0 < y.width; r0 += kColumns) {
        const int64_t n = y.width - r0 < kColumns ? y.width - r0 : kColumns;
        pack_panel(y.data + t0 * y.stride + r0, y.stride, count, n, columns_);
        multiply(columns_, rows_, 1, step, words(count, kPer), x.width, c_ + r0 * x.width, t0 > 0);
      }
    }
    for (int64_t r0 = 0; r0 < y.width; r0 += kColumns) {
      const int64_t n = y.width - r0 < kColumns ? y.width - r0 : kColumns;
      store_panel(c_ + r0 * x.width, x.width, n, out + r0, out_stride);
    }
  }

 private:
  // an odd number of cache lines, so that one column's words fall into different sets of the first-level cache
  static int64_t row_words(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

  W *rows_, *columns_;
  float* c_;
};

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
