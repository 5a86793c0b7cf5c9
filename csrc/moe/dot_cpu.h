// Grouped matmul of bfloat16 rows that are contiguous along K, on AVX512-BF16: every output element is a dot product of
// two rows, so weights are read in place (PyTorch's matmul repacks them, which costs as much as a few tens of rows of
// work), rows are gathered by pointer, and an element does not depend on the tile that it was computed in.
#pragma once

#include "common/cpu.h"
#include "common/cpu_math.h"
#include "common/immintrin.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define TILEFUSE_MOE_DOT 1
#endif

namespace tilefuse {

// rows [row_begin, row_end) of one expert against its weight rows [n_begin, n_end)
struct GroupTile {
  int64_t expert, row_begin, row_end, n_begin, n_end;
};

constexpr int64_t kTileRows = 48;  // rows of a tile; they stay in L2
constexpr int64_t kTileCols = 64;
constexpr int64_t kPanelCols = 32;  // results of so many columns go through an epilogue together: whole cache lines

// rows that a kernel reads, gathered where there is an index
struct SourceRows {
  const void* data;
  int64_t count, stride;
  Index index;  // without data: row p itself
  int64_t div;
};

// row of a that output row p reads, -1 where its index points outside
static inline int64_t source_row(const SourceRows& rows, int64_t p) {
  int64_t at = p;
  if (rows.index.data != nullptr) {
    at = rows.index[p];
    if (at < 0) return -1;
    if (rows.div != 1) at /= rows.div;
  }
  return at < rows.count ? at : -1;
}

// silu with a limit is a kind of its own, so that silu without one stays free of it
enum class Activation : int32_t { silu, silu_clamped, gelu, gelu_erf, swiglu_oai };

struct ActivationOptions {
  Activation kind;
  float alpha, limit;
};

namespace TILEFUSE_ISA {

// written so that NaN passes every comparison
static inline void clamp_to_limit(float limit, float& gate, float& up) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
}

// the kind is an argument of its own, so that a loop over values can have it fixed and become vectors
static inline float activate(Activation kind, float gate, float up, const ActivationOptions& o) {
  switch (kind) {
    case Activation::silu:
      return gate * sigmoid_f32(gate) * up;
    case Activation::silu_clamped:
      clamp_to_limit(o.limit, gate, up);
      return gate * sigmoid_f32(gate) * up;
    case Activation::gelu: {
      const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
      // 0.5 (1 + tanh(inner)) is a sigmoid of twice the argument
      return gate * sigmoid_f32(2.0f * inner) * up;
    }
    case Activation::gelu_erf:
      return gate * 0.5f * (1.0f + std::erf(gate * 0.7071067811865476f)) * up;
    case Activation::swiglu_oai:
      break;
  }
  if (o.limit > 0.0f) clamp_to_limit(o.limit, gate, up);
  return gate * sigmoid_f32(o.alpha * gate) * (up + 1.0f);
}

// out[i] = activate(gate[i], up[i])
template <typename T, typename Out>
static inline void activate_row(const T* gate, const T* up, int64_t count, const ActivationOptions& o, Out* out) {
  switch (o.kind) {
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::silu, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::silu_clamped:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::silu_clamped, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::gelu_erf:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::gelu_erf, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::gelu:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::gelu, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::swiglu_oai:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::swiglu_oai, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
  }
}

#if defined(TILEFUSE_MOE_DOT)

constexpr int64_t kDotRows = 6;  // 6 x 4 accumulators fill the register file
constexpr int64_t kDotCols = 4;

static inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

static inline __m512bh load_pairs(const bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

constexpr int64_t kDotChunk =
    2048;  // of k, so that the pieces of four weight rows stay in L1 over all rows of the tile

static inline int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }

// Accumulators of one block between chunks of k: rows x columns x lanes.
struct DotState {
  alignas(64) float lanes[kDotRows * kDotCols * 16];
};

// acc[m][n] += a[m] . w[n] over [begin, end) of k; meanwhile the line of `next` that belongs to each step is fetched.
// The first chunk starts from zero, the last one writes the sums: out[m][n], rows kPanelCols apart.
template <int M>
static inline void dot_block(const bf16* a, const bf16* const* w, int64_t begin, int64_t end, bool first, bool last,
                             const bf16* next, DotState& state, float* out) {
  __m512 acc[M][kDotCols];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kDotCols; ++n) {
      acc[m][n] = first ? _mm512_setzero_ps() : _mm512_load_ps(state.lanes + (m * kDotCols + n) * 16);
    }
  }
  a += begin * M;
  int64_t i = begin;
  for (; i + 32 <= end; i += 32, a += 32 * M) {
    _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
    const __m512bh w0 = load_pairs(w[0] + i), w1 = load_pairs(w[1] + i);
    const __m512bh w2 = load_pairs(w[2] + i), w3 = load_pairs(w[3] + i);
    for (int m = 0; m < M; ++m) {
      const __m512bh x = load_pairs(a + m * 32);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], x, w0);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], x, w1);
      acc[m][2] = _mm512_dpbf16_ps(acc[m][2], x, w2);
      acc[m][3] = _mm512_dpbf16_ps(acc[m][3], x, w3);
    }
  }
  if (i < end) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (end - i)) - 1);
    for (int m = 0; m < M; ++m) {
      const __m512bh x = load_pairs(a + m * 32);
      for (int n = 0; n < kDotCols; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], x, load_pairs(w[n] + i, mask));
    }
  }
  for (int m = 0; m < M; ++m) {
    if (!last) {
      for (int n = 0; n < kDotCols; ++n) _mm512_store_ps(state.lanes + (m * kDotCols + n) * 16, acc[m][n]);
      continue;
    }
    // each 128-bit lane of the four accumulators becomes [sum0, sum1, sum2, sum3]
    const __m512 low =
        _mm512_add_ps(_mm512_unpacklo_ps(acc[m][0], acc[m][1]), _mm512_unpackhi_ps(acc[m][0], acc[m][1]));
    const __m512 high =
        _mm512_add_ps(_mm512_unpacklo_ps(acc[m][2], acc[m][3]), _mm512_unpackhi_ps(acc[m][2], acc[m][3]));
    const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
    const __m512 lanes =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(out + m * kPanelCols, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
}

static inline void dot_block(int64_t m, const bf16* a, const bf16* const* w, int64_t begin, int64_t end, bool first,
                             bool last, const bf16* next, DotState& state, float* out) {
  switch (m) {
    case 1:
      return dot_block<1>(a, w, begin, end, first, last, next, state, out);
    case 2:
      return dot_block<2>(a, w, begin, end, first, last, next, state, out);
    case 3:
      return dot_block<3>(a, w, begin, end, first, last, next, state, out);
    case 4:
      return dot_block<4>(a, w, begin, end, first, last, next, state, out);
    case 5:
      return dot_block<5>(a, w, begin, end, first, last, next, state, out);
    default:
      return dot_block<6>(a, w, begin, end, first, last, next, state, out);
  }
}

// out [rows, 4] in rows of kPanelCols, of packed rows and four weight rows; `next` are those that come after them
static inline void dot_panel(const bf16* packed, int64_t rows, const bf16* const* w, const bf16* const* next, int64_t k,
                             DotState* states, float* out) {
  const int64_t chunks = rows <= kDotRows ? 1 : (k + kDotChunk - 1) / kDotChunk, width = padded(k);
  const int64_t chunk = chunks == 0 ? 32 : padded((k + chunks - 1) / chunks);
  int64_t begin = 0;
  do {
    const int64_t end = begin + chunk < k ? begin + chunk : k;
    // few rows: the weight rows whose turn will not come
    for (int64_t n = (rows + kDotRows - 1) / kDotRows; n < kDotCols; ++n) {
      for (int64_t i = begin; i < end; i += 32) _mm_prefetch(reinterpret_cast<const char*>(next[n] + i), _MM_HINT_T1);
    }
    int64_t turn = 0;
    for (int64_t m = 0; m < rows; m += kDotRows, ++turn) {
      const int64_t count = rows - m < kDotRows ? rows - m : kDotRows;
      dot_block(count, packed + m * width, w, begin, end, begin == 0, end == k, next[turn & 3], states[turn],
                out + m * kPanelCols);
    }
    begin = end;
  } while (begin < k);
}

constexpr int64_t kDotStates = (kTileRows + kDotRows - 1) / kDotRows;

// the four weight rows from n on; past the end the last one again, whose results nobody stores
static inline void weight_rows(const bf16* w, int64_t stride, int64_t n, int64_t n_end, const bf16** rows) {
  for (int64_t i = 0; i < kDotCols; ++i) rows[i] = w + (n + i < n_end ? n + i : n_end - 1) * stride;
}

// The rows of a tile as the blocks read them: kDotRows of them (fewer in the last block) take turns every 32 elements.
// SourceRows as they lie would share cache sets whenever their length is a multiple of 4 KiB. Made again only where the
// rows are not those of the tile before; zeros where an index points outside.
struct PackedRows {
  bf16* data;
  int64_t begin = -1, end = -1;
};

static inline PackedRows packed_rows(int64_t k) {
  return {static_cast<bf16*>(std::aligned_alloc(64, static_cast<size_t>(kTileRows * (padded(k) + 32)) * sizeof(bf16)))};
}

static inline void pack(PackedRows& packed, const SourceRows& rows, const GroupTile& tile, int64_t k) {
  if (packed.begin == tile.row_begin && packed.end == tile.row_end) return;
  packed.begin = tile.row_begin;
  packed.end = tile.row_end;
  const int64_t width = padded(k);
  for (int64_t first = tile.row_begin; first < tile.row_end; first += kDotRows) {
    const int64_t count = tile.row_end - first < kDotRows ? tile.row_end - first : kDotRows;
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = source_row(rows, first + m);
      const bf16* from = static_cast<const bf16*>(rows.data) + (at < 0 ? 0 : at * rows.stride);
      bf16* to = packed.data + (first - tile.row_begin) * width + m * 32;
      for (int64_t i = 0; i < width; i += 32, to += count * 32) {
        const __mmask32 mask = at < 0        ? 0
                               : k - i >= 32 ? ~__mmask32{0}
                                             : static_cast<__mmask32>((uint64_t{1} << (k - i)) - 1);
        _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, from + i));
      }
    }
  }
}

// asks for the cache lines that the first row of a panel and those after it will be stored to
static inline void fetch_rows(const bf16* out, int64_t stride, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) _mm_prefetch(reinterpret_cast<const char*>(out + r * stride), _MM_HINT_T1);
}

static inline void add_bias(float* panel, int64_t rows, int64_t width, const bf16* bias) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; ++c) panel[r * kPanelCols + c] += to_float(bias[c]);
  }
}

// `width` values of a panel's row, rounded
static inline void store_panel_row(const float* row, int64_t width, bf16* out) {
  bf16 rounded[kPanelCols];
  for (int64_t c = 0; c < kPanelCols; ++c) rounded[c] = from_float<bf16>(row[c]);
  if (width == kPanelCols) {
    std::memcpy(out, rounded, sizeof(rounded));
  } else {
    std::memcpy(out, rounded, static_cast<size_t>(width) * sizeof(bf16));
  }
}

#endif  // TILEFUSE_MOE_DOT

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
