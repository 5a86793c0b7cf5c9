// Attention of absorbed queries over the paged latent cache, on the CPU.
// build-flags: -ffp-contract=fast
//
// One item of work is a tile of (query, head) rows of one sequence and one split of its keys. Keys are taken a block at
// a time: rows of the block are found through the page table, scored against the tile, and added to its accumulator.
// Nothing larger than a block of keys or a tile of results is ever held, whatever the length. bfloat16 on CPUs with
// AVX512-BF16 multiplies pairs directly; everything else runs in float32. Splits are combined in their order.
#include "common/cpu.h"
#include "common/cpu_math.h"
#include "common/fp8.h"

// vectors wider than the CPU's registers never cross a call: every function that takes one is inlined
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__AVX512BF16__)
#include <immintrin.h>
// gcc's own headers leave the unused pass-through of some intrinsics uninitialised on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace tilefuse {

struct DecodeCall {
  const void* q;
  int64_t q_batch, q_query, q_head;
  Dtype dtype;
  // the bytes of a row are documented in tilefuse/ops/mla/layout.py; strides in bytes
  const uint8_t* cache;
  int64_t page_stride, row_stride, page_size, pages;
  int64_t rank, rope, scale_offset, rope_offset;
  bool fp8, sparse, causal;
  // page numbers, or slots for sparse decode
  const void* table;
  bool table_wide;
  int64_t table_batch, table_query, columns;
  const void* lengths;
  bool lengths_wide;
  const float* sinks;
  int64_t batch, queries, heads, window, splits;
  float scale;
  // [b, row, split, R] and [b, row, split]; b counts (sequence, query) pairs for sparse decode
  float* partial;
  float* partial_lse;
  void* out;
  float* lse;
};

// query rows of a tile and keys of a block
constexpr int64_t kRows = 16;
constexpr int64_t kKeys = 64;
constexpr int64_t kLanes = 16;

static inline int64_t rows_of(const DecodeCall& call) { return call.sparse ? call.heads : call.queries * call.heads; }
static inline int64_t tiles_of(const DecodeCall& call) { return (rows_of(call) + kRows - 1) / kRows; }
static inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
// bytes of scratch that one item needs
static inline int64_t scratch_bytes(const DecodeCall& call) {
  const int64_t width = padded(call.rank + call.rope), rank = padded(call.rank);
  return 4 * (kRows * width + kKeys * width + kKeys * rank + kRows * rank + 2 * kRows * kKeys + 4 * kRows) + 256;
}

namespace TILEFUSE_ISA {

static inline int64_t entry(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

// Keys of one sequence that any of its rows may see.
struct Span {
  int64_t first, length, size;
};

static inline Span span_of(const DecodeCall& call, int64_t b) {
  Span span{0, call.columns, 0};
  if (!call.sparse) {
    const int64_t capacity = call.columns * call.page_size;
    const int64_t length = entry(call.lengths, call.lengths_wide, b);
    span.length = length < 0 ? 0 : length > capacity ? capacity : length;
    if (call.window >= 0) {
      const int64_t first = span.length - call.queries - call.window;
      span.first = first > 0 ? first : 0;
    }
  }
  const int64_t share = (span.length - span.first + call.splits - 1) / call.splits;
  span.size = (share + kKeys - 1) / kKeys * kKeys;
  if (span.size == 0) span.size = kKeys;
  return span;
}


template <typename T>
static inline void load_key(const DecodeCall& call, const uint8_t* row, float* to) {
  if (call.fp8) {
    for (int64_t group = 0; group < call.rank; group += 128) {
      float scale;
      std::memcpy(&scale, row + call.scale_offset + group / 32, 4);
      for (int64_t i = group; i < group + 128; ++i) to[i] = fp8::decode(row[i]) * scale;
    }
    const bf16* rotated = reinterpret_cast<const bf16*>(row + call.rope_offset);
    for (int64_t i = 0; i < call.rope; ++i) to[call.rank + i] = to_float(rotated[i]);
  } else {
    const T* values = reinterpret_cast<const T*>(row);
    for (int64_t i = 0; i < call.rank + call.rope; ++i) to[i] = to_float(values[i]);
  }
}

// The two products of a block of keys; `Element` is what queries, keys and weights are held as.

// float32, with vectors that the compiler maps to whatever the CPU has
struct Float32 {
  using Element = float;
  typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

  static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
  static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
  static inline float sum(Vector value) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += value[i];
    return total;
  }

  static inline float weight(float x) { return x; }

  template <typename T>
  static inline const float* key(const DecodeCall& call, const uint8_t* row, float* buffer) {
    load_key<T>(call, row, buffer);
    return buffer;
  }

  // scores [kRows, kKeys] of rows [0, rows) and keys [0, keys)
  static void scores(const float* q, const float* const* keys_at, int64_t rows, int64_t keys, int64_t width,
                     float* scores) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
      for (int64_t n = 0; n < keys; n += 2) {
        // an odd last key is computed twice
        const float *k0 = keys_at[n], *k1 = keys_at[n + 1 < keys ? n + 1 : n];
        Vector acc[4][2] = {};
        for (int64_t i = 0; i < width; i += kLanes) {
          const Vector a = load(k0 + i), b = load(k1 + i);
          for (int r = 0; r < 4; ++r) {
            const Vector x = load(q + (m + r) * width + i);
            acc[r][0] += x * a;
            acc[r][1] += x * b;
          }
        }
        for (int r = 0; r < 4; ++r) {
          scores[(m + r) * kKeys + n] = sum(acc[r][0]);
          if (n + 1 < keys) scores[(m + r) * kKeys + n + 1] = sum(acc[r][1]);
        }
      }
    }
    for (; m < rows; ++m) {
      for (int64_t n = 0; n < keys; ++n) {
        Vector acc = {};
        for (int64_t i = 0; i < width; i += kLanes) acc += load(q + m * width + i) * load(keys_at[n] + i);
        scores[m * kKeys + n] = sum(acc);
      }
    }
  }

  static void prepare(const float* const*, int64_t, int64_t, float*) {}

  // acc [kRows, rank] += weights [kRows, kKeys] @ values
  static void accumulate(const float* weights, const float* const* keys_at, const float*, int64_t rows, int64_t keys,
                         int64_t rank, float* acc) {
    for (int64_t d = 0; d < rank; d += 2 * kLanes) {
      for (int64_t m = 0; m < rows; m += 4) {
        const int64_t count = rows - m < 4 ? rows - m : 4;
        Vector sums[4][2];
        for (int64_t r = 0; r < 4; ++r) {
          // rows past the tile's last are computed and dropped: their weights are zero
          sums[r][0] = load(acc + (m + r) * rank + d);
          sums[r][1] = load(acc + (m + r) * rank + d + kLanes);
        }
        for (int64_t n = 0; n < keys; ++n) {
          const Vector a = load(keys_at[n] + d), b = load(keys_at[n] + d + kLanes);
          for (int64_t r = 0; r < 4; ++r) {
            const float w = weights[(m + r) * kKeys + n];
            sums[r][0] += a * w;
            sums[r][1] += b * w;
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          store(acc + (m + r) * rank + d, sums[r][0]);
          store(acc + (m + r) * rank + d + kLanes, sums[r][1]);
        }
      }
    }
  }

  static inline int64_t place(int64_t i) { return i; }
};

#if defined(__AVX512BF16__)
// bfloat16 pairs into float32
struct Bfloat16 {
  using Element = bf16;

  static inline bf16 weight(float x) { return from_float<bf16>(x); }
  static inline __m512bh pairs(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

  template <typename T>
  static inline const bf16* key(const DecodeCall& call, const uint8_t* row, bf16* buffer) {
    const int64_t width = call.rank + call.rope;
    // rows of whole vectors are read where they lie
    if (!call.fp8 && width % 32 == 0) return reinterpret_cast<const bf16*>(row);
    if (call.fp8) {
      for (int64_t group = 0; group < call.rank; group += 128) {
        float scale;
        std::memcpy(&scale, row + call.scale_offset + group / 32, 4);
        for (int64_t i = group; i < group + 128; ++i) buffer[i] = from_float<bf16>(fp8::decode(row[i]) * scale);
      }
      std::memcpy(buffer + call.rank, row + call.rope_offset, 2 * call.rope);
    } else {
      std::memcpy(buffer, row, 2 * width);
    }
    return buffer;
  }

  // sums of four vectors each, in one register of four
  static inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }

  static void scores(const bf16* q, const bf16* const* keys_at, int64_t rows, int64_t keys, int64_t width,
                     float* scores) {
    for (int64_t n = 0; n < keys; n += 4) {
      const bf16* k[4];
      // past the last key the last one is computed again; its scores are overwritten or unused
      for (int64_t j = 0; j < 4; ++j) k[j] = keys_at[n + j < keys ? n + j : keys - 1];
      for (int64_t m = 0; m < rows; m += 4) {
        __m512 acc[4][4];
        for (int r = 0; r < 4; ++r) {
          for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < width; i += 32) {
          const __m512bh b0 = pairs(k[0] + i), b1 = pairs(k[1] + i), b2 = pairs(k[2] + i), b3 = pairs(k[3] + i);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const __m512bh a = pairs(q + (m + r) * width + i);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], a, b0);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], a, b1);
            acc[r][2] = _mm512_dpbf16_ps(acc[r][2], a, b2);
            acc[r][3] = _mm512_dpbf16_ps(acc[r][3], a, b3);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          _mm_storeu_ps(scores + (m + r) * kKeys + n, sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
        }
      }
    }
  }

  // values of two keys side by side, [keys / 2, rank] pairs; columns in the order that unpacking leaves (see `place`)
  static void prepare(const bf16* const* keys_at, int64_t keys, int64_t rank, float* to) {
    for (int64_t n = 0; n < keys; n += 2) {
      const bf16* a = keys_at[n];
      const bf16* b = keys_at[n + 1 < keys ? n + 1 : n];
      float* row = to + n / 2 * rank;
      for (int64_t d = 0; d < rank; d += 32) {
        const __m512i x = _mm512_loadu_si512(a + d), y = _mm512_loadu_si512(b + d);
        _mm512_storeu_si512(row + d, _mm512_unpacklo_epi16(x, y));
        _mm512_storeu_si512(row + d + 16, _mm512_unpackhi_epi16(x, y));
      }
    }
  }

  static void accumulate(const bf16* weights, const bf16* const*, const float* values, int64_t rows, int64_t keys,
                         int64_t rank, float* acc) {
    for (int64_t d = 0; d < rank; d += 32) {
      for (int64_t m = 0; m < rows; m += 8) {
        __m512 sums[8][2];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          sums[r][0] = _mm512_loadu_ps(acc + (m + r) * rank + d);
          sums[r][1] = _mm512_loadu_ps(acc + (m + r) * rank + d + 16);
        }
        for (int64_t n = 0; n < keys; n += 2) {
          const __m512bh lo = (__m512bh)_mm512_loadu_si512(values + n / 2 * rank + d);
          const __m512bh hi = (__m512bh)_mm512_loadu_si512(values + n / 2 * rank + d + 16);
#pragma GCC unroll 8
          for (int r = 0; r < 8; ++r) {
            int32_t both;
            std::memcpy(&both, weights + (m + r) * kKeys + n, 4);
            const __m512bh w = (__m512bh)_mm512_set1_epi32(both);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], w, lo);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], w, hi);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          _mm512_storeu_ps(acc + (m + r) * rank + d, sums[r][0]);
          _mm512_storeu_ps(acc + (m + r) * rank + d + 16, sums[r][1]);
        }
      }
    }
  }

  // where column i of the values lies in the accumulator
  static inline int64_t place(int64_t i) {
    const int64_t in_block = i % 32, lane = in_block / 8, column = in_block % 8;
    return i - in_block + (column < 4 ? 4 * lane + column : 16 + 4 * lane + column - 4);
  }
};
#endif

template <typename T>
static inline void store_out(const DecodeCall& call, int64_t row, int64_t i, float value) {
  static_cast<T*>(call.out)[row * call.rank + i] = from_float<T>(value);
}

static inline float natural_lse(float top, float total) {
  return total > 0.0f || total != total ? top + std::log(total) : -INFINITY;
}

// what a row's sum of weights, relative to exp(top), becomes with its sink
static inline float with_sink(const DecodeCall& call, int64_t head, float top, float total) {
  if (call.sinks == nullptr) return total;
  return total + std::exp(call.sinks[head] - top);
}

template <typename Path, typename T>
static void decode_item(const DecodeCall& call, int64_t item, char* scratch) {
  using Element = typename Path::Element;
  const int64_t rows = rows_of(call), tiles = tiles_of(call);
  const int64_t tile = item % tiles, split = item / tiles % call.splits, b = item / tiles / call.splits;
  const Span span = span_of(call, b);
  const int64_t start = span.first + split * span.size;
  const int64_t stop = start + span.size < span.length ? start + span.size : span.length;
  const int64_t first_row = tile * kRows, count = rows - first_row < kRows ? rows - first_row : kRows;
  const int64_t sequence = call.sparse ? b / call.queries : b;
  const int64_t raw_width = call.rank + call.rope, width = padded(raw_width), rank = padded(call.rank);

  float* acc = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  float* values = acc + kRows * rank;
  float* scores = values + kKeys * rank;
  float* top = scores + kRows * kKeys;
  float* total = top + kRows;
  Element* q = reinterpret_cast<Element*>(total + kRows);
  Element* weights = q + kRows * width;
  Element* key_buffer = weights + kRows * kKeys;
  std::memset(static_cast<void*>(acc), 0, kRows * rank * sizeof(float));
  std::memset(static_cast<void*>(q), 0, kRows * width * sizeof(Element));
  std::memset(static_cast<void*>(weights), 0, kRows * kKeys * sizeof(Element));
  for (int64_t r = 0; r < kRows; ++r) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
  }
  int64_t last[kRows] = {}, lowest[kRows] = {};
  for (int64_t r = 0; r < count; ++r) {
    const int64_t m = first_row + r, head = m % call.heads;
    const int64_t query = call.sparse ? b % call.queries : m / call.heads;
    const T* from = static_cast<const T*>(call.q) + sequence * call.q_batch + query * call.q_query + head * call.q_head;
    for (int64_t i = 0; i < raw_width; ++i) {
      q[r * width + i] = from_float<Element>(to_float(from[i]));
    }
    // the newest key is the last query row's own
    const int64_t own = span.length - call.queries + query;
    last[r] = call.sparse || !call.causal ? span.length : own + 1;
    lowest[r] = !call.sparse && call.window >= 0 ? own - call.window : 0;
  }
  const int64_t table = call.sparse ? sequence * call.table_batch + b % call.queries * call.table_query
                                    : sequence * call.table_batch;

  const Element* keys_at[kKeys];
  int64_t numbers[kKeys];
  for (int64_t block = start; block < stop; block += kKeys) {
    const int64_t end = block + kKeys < stop ? block + kKeys : stop;
    int64_t keys = 0;
    for (int64_t key = block; key < end; ++key) {
      const int64_t found = entry(call.table, call.table_wide, table + (call.sparse ? key : key / call.page_size));
      const int64_t page = call.sparse ? found / call.page_size : found;
      const int64_t row = call.sparse ? found % call.page_size : key % call.page_size;
      // an entry outside of the pool is a key that does not exist
      if (found < 0 || page >= call.pages) continue;
      const uint8_t* at = call.cache + page * call.page_stride + row * call.row_stride;
      Element* buffer = key_buffer + keys * width;
      for (int64_t i = raw_width; i < width; ++i) buffer[i] = from_float<Element>(0.0f);
      keys_at[keys] = Path::template key<T>(call, at, buffer);
      numbers[keys++] = key;
    }
    if (keys == 0) continue;
    Path::scores(q, keys_at, count, keys, width, scores);
    bool any = false;
    for (int64_t r = 0; r < count; ++r) {
      float* row = scores + r * kKeys;
      float largest = -INFINITY;
      bool nan = false;
      for (int64_t n = 0; n < keys; ++n) {
        const bool visible = numbers[n] < last[r] && numbers[n] >= lowest[r];
        row[n] = visible ? row[n] * call.scale : -INFINITY;
        largest = row[n] > largest ? row[n] : largest;
        nan |= row[n] != row[n];
      }
      const float new_top = nan ? NAN : largest > top[r] ? largest : top[r];
      Element* to = weights + r * kKeys;
      if (new_top == -INFINITY) {
        for (int64_t n = 0; n < kKeys; ++n) to[n] = from_float<Element>(0.0f);
        continue;
      }
      any = true;
      float sum = 0.0f;
      for (int64_t n = 0; n < keys; ++n) row[n] = exp_f32(row[n] - new_top);
      for (int64_t n = 0; n < keys; ++n) sum += row[n];
      for (int64_t n = 0; n < keys; ++n) to[n] = Path::weight(row[n]);
      for (int64_t n = keys; n < kKeys; ++n) to[n] = from_float<Element>(0.0f);
      const float shrink = exp_f32(top[r] - new_top);
      total[r] = total[r] * shrink + sum;
      top[r] = new_top;
      if (shrink != 1.0f) {
        for (int64_t i = 0; i < rank; ++i) acc[r * rank + i] *= shrink;
      }
    }
    if (!any) continue;
    Path::prepare(keys_at, keys, rank, values);
    Path::accumulate(weights, keys_at, values, count, keys, rank, acc);
  }

  for (int64_t r = 0; r < count; ++r) {
    const int64_t m = first_row + r, row = b * rows + m;
    if (call.splits > 1) {
      float* to = call.partial + (row * call.splits + split) * call.rank;
      const float divisor = total[r] > 0.0f ? total[r] : 1.0f;
      for (int64_t i = 0; i < call.rank; ++i) to[i] = acc[r * rank + Path::place(i)] / divisor;
      call.partial_lse[row * call.splits + split] = natural_lse(top[r], total[r]);
      continue;
    }
    const int64_t head = m % call.heads, query = call.sparse ? b % call.queries : m / call.heads;
    const float divisor = total[r] == 0.0f ? 1.0f : with_sink(call, head, top[r], total[r]);
    for (int64_t i = 0; i < call.rank; ++i) {
      store_out<T>(call, row, i, acc[r * rank + Path::place(i)] / divisor);
    }
    call.lse[(sequence * call.heads + head) * call.queries + query] = natural_lse(top[r], total[r]);
  }
}

void mla_decode_items(const DecodeCall& call, char* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    for (int64_t item = begin; item < end; ++item) {
#if defined(__AVX512BF16__)
      if (call.dtype == Dtype::bf16) {
        decode_item<Bfloat16, T>(call, item, scratch);
        continue;
      }
#endif
      decode_item<Float32, T>(call, item, scratch);
    }
  })
}

// rows of the output from their splits, in the order of the splits; scratch: R floats
void mla_combine_rows(const DecodeCall& call, float* acc, int64_t begin, int64_t end) {
  const int64_t rows = rows_of(call);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / rows, m = row % rows, head = m % call.heads;
    const int64_t sequence = call.sparse ? b / call.queries : b;
    const int64_t query = call.sparse ? b % call.queries : m / call.heads;
    const float* lses = call.partial_lse + row * call.splits;
    float top = -INFINITY, total = 0.0f;
    for (int64_t split = 0; split < call.splits; ++split) {
      top = lses[split] > top || lses[split] != lses[split] ? lses[split] : top;
    }
    for (int64_t i = 0; i < call.rank; ++i) acc[i] = 0.0f;
    for (int64_t split = 0; split < call.splits; ++split) {
      if (lses[split] == -INFINITY) continue;
      const float weight = std::exp(lses[split] - top);
      const float* from = call.partial + (row * call.splits + split) * call.rank;
      total += weight;
      for (int64_t i = 0; i < call.rank; ++i) acc[i] += weight * from[i];
    }
    const float divisor = total == 0.0f ? 1.0f : with_sink(call, head, top, total);
    TILEFUSE_BY_DTYPE(call.dtype, T, {
      for (int64_t i = 0; i < call.rank; ++i) store_out<T>(call, row, i, acc[i] / divisor);
    })
    call.lse[(sequence * call.heads + head) * call.queries + query] = natural_lse(top, total);
  }
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_decode_items, (const DecodeCall&, char*, int64_t, int64_t))
TILEFUSE_DISPATCH(mla_combine_rows, (const DecodeCall&, float*, int64_t, int64_t))

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// keys that are worth a split of their own, and how many there are at most when the caller leaves the choice
constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kMaxSplits = 16;

static bool is_wide(const Tensor& t) { return t.scalar_type() == ScalarType::Long; }

// number of splits from the length that is possible: a row's result does not depend on its batch
static int64_t splits_for(int64_t capacity, int64_t asked) {
  const int64_t possible = capacity > kKeys ? (capacity + kKeys - 1) / kKeys : 1;
  if (asked > 0) return asked < possible ? asked : possible;
  const int64_t wanted = (capacity + kSplitKeys - 1) / kSplitKeys;
  return wanted < 1 ? 1 : wanted > kMaxSplits ? kMaxSplits : wanted;
}

static std::tuple<Tensor, Tensor> run(DecodeCall& call, const Tensor& q, const Tensor& cache, const Tensor& table,
                                      const std::optional<Tensor>& sinks, double softmax_scale, int64_t kv_lora_rank,
                                      const std::string& layout, int64_t num_splits) {
  call.q = q.const_data_ptr();
  call.dtype = dtype_of(q);
  call.batch = q.size(0);
  call.queries = q.size(1);
  call.heads = q.size(2);
  call.q_batch = stride_or_zero(q, 0);
  call.q_query = stride_or_zero(q, 1);
  call.q_head = stride_or_zero(q, 2);
  call.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
  call.fp8 = layout == "fp8";
  const int64_t itemsize = call.fp8 ? 1 : call.dtype == Dtype::f32 ? 4 : 2;
  call.page_stride = cache.stride(0) * itemsize;
  call.row_stride = cache.stride(1) * itemsize;
  call.pages = cache.numel() == 0 ? 0 : cache.size(0);
  call.page_size = cache.size(1) > 0 ? cache.size(1) : 1;
  call.rank = kv_lora_rank;
  call.rope = q.size(3) - kv_lora_rank;
  call.scale_offset = kv_lora_rank;
  call.rope_offset = kv_lora_rank + kv_lora_rank / 32;
  call.table = table.const_data_ptr();
  call.table_wide = is_wide(table);
  call.table_batch = stride_or_zero(table, 0);
  call.table_query = call.sparse ? stride_or_zero(table, 1) : 0;
  call.columns = table.size(table.dim() - 1);
  call.sinks = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr;
  call.scale = static_cast<float>(softmax_scale);
  Tensor out = torch::stable::new_empty(q, {call.batch, call.queries, call.heads, call.rank});
  Tensor lse = torch::stable::new_empty(q, {call.batch, call.heads, call.queries}, ScalarType::Float);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t sequences = call.sparse ? call.batch * call.queries : call.batch;
  const int64_t rows = rows_of(call), total_rows = sequences * rows;
  if (total_rows == 0) return {out, lse};
  call.splits = splits_for(call.sparse ? call.columns : call.columns * call.page_size, num_splits);
  std::optional<Tensor> partial, partial_lse;
  if (call.splits > 1) {
    partial = torch::stable::new_empty(q, {total_rows, call.splits, call.rank}, ScalarType::Float);
    partial_lse = torch::stable::new_empty(q, {total_rows, call.splits}, ScalarType::Float);
    call.partial = static_cast<float*>(partial->mutable_data_ptr());
    call.partial_lse = static_cast<float*>(partial_lse->mutable_data_ptr());
  }
  const auto items = mla_decode_items_dispatch();
  parallel_for(0, sequences * call.splits * tiles_of(call), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(scratch_bytes(call));
    items(call, scratch.data(), begin, end);
  });
  if (call.splits > 1) {
    const auto combine = mla_combine_rows_dispatch();
    parallel_for(0, total_rows, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> acc(call.rank);
      combine(call, acc.data(), begin, end);
    });
  }
  return {out, lse};
}

static std::tuple<Tensor, Tensor> mla_decode_fwd(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens,
                                                 std::optional<Tensor> sinks, double softmax_scale,
                                                 int64_t kv_lora_rank, bool causal, int64_t window, std::string layout,
                                                 int64_t num_splits) {
  DecodeCall call{};
  call.causal = causal;
  call.window = window;
  call.lengths = seq_lens.const_data_ptr();
  call.lengths_wide = is_wide(seq_lens);
  return run(call, q, cache, block_table, sinks, softmax_scale, kv_lora_rank, layout, num_splits);
}

static std::tuple<Tensor, Tensor> mla_sparse_decode_fwd(Tensor q, Tensor cache, Tensor indices,
                                                        std::optional<Tensor> sinks, double softmax_scale,
                                                        int64_t kv_lora_rank, std::string layout) {
  DecodeCall call{};
  call.sparse = true;
  call.window = -1;
  return run(call, q, cache, indices, sinks, softmax_scale, kv_lora_rank, layout, 0);
}

STABLE_TORCH_LIBRARY_FRAGMENT(tilefuse_cpu, m) {
  m.def(
      "mla_decode_fwd(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, Tensor? sinks, float softmax_scale, "
      "int kv_lora_rank, bool causal, int window, str layout, int num_splits) -> (Tensor, Tensor)");
  m.def(
      "mla_sparse_decode_fwd(Tensor q, Tensor cache, Tensor indices, Tensor? sinks, float softmax_scale, "
      "int kv_lora_rank, str layout) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_decode_fwd", TORCH_BOX(&mla_decode_fwd));
  m.impl("mla_sparse_decode_fwd", TORCH_BOX(&mla_sparse_decode_fwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
