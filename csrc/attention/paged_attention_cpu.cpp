// build-flags: -ffp-contract=fast
// Attention over a paged cache on the CPU. Few rows (query heads of a kv head, times Sq) stream the cache: a span of a
// sequence's keys is met by all kv heads, so that its pages are read once and in order, and spans are merged in their
// order. Many rows are tiles of one kv head.
#include "attention/decode_cpu.h"
#include "attention/window_cpu.h"

namespace tilefuse {

// keys of a span: results depend on it, so it depends on nothing
constexpr int32_t kSpan = 512;
// rows of a kv head that stream
constexpr int64_t kStreamRows = 16;

// part of one sequence's keys
struct PagedSpan {
  int64_t sequence;
  int32_t start, stop;
};

struct PagedAttentionCall {
  Dtype dtype;
  bool fp8;
  HeadRows q, out;
  const void *k, *v;
  int64_t k_page, k_slot, k_head, v_page, v_slot, v_head;
  Statistics lse;
  const int64_t* table;  // [B, max_pages]
  const int64_t* lengths;
  const float *sinks, *slopes;
  int64_t pages, page_size, max_pages, sq, kv_heads, group, dim, dim_v, tiles;
  int32_t left, right;
  float scale, softcap, v_scale;
  // of streaming
  const PagedSpan* spans;
  const int64_t* first_span;  // [B + 1]
  int64_t parts;              // of the kv heads, which share a span
  int64_t part_width;
  float* sums;  // [spans, kv_heads * sq * group, part_width + 2], where a sequence has several spans
};

inline int32_t paged_length(const PagedAttentionCall& call, int64_t b) {
  const int64_t limit = call.max_pages * call.page_size, length = call.lengths[b];
  return static_cast<int32_t>(length < 0 ? 0 : length > limit ? limit : length);
}

namespace TILEFUSE_ISA {

namespace {

// a sum of one row in call.sums: its columns, top and total
inline float* sums_at(const PagedAttentionCall& call, int64_t span, int64_t row) {
  return call.sums + (span * call.kv_heads * call.sq * call.group + row) * (call.part_width + 2);
}

// keys of a span from n0 on: where they are in the caches, for kv head 0; -1 is a page that does not exist
struct PagedBlock {
  int64_t k[kKeys], v[kKeys];
  int32_t position[kKeys];
  int32_t count;
  bool whole;
};

inline void find_block(const PagedAttentionCall& call, const PagedSpan& span, int32_t n0, PagedBlock& block) {
  block.count = n0 >= span.stop ? 0 : least(kKeys, span.stop - n0);
  block.whole = true;
  const int64_t* table = call.table + span.sequence * call.max_pages;
  int64_t column = n0 / call.page_size, slot = n0 % call.page_size;
  for (int32_t r = 0; r < kKeys; ++r) {
    block.k[r] = block.v[r] = -1;
    block.position[r] = kNowhere;
    if (r >= block.count) continue;
    const int64_t page = table[column];
    if (page >= 0 && page < call.pages) {
      block.k[r] = page * call.k_page + slot * call.k_slot;
      block.v[r] = page * call.v_page + slot * call.v_slot;
      block.position[r] = n0 + r;
    } else {
      block.whole = false;
    }
    if (++slot == call.page_size) ++column, slot = 0;
  }
}

inline void find_head(const PagedAttentionCall& call, const PagedBlock& block, int64_t head, int64_t size,
                      DecodeKeys& keys) {
  const char *k = static_cast<const char*>(call.k), *v = static_cast<const char*>(call.v);
  for (int32_t r = 0; r < kKeys; ++r) {
    keys.k[r] = block.k[r] < 0 ? nullptr : k + (block.k[r] + head * call.k_head) * size;
    keys.v[r] = block.v[r] < 0 ? nullptr : v + (block.v[r] + head * call.v_head) * size;
  }
}

// items are (span, part of the kv heads)
template <typename T>
void paged_spans(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  const int64_t rows = call.sq * call.group, most_heads = (call.kv_heads + call.parts - 1) / call.parts;
  const int64_t size = call.fp8 ? 1 : sizeof(T);
  Scratch scratch(Decode<T>::bytes(most_heads * rows, call.dim, call.dim_v));
  Decode<T> engine(scratch, most_heads * rows, call.dim, call.dim_v, call.fp8);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t at_span = item / call.parts, part = item % call.parts;
    const PagedSpan& span = call.spans[at_span];
    const int64_t b = span.sequence, first = part * call.kv_heads / call.parts,
                  last = (part + 1) * call.kv_heads / call.parts;
    const int32_t base = paged_length(call, b) - static_cast<int32_t>(call.sq);
    engine.begin();
    for (int64_t i = 0; i < (last - first) * rows; ++i) {
      engine.query(
          i, row<T>(call.q, b, i % rows / call.group, first * call.group + i / rows * call.group + i % call.group));
    }
    PagedBlock blocks[2];
    DecodeKeys keys[2];
    DecodeRow of[kStreamRows];
    int turn = 0, step = 0;
    find_block(call, span, span.start, blocks[0]);
    find_head(call, blocks[0], first, size, keys[0]);
    for (int32_t n0 = span.start; n0 < span.stop; n0 += kKeys, turn ^= 1) {
      const PagedBlock& block = blocks[turn];
      find_block(call, span, n0 + kKeys, blocks[turn ^ 1]);
      bool mask = !block.whole;
      for (int64_t j = 0; j < call.sq; ++j) {
        const int32_t place = base + static_cast<int32_t>(j);
        mask |= place - call.left > n0 || place + call.right < n0 + block.count - 1;
      }
      for (int64_t head = first; head < last; ++head, step ^= 1) {
        for (int64_t r = 0; r < rows; ++r) {
          const int32_t place = base + static_cast<int32_t>(r / call.group);
          of[r] = {place - call.left, place + call.right, place,
                   call.slopes == nullptr ? 0.0f : call.slopes[head * call.group + r % call.group]};
        }
        if (head + 1 < last) {
          find_head(call, block, head + 1, size, keys[step ^ 1]);
        } else {
          find_head(call, blocks[turn ^ 1], first, size, keys[step ^ 1]);
        }
        engine.keys((head - first) * rows, rows, keys[step], keys[step ^ 1], block.position, block.count, of,
                    {call.scale, call.softcap, call.slopes != nullptr, 1}, mask);
      }
    }
    const bool alone = call.first_span[b + 1] - call.first_span[b] == 1;
    for (int64_t i = 0; i < (last - first) * rows; ++i) {
      const int64_t j = i % rows / call.group, h = (first + i / rows) * call.group + i % call.group;
      if (alone) {
        engine.end(i, call.sinks == nullptr ? nullptr : call.sinks + h, call.v_scale, row<T>(call.out, b, j, h),
                   at(call.lse, b, h, j));
      } else {
        float* sums = sums_at(call, at_span, h * call.sq + j);
        engine.partial(i, sums, sums + call.part_width, sums + call.part_width + 1);
      }
    }
  }
}

// rows [B, Hq, Sq] from the sums of their spans, in the order of the spans
template <typename T>
void merge_spans(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  const int64_t rows = call.kv_heads * call.group * call.sq;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / rows, h = item % rows / call.sq, j = item % call.sq;
    const int64_t first = call.first_span[b], last = call.first_span[b + 1];
    if (last - first == 1) continue;
    float top = -kInfinity, total = 0.0f;
    for (int64_t span = first; span < last; ++span) {
      const float here = sums_at(call, span, item % rows)[call.part_width];
      top = top > here ? top : here;
    }
    const float safe = top == -kInfinity ? 0.0f : top;
    // the first span's sums hold those of all
    float* acc = sums_at(call, first, item % rows);
    for (int64_t span = first; span < last; ++span) {
      const float* from = sums_at(call, span, item % rows);
      const float factor = std::exp(from[call.part_width] - safe);
      total += from[call.part_width + 1] * factor;
      for (int64_t d = 0; d < call.part_width; ++d) acc[d] = from[d] * factor + (span == first ? 0.0f : acc[d]);
    }
    Decode<T>::finish(acc, top, total, call.dim_v, call.sinks == nullptr ? nullptr : call.sinks + h, call.v_scale,
                      row<T>(call.out, b, j, h), at(call.lse, b, h, j));
  }
}

// the first lane's row is task's; rows run over (query, head of the group)
template <typename T>
void paged_tiles(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  constexpr int L = kLanes;
  Scratch scratch(tile_bytes(L, call.dim, call.dim_v));
  Forward<T, L> engine(scratch, call.dim, call.dim_v);
  Scratch widened(call.fp8 ? kRows * (call.dim + call.dim_v) * sizeof(T) + 256 : 64);
  T* wide_k = call.fp8 ? widened.take<T>(kRows * call.dim) : nullptr;
  T* wide_v = call.fp8 ? widened.take<T>(kRows * call.dim_v) : nullptr;
  const T *q[L], *k[kRows], *v[kRows];
  T* out[L];
  float *lse[L], sinks[L];
  int32_t position[kRows];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task % call.tiles, kv = task / call.tiles % call.kv_heads,
                  b = task / call.tiles / call.kv_heads;
    const int32_t length = paged_length(call, b);
    const int64_t first = tile * L, rows = call.sq * call.group;
    const int64_t last = first + L < rows ? first + L - 1 : rows - 1;
    for (int lane = 0; lane < L; ++lane) {
      const int64_t r = first + lane, j = r / call.group, h = kv * call.group + r % call.group;
      const bool there = r < rows;
      q[lane] = there ? row<T>(call.q, b, j, h) : nullptr;
      out[lane] = there ? row<T>(call.out, b, j, h) : nullptr;
      lse[lane] = there ? at(call.lse, b, h, j) : nullptr;
      sinks[lane] = there && call.sinks != nullptr ? call.sinks[h] : 0.0f;
      engine.queries.slope[lane] = there && call.slopes != nullptr ? call.slopes[h] : 0.0f;
      const int32_t place = length - static_cast<int32_t>(call.sq - j);
      engine.queries.at[lane] = place;
      engine.queries.low[lane] = there ? place - call.left : 1;
      engine.queries.high[lane] = there ? place + call.right : 0;
    }
    engine.begin(q, call.sinks == nullptr ? nullptr : sinks);
    const int32_t base = length - static_cast<int32_t>(call.sq);
    const int32_t start = most(base + static_cast<int32_t>(first / call.group) - call.left, 0);
    const int32_t stop = least(length, base + static_cast<int32_t>(last / call.group) + call.right + 1);
    for (int32_t n0 = start; n0 < stop; n0 += kRows) {
      const int32_t n = least(kRows, stop - n0);
      for (int32_t r = 0; r < n; ++r) {
        const int64_t page = call.table[b * call.max_pages + (n0 + r) / call.page_size];
        const int64_t slot = (n0 + r) % call.page_size;
        const bool there = page >= 0 && page < call.pages;
        position[r] = there ? n0 + r : kNowhere;
        k[r] = v[r] = nullptr;
        if (!there) continue;
        const int64_t k_at = page * call.k_page + slot * call.k_slot + kv * call.k_head;
        const int64_t v_at = page * call.v_page + slot * call.v_slot + kv * call.v_head;
        if (call.fp8) {
          read_codes(static_cast<const uint8_t*>(call.k) + k_at, call.dim, wide_k + r * call.dim);
          read_codes(static_cast<const uint8_t*>(call.v) + v_at, call.dim_v, wide_v + r * call.dim_v);
          k[r] = wide_k + r * call.dim;
          v[r] = wide_v + r * call.dim_v;
        } else {
          k[r] = static_cast<const T*>(call.k) + k_at;
          v[r] = static_cast<const T*>(call.v) + v_at;
        }
      }
      engine.keys(k, v, position, n, {call.scale, call.softcap, call.slopes != nullptr, 1}, true);
    }
    engine.end(out, lse, call.v_scale);
  }
}

}  // namespace

void paged_attention_tiles(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { paged_tiles<T>(call, begin, end); })
}

void paged_attention_spans(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { paged_spans<T>(call, begin, end); })
}

void paged_attention_merge(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { merge_spans<T>(call, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(paged_attention_tiles)
TILEFUSE_DISPATCH(paged_attention_spans)
TILEFUSE_DISPATCH(paged_attention_merge)

namespace {

std::vector<int64_t> read_index(const Tensor& t) {
  const Index index = index_of(t);
  const int64_t rows = t.dim() == 2 ? t.size(0) : 1, columns = t.size(t.dim() - 1);
  const int64_t row_stride = t.dim() == 2 ? t.stride(0) : 0, stride = t.stride(t.dim() - 1);
  std::vector<int64_t> values(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    values[i] = index[i / columns * row_stride + i % columns * stride];
  }
  return values;
}

// the spans of all sequences, of which each has at least one
void stream(PagedAttentionCall& call, int64_t batch) {
  std::vector<PagedSpan> spans;
  std::vector<int64_t> first_span;
  for (int64_t b = 0; b < batch; ++b) {
    first_span.push_back(static_cast<int64_t>(spans.size()));
    const int32_t length = paged_length(call, b), base = length - static_cast<int32_t>(call.sq);
    const int32_t start = base - call.left > 0 ? base - call.left : 0;
    const int64_t stop = base + call.sq + call.right;
    const int32_t end = stop < length ? static_cast<int32_t>(stop) : length;
    int32_t from = start;
    do {
      const int32_t to = end - from > kSpan ? from + kSpan : end;
      spans.push_back({b, from, to});
      from += kSpan;
    } while (from < end);
  }
  first_span.push_back(static_cast<int64_t>(spans.size()));
  const int64_t count = static_cast<int64_t>(spans.size()), rows = call.kv_heads * call.group * call.sq;
  call.spans = spans.data();
  call.first_span = first_span.data();
  call.part_width = (call.dim_v + 31) / 32 * 32;
  // results do not depend on the parts
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t state_bytes = rows * (call.part_width + call.dim) * 4, parts_of_cache = (state_bytes >> 18) + 1;
  call.parts = (wanted + count - 1) / (count > 0 ? count : 1);
  if (call.parts < parts_of_cache) call.parts = parts_of_cache;
  if (call.parts > call.kv_heads) call.parts = call.kv_heads;
  const bool merge = count > batch;
  const std::unique_ptr<float[]> sums(merge ? new float[count * rows * (call.part_width + 2)] : nullptr);
  call.sums = sums.get();
  run_parallel(paged_attention_spans, count * call.parts, 1, call);
  if (merge) run_parallel(paged_attention_merge, batch * rows, 64, call);
}

std::tuple<Tensor, Tensor> paged_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                                               Tensor seq_lens, OptionalTensor sinks, OptionalTensor alibi_slopes,
                                               int64_t left, int64_t right, double scale, double softcap,
                                               double k_scale, double v_scale) {
  Tensor out = empty_of(q, with_last(q, v_cache.size(3)));
  Tensor lse = empty_of(q, statistics_shape(q), ScalarType::Float);
  const std::vector<int64_t> table = read_index(block_table), lengths = read_index(seq_lens);
  std::vector<float> sink_values, slope_values;
  if (sinks) sink_values = read_floats(*sinks);
  if (alibi_slopes) slope_values = read_floats(*alibi_slopes);
  PagedAttentionCall call{};
  call.dtype = dtype_of(q);
  call.fp8 = k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  call.q = rows_of(q);
  call.out = rows_of(out);
  call.lse = statistics_of(lse);
  call.k = k_cache.const_data_ptr();
  call.v = v_cache.const_data_ptr();
  call.k_page = k_cache.stride(0), call.k_slot = k_cache.stride(1), call.k_head = k_cache.stride(2);
  call.v_page = v_cache.stride(0), call.v_slot = v_cache.stride(1), call.v_head = v_cache.stride(2);
  call.table = table.data();
  call.lengths = lengths.data();
  call.sinks = sinks ? sink_values.data() : nullptr;
  call.slopes = alibi_slopes ? slope_values.data() : nullptr;
  call.pages = k_cache.size(0);
  call.page_size = k_cache.size(1);
  call.max_pages = block_table.size(1);
  call.sq = q.size(1);
  call.kv_heads = k_cache.size(2);
  call.group = q.size(2) / call.kv_heads;
  call.dim = q.size(3);
  call.dim_v = v_cache.size(3);
  call.left = bounded(left);
  call.right = bounded(right);
  call.scale = static_cast<float>(scale * k_scale);
  call.softcap = static_cast<float>(softcap);
  call.v_scale = static_cast<float>(v_scale);
  if (call.sq * call.group <= kStreamRows) {
    stream(call, q.size(0));
  } else {
    call.tiles = (call.sq * call.group + baseline::kLanes - 1) / baseline::kLanes;
    run_parallel(paged_attention_tiles, q.size(0) * call.kv_heads * call.tiles, 1, call);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("paged_attention_fwd", TORCH_BOX(&paged_attention_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
