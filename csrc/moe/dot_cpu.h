// Grouped matmul of bfloat16 rows that are contiguous along K, on AVX512-BF16: every output element is a dot product of
// two rows, so weights are read in place (PyTorch's matmul repacks them, which costs as much as a few tens of rows of
// work), rows are gathered by pointer, and an element does not depend on the tile that it was computed in.
#pragma once

#include "common/cpu.h"
#include "common/cpu_math.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define TILEFUSE_MOE_DOT 1
// GCC 12 takes the header's own undefined vectors for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace tilefuse {

// rows [row_begin, row_end) of one expert against its weight rows [n_begin, n_end)
struct Tile {
  int64_t expert, row_begin, row_end, n_begin, n_end;
};

constexpr int64_t TILE_ROWS = 48;  // rows of a tile; they stay in L2
constexpr int64_t TILE_COLS = 64;

// rows that a kernel reads, gathered where there is an index
struct Rows {
  const void* data;
  int64_t count, stride;
  const void* index;  // nullptr: row p itself
  bool wide;          // int64 index
  int64_t div;
};

// row of a that output row p reads, -1 where its index points outside
static inline int64_t source_row(const Rows& rows, int64_t p) {
  int64_t at = p;
  if (rows.index != nullptr) {
    at = rows.wide ? static_cast<const int64_t*>(rows.index)[p] : static_cast<const int32_t*>(rows.index)[p];
    if (at < 0) return -1;
    if (rows.div != 1) at /= rows.div;
  }
  return at < rows.count ? at : -1;
}

enum class Activation : int32_t { silu, gelu, swiglu_oai };

struct ActivationOptions {
  Activation kind;
  float alpha, limit;
};

namespace TILEFUSE_ISA {

static inline float activate(float gate, float up, const ActivationOptions& o) {
  switch (o.kind) {
    case Activation::silu:
      return gate * sigmoid_f32(gate) * up;
    case Activation::gelu: {
      const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
      // 0.5 (1 + tanh(inner)) is a sigmoid of twice the argument
      return gate * sigmoid_f32(2.0f * inner) * up;
    }
    case Activation::swiglu_oai:
      break;
  }
  if (o.limit > 0.0f) {
    // written so that NaN passes every comparison
    gate = gate > o.limit ? o.limit : gate;
    up = up > o.limit ? o.limit : up;
    up = up < -o.limit ? -o.limit : up;
  }
  return gate * sigmoid_f32(o.alpha * gate) * (up + 1.0f);
}

#if defined(TILEFUSE_MOE_DOT)

constexpr int64_t DOT_ROWS = 6;  // 6 x 4 accumulators fill the register file
constexpr int64_t DOT_COLS = 4;

static inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

static inline __m512bh load_pairs(const bf16* p, __mmask32 mask) {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

// out[m][n] = a[m] . w[n] over k; meanwhile the line of `next` that belongs to each step is fetched
template <int M>
static inline void dot_block(const bf16* const* a, const bf16* const* w, int64_t k, const bf16* next, float* out) {
  __m512 acc[M][DOT_COLS];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < DOT_COLS; ++n) acc[m][n] = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T0);
    const __m512bh w0 = load_pairs(w[0] + i), w1 = load_pairs(w[1] + i);
    const __m512bh w2 = load_pairs(w[2] + i), w3 = load_pairs(w[3] + i);
    for (int m = 0; m < M; ++m) {
      const __m512bh x = load_pairs(a[m] + i);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], x, w0);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], x, w1);
      acc[m][2] = _mm512_dpbf16_ps(acc[m][2], x, w2);
      acc[m][3] = _mm512_dpbf16_ps(acc[m][3], x, w3);
    }
  }
  if (i < k) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (k - i)) - 1);
    for (int m = 0; m < M; ++m) {
      const __m512bh x = load_pairs(a[m] + i, mask);
      for (int n = 0; n < DOT_COLS; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], x, load_pairs(w[n] + i, mask));
    }
  }
  for (int m = 0; m < M; ++m) {
    // each 128-bit lane of the four accumulators becomes [sum0, sum1, sum2, sum3]
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(acc[m][0], acc[m][1]), _mm512_unpackhi_ps(acc[m][0], acc[m][1]));
    const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(acc[m][2], acc[m][3]), _mm512_unpackhi_ps(acc[m][2], acc[m][3]));
    const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
    const __m512 lanes =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(out + m * DOT_COLS, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
}

// out [rows, 4]; `next` is the weight row whose turn comes after w's four, `stride` apart from its successors
static inline void dot_panel(const bf16* const* a, int64_t rows, const bf16* const* w, int64_t k, const bf16* next,
                             int64_t stride, float* out) {
  int64_t m = 0, turn = 0;
  for (; m + DOT_ROWS <= rows; m += DOT_ROWS, ++turn) {
    dot_block<DOT_ROWS>(a + m, w, k, next + (turn & 3) * stride, out + m * DOT_COLS);
  }
  next += (turn & 3) * stride;
  switch (rows - m) {
    case 5:
      dot_block<5>(a + m, w, k, next, out + m * DOT_COLS);
      break;
    case 4:
      dot_block<4>(a + m, w, k, next, out + m * DOT_COLS);
      break;
    case 3:
      dot_block<3>(a + m, w, k, next, out + m * DOT_COLS);
      break;
    case 2:
      dot_block<2>(a + m, w, k, next, out + m * DOT_COLS);
      break;
    case 1:
      dot_block<1>(a + m, w, k, next, out + m * DOT_COLS);
      break;
    default:
      break;
  }
}

// the four weight rows from n on; past the end the last one again, whose results nobody stores
static inline void weight_rows(const bf16* w, int64_t stride, int64_t n, int64_t n_end, const bf16** rows) {
  for (int64_t i = 0; i < DOT_COLS; ++i) rows[i] = w + (n + i < n_end ? n + i : n_end - 1) * stride;
}

// pointers to the rows of a tile; `zeros` [k] stands for a row whose index points outside
static inline void tile_rows(const Rows& rows, const Tile& tile, const bf16* zeros, const bf16** pointers) {
  for (int64_t p = tile.row_begin; p < tile.row_end; ++p) {
    const int64_t at = source_row(rows, p);
    pointers[p - tile.row_begin] = at < 0 ? zeros : static_cast<const bf16*>(rows.data) + at * rows.stride;
  }
}

#endif  // TILEFUSE_MOE_DOT

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
