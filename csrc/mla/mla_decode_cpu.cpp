// Attention of absorbed queries over the paged latent cache, on the CPU.
// build-flags: -ffp-contract=fast
//
// One item of work is a tile of (query, head) rows of one sequence and one split of its keys. Keys are taken a block at
// a time: rows of the block are found through the page table, scored against the tile, and added to its accumulator.
// Nothing larger than a block of keys or a tile of results is ever held, whatever the length. bfloat16 on CPUs with
// AVX512-BF16 multiplies pairs directly; everything else runs in float32. Splits are combined in their order.
#include "common/cpu_math.h"
#include "mla/decode_products_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

namespace {

template <typename T>
inline void store_out(const MlaDecodeCall& call, int64_t row, int64_t i, float value) {
  static_cast<T*>(call.out)[row * call.rank + i] = from_float<T>(value);
}

inline float natural_lse(float top, float total) {
  return total > 0.0f || total != total ? top + std::log(total) : -INFINITY;
}

// what a row's sum of weights, relative to exp(top), becomes with its sink
inline float with_sink(const MlaDecodeCall& call, int64_t head, float top, float total) {
  if (call.sinks == nullptr) return total;
  return total + std::exp(call.sinks[head] - top);
}

// where element i of row r lies among L rows that are multiplied `step` elements at a time
template <int64_t L, int64_t step>
inline int64_t packed(int64_t i, int64_t r) {
  return i / step * step * L + r * step + i % step;
}

// L: rows of the tile that are computed, the last of them for nothing where there are fewer
template <typename Path, typename T, int64_t L>
void decode_item(const MlaDecodeCall& call, int64_t item, char* scratch) {
  using Element = typename Path::Element;
  constexpr int64_t step = Path::kStep;
  const int64_t rows = rows_of(call), tiles = tiles_of(call);
  const int64_t tile = item % tiles, split = item / tiles % call.splits, b = item / tiles / call.splits;
  const Span span = span_of(call, b);
  const int64_t start = span.first + split * span.size;
  const int64_t stop = start + span.size < span.length ? start + span.size : span.length;
  const int64_t first_row = tile * kTileRows, count = rows - first_row < L ? rows - first_row : L;
  const int64_t sequence = call.sparse ? b / call.queries : b;
  const int64_t raw_width = call.rank + call.rope, width = padded(raw_width), rank = padded(call.rank);

  float* acc = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  float* scores = acc + L * rank;
  Element* q = reinterpret_cast<Element*>(scores + L * kBlockKeys);
  Element* weights = q + L * width;
  Element* key_buffer = weights + L * kBlockKeys;
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
    lowest[r] = !call.sparse && call.left >= 0 ? own - call.left : 0;
  }
  const int64_t table =
      call.sparse ? sequence * call.table_batch + b % call.queries * call.table_query : sequence * call.table_batch;

  Block blocks[2];
  find_keys(call, table, start, start + kBlockKeys < stop ? start + kBlockKeys : stop, blocks[0]);
  int64_t turn = 0;
  for (int64_t block = start; block < stop; block += kBlockKeys, ++turn) {
    const Block& here = blocks[turn % 2];
    Block& next = blocks[(turn + 1) % 2];
    const int64_t end = block + kBlockKeys < stop ? block + kBlockKeys : stop;
    find_keys(call, table, end, end + kBlockKeys < stop ? end + kBlockKeys : stop, next);
    const int64_t keys = here.keys;
    if (keys == 0) continue;
    const Element* keys_at[kBlockKeys + Path::kKeysAtOnce];
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
      from[r] = static_cast<int32_t>(low < 0 ? 0 : low > kBlockKeys ? kBlockKeys : low);
      to[r] = static_cast<int32_t>(high < 0 ? 0 : high > kBlockKeys ? kBlockKeys : high);
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
void decode_tile(const MlaDecodeCall& call, int64_t item, char* scratch) {
  const int64_t left = rows_of(call) - item % tiles_of(call) * kTileRows;
  if (left > kTileRows / 2) {
    decode_item<Path, T, kTileRows>(call, item, scratch);
  } else {
    decode_item<Path, T, kTileRows / 2>(call, item, scratch);
  }
}

}  // namespace

void mla_decode_items(const MlaDecodeCall& call, char* scratch, int64_t begin, int64_t end) {
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
void mla_combine_rows(const MlaDecodeCall& call, float* acc, int64_t begin, int64_t end) {
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

TILEFUSE_DISPATCH(mla_decode_items)
TILEFUSE_DISPATCH(mla_combine_rows)

namespace {

// keys that are worth a split of their own, and how many there are at most when the caller leaves the choice
constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kMaxSplits = 16;

// number of splits from the length that is possible: a row's result does not depend on its batch
int64_t splits_for(int64_t capacity, int64_t asked) {
  const int64_t possible = capacity > kBlockKeys ? (capacity + kBlockKeys - 1) / kBlockKeys : 1;
  if (asked > 0) return asked < possible ? asked : possible;
  const int64_t wanted = (capacity + kSplitKeys - 1) / kSplitKeys;
  return wanted < 1 ? 1 : wanted > kMaxSplits ? kMaxSplits : wanted;
}

std::tuple<Tensor, Tensor> run(MlaDecodeCall& call, const Tensor& q, const Tensor& cache, const Tensor& table,
                               const OptionalTensor& sinks, double softmax_scale, int64_t kv_lora_rank,
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
  call.table = index_of(table);
  call.table_batch = stride_or_zero(table, 0);
  call.table_query = call.sparse ? stride_or_zero(table, 1) : 0;
  call.columns = table.size(table.dim() - 1);
  call.sinks = pointer<const float>(sinks);
  call.scale = static_cast<float>(softmax_scale);
  Tensor out = empty_of(q, {call.batch, call.queries, call.heads, call.rank});
  Tensor lse = empty_of(q, {call.batch, call.heads, call.queries}, ScalarType::Float);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t sequences = call.sparse ? call.batch * call.queries : call.batch;
  const int64_t rows = rows_of(call), total_rows = sequences * rows;
  if (total_rows == 0) return {out, lse};
  call.splits = splits_for(call.sparse ? call.columns : call.columns * call.page_size, num_splits);
  OptionalTensor partial, partial_lse;
  if (call.splits > 1) {
    partial = empty_of(q, {total_rows, call.splits, call.rank}, ScalarType::Float);
    partial_lse = empty_of(q, {total_rows, call.splits}, ScalarType::Float);
    call.partial = static_cast<float*>(partial->mutable_data_ptr());
    call.partial_lse = static_cast<float*>(partial_lse->mutable_data_ptr());
  }
  run_parallel(mla_decode_items, sequences * call.splits * tiles_of(call), 1, call,
               RangeScratch<char>{scratch_bytes(call)});
  if (call.splits > 1) run_parallel(mla_combine_rows, total_rows, 16, call, RangeScratch<float>{call.rank});
  return {out, lse};
}

std::tuple<Tensor, Tensor> mla_decode_fwd(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens,
                                          OptionalTensor sinks, double softmax_scale, int64_t kv_lora_rank, bool causal,
                                          int64_t window, std::string layout, int64_t num_splits) {
  MlaDecodeCall call{};
  call.causal = causal;
  call.left = window;
  call.lengths = index_of(seq_lens);
  return run(call, q, cache, block_table, sinks, softmax_scale, kv_lora_rank, layout, num_splits);
}

std::tuple<Tensor, Tensor> mla_sparse_decode_fwd(Tensor q, Tensor cache, Tensor indices, OptionalTensor sinks,
                                                 double softmax_scale, int64_t kv_lora_rank, std::string layout) {
  MlaDecodeCall call{};
  call.sparse = true;
  call.left = -1;
  return run(call, q, cache, indices, sinks, softmax_scale, kv_lora_rank, layout, 0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_decode_fwd", TORCH_BOX(&mla_decode_fwd));
  m.impl("mla_sparse_decode_fwd", TORCH_BOX(&mla_sparse_decode_fwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
