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
  return 4 * (kRows * width + kKeys * width + kRows * rank + 2 * kRows * kKeys) + 64;
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

// The two products of a block of keys, for L query rows at a time: rows lie in the lanes of a vector, and a key's
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
  static inline const float* key(const DecodeCall& call, const uint8_t* row, float* buffer) {
    load_key<T>(call, row, buffer);
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

// The cache rows of a block of keys, and their numbers counted from its first.
struct Block {
  const uint8_t* rows[kKeys];
  int32_t numbers[kKeys];
  int64_t keys;
};

// table: where the sequence's entries begin
static inline void find_keys(const DecodeCall& call, int64_t table, int64_t begin, int64_t end, Block& block) {
  block.keys = 0;
  for (int64_t key = begin; key < end; ++key) {
    const int64_t found = entry(call.table, call.table_wide, table + (call.sparse ? key : key / call.page_size));
    const int64_t page = call.sparse ? found / call.page_size : found;
    const int64_t row = call.sparse ? found % call.page_size : key % call.page_size;
    // an entry outside of the pool is a key that does not exist
    if (found < 0 || page >= call.pages) continue;
    block.rows[block.keys] = call.cache + page * call.page_stride + row * call.row_stride;
    block.numbers[block.keys++] = static_cast<int32_t>(key - begin);
  }
}

// where element i of row r lies among L rows that are multiplied `step` elements at a time
template <int64_t L, int64_t step>
static inline int64_t packed(int64_t i, int64_t r) {
  return i / step * step * L + r * step + i % step;
}

// L: rows of the tile that are computed, the last of them for nothing where there are fewer
template <typename Path, typename T, int64_t L>
static void decode_item(const DecodeCall& call, int64_t item, char* scratch) {
  using Element = typename Path::Element;
  constexpr int64_t step = Path::kStep;
  const int64_t rows = rows_of(call), tiles = tiles_of(call);
  const int64_t tile = item % tiles, split = item / tiles % call.splits, b = item / tiles / call.splits;
  const Span span = span_of(call, b);
  const int64_t start = span.first + split * span.size;
  const int64_t stop = start + span.size < span.length ? start + span.size : span.length;
  const int64_t first_row = tile * kRows, count = rows - first_row < L ? rows - first_row : L;
  const int64_t sequence = call.sparse ? b / call.queries : b;
  const int64_t raw_width = call.rank + call.rope, width = padded(raw_width), rank = padded(call.rank);

  float* acc = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  float* scores = acc + L * rank;
  Element* q = reinterpret_cast<Element*>(scores + L * kKeys);
  Element* weights = q + L * width;
  Element* key_buffer = weights + L * kKeys;
  std::memset(static_cast<void*>(acc), 0, L * rank * sizeof(float));
  std::memset(static_cast<void*>(q), 0, L * width * sizeof(Element));
  float top[L], total[L];
  int64_t last[L] = {}, lowest[L] = {};
  for (int64_t r = 0; r < L; ++r) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t m = first_row + r, head = m % call.heads;
    const int64_t query = call.sparse ? b % call.queries : m / call.heads;
    const T* from = static_cast<const T*>(call.q) + sequence * call.q_batch + query * call.q_query + head * call.q_head;
    for (int64_t i = 0; i < raw_width; ++i) q[packed<L, step>(i, r)] = from_float<Element>(to_float(from[i]));
    // the newest key is the last query row's own
    const int64_t own = span.length - call.queries + query;
    last[r] = call.sparse || !call.causal ? span.length : own + 1;
    lowest[r] = !call.sparse && call.window >= 0 ? own - call.window : 0;
  }
  const int64_t table = call.sparse ? sequence * call.table_batch + b % call.queries * call.table_query
                                    : sequence * call.table_batch;

  Block blocks[2];
  find_keys(call, table, start, start + kKeys < stop ? start + kKeys : stop, blocks[0]);
  int64_t turn = 0;
  for (int64_t block = start; block < stop; block += kKeys, ++turn) {
    const Block& here = blocks[turn % 2];
    Block& next = blocks[(turn + 1) % 2];
    const int64_t end = block + kKeys < stop ? block + kKeys : stop;
    find_keys(call, table, end, end + kKeys < stop ? end + kKeys : stop, next);
    const int64_t keys = here.keys;
    if (keys == 0) continue;
    const Element* keys_at[kKeys + Path::kKeysAtOnce];
    for (int64_t n = 0; n < keys; ++n) {
      Element* buffer = key_buffer + n * width;
      for (int64_t i = raw_width; i < width; ++i) buffer[i] = from_float<Element>(0.0f);
      keys_at[n] = Path::template key<T>(call, here.rows[n], buffer);
    }
    // past the last key the last one is computed again, with no weight
    const int64_t whole = (keys + Path::kKeysAtOnce - 1) / Path::kKeysAtOnce * Path::kKeysAtOnce;
    for (int64_t n = keys; n < whole; ++n) keys_at[n] = keys_at[keys - 1];
    // while the last keys are scored the next block's first ones are fetched
    for (int64_t n = 0; n < Path::kKeysAtOnce; ++n) {
      keys_at[whole + n] = n < next.keys ? reinterpret_cast<const Element*>(next.rows[n]) : keys_at[0];
    }
    for (int64_t n = 0; n < whole; n += Path::kKeysAtOnce) {
      Path::template scores<L>(q, keys_at + n, keys_at + n + Path::kKeysAtOnce, width, scores + n * L);
    }

    // rows' first and last visible key, counted from the block's first
    int32_t from[L], to[L];
    for (int64_t r = 0; r < L; ++r) {
      const int64_t low = lowest[r] - block, high = last[r] - block;
      from[r] = static_cast<int32_t>(low < 0 ? 0 : low > kKeys ? kKeys : low);
      to[r] = static_cast<int32_t>(high < 0 ? 0 : high > kKeys ? kKeys : high);
    }
    float largest[L], base[L], shrink[L], sum[L];
    for (int64_t r = 0; r < L; ++r) largest[r] = top[r];
    for (int64_t n = 0; n < keys; ++n) {
      for (int64_t r = 0; r < L; ++r) {
        const float score = scores[n * L + r] * call.scale;
        const float x = (here.numbers[n] >= from[r]) & (here.numbers[n] < to[r]) ? score : -INFINITY;
        scores[n * L + r] = x;
        // a NaN stays the largest
        largest[r] = (x > largest[r]) | (x != x) ? x : largest[r];
      }
    }
    bool any = false, rescale = false;
    for (int64_t r = 0; r < L; ++r) {
      // of a row that has seen no key yet all weights are zero
      base[r] = largest[r] == -INFINITY ? 0.0f : largest[r];
      shrink[r] = exp_f32(top[r] - base[r]);
      top[r] = largest[r];
      sum[r] = 0.0f;
      any |= largest[r] != -INFINITY;
      rescale |= shrink[r] != 1.0f;
    }
    if (!any) continue;
    for (int64_t n = 0; n < keys; ++n) {
      for (int64_t r = 0; r < L; ++r) {
        const float weight = exp_f32(scores[n * L + r] - base[r]);
        sum[r] += weight;
        scores[n * L + r] = weight;
      }
    }
    for (int64_t i = keys * L; i < whole * L; ++i) scores[i] = 0.0f;
    for (int64_t n = 0; n < whole; n += step) {
      for (int64_t r = 0; r < L; ++r) {
        for (int64_t j = 0; j < step; ++j) {
          weights[(n * L + r * step) + j] = from_float<Element>(scores[(n + j) * L + r]);
        }
      }
    }
    for (int64_t r = 0; r < L; ++r) total[r] = total[r] * shrink[r] + sum[r];
    if (rescale) {
      for (int64_t r = 0; r < count; ++r) {
        if (shrink[r] == 1.0f) continue;
        for (int64_t i = 0; i < rank; ++i) acc[r * rank + i] *= shrink[r];
      }
    }
    const int64_t used = (keys + step - 1) / step * step;
    for (int64_t d = 0; d < rank; d += kLanes) {
      Path::template accumulate<L>(weights, keys_at, used, rank, d, acc);
    }
  }

  for (int64_t r = 0; r < count; ++r) {
    const int64_t m = first_row + r, row = b * rows + m;
    if (call.splits > 1) {
      float* to = call.partial + (row * call.splits + split) * call.rank;
      const float divisor = total[r] > 0.0f ? total[r] : 1.0f;
      for (int64_t i = 0; i < call.rank; ++i) to[i] = acc[r * rank + i] / divisor;
      call.partial_lse[row * call.splits + split] = natural_lse(top[r], total[r]);
      continue;
    }
    const int64_t head = m % call.heads, query = call.sparse ? b % call.queries : m / call.heads;
    const float divisor = total[r] == 0.0f ? 1.0f : with_sink(call, head, top[r], total[r]);
    for (int64_t i = 0; i < call.rank; ++i) store_out<T>(call, row, i, acc[r * rank + i] / divisor);
    call.lse[(sequence * call.heads + head) * call.queries + query] = natural_lse(top[r], total[r]);
  }
}

template <typename Path, typename T>
static void decode_tile(const DecodeCall& call, int64_t item, char* scratch) {
  const int64_t left = rows_of(call) - item % tiles_of(call) * kRows;
  if (left > kRows / 2) {
    decode_item<Path, T, kRows>(call, item, scratch);
  } else {
    decode_item<Path, T, kRows / 2>(call, item, scratch);
  }
}

void mla_decode_items(const DecodeCall& call, char* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    for (int64_t item = begin; item < end; ++item) {
#if defined(__AVX512BF16__)
      if (call.dtype == Dtype::bf16) {
        decode_tile<Bfloat16, T>(call, item, scratch);
        continue;
      }
#endif
      decode_tile<Float32, T>(call, item, scratch);
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

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_decode_fwd", TORCH_BOX(&mla_decode_fwd));
  m.impl("mla_sparse_decode_fwd", TORCH_BOX(&mla_sparse_decode_fwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
