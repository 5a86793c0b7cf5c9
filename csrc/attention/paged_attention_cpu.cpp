// build-flags: -ffp-contract=fast
// Attention over a paged cache on the CPU: the rows of a kv head's group and of the Sq queries are one tile's lanes.
#include "attention/window_cpu.h"

namespace tilefuse {

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
  int64_t pages, page_size, max_pages, sq, kv_heads, group, dim, dim_v, tiles, lanes;
  int32_t left, right;
  float scale, softcap, v_scale;
};

namespace TILEFUSE_ISA {

namespace {

inline float e4m3(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return bits_to_float(0x7fc00000u);
  f16 half;
  half.bits = static_cast<uint16_t>(((bits & 0x80u) << 8) | ((bits & 0x7fu) << 7));
  return to_float(half) * 256.0f;
}

// the first lane's row is task's; rows run over (query, head of the group)
template <typename T, int L>
void paged_tasks(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(L, call.dim, call.dim_v));
  Forward<T, L> engine(scratch, call.dim, call.dim_v);
  Scratch widened(call.fp8 ? kRows * (call.dim + call.dim_v) * sizeof(T) + 256 : 64);
  T* wide_k = call.fp8 ? widened.take<T>(kRows * call.dim) : nullptr;
  T* wide_v = call.fp8 ? widened.take<T>(kRows * call.dim_v) : nullptr;
  T decode[256];
  if (call.fp8) {
    for (int i = 0; i < 256; ++i) decode[i] = from_float<T>(e4m3(static_cast<uint8_t>(i)));
  }
  const T *q[L], *k[kRows], *v[kRows];
  T* out[L];
  float *lse[L], sinks[L];
  int32_t position[kRows];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task % call.tiles, kv = task / call.tiles % call.kv_heads,
                  b = task / call.tiles / call.kv_heads;
    const int64_t limit = call.max_pages * call.page_size;
    const int32_t length = static_cast<int32_t>(call.lengths[b] < 0       ? 0
                                                : call.lengths[b] > limit ? limit
                                                                          : call.lengths[b]);
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
          const uint8_t *from_k = static_cast<const uint8_t*>(call.k) + k_at,
                        *from_v = static_cast<const uint8_t*>(call.v) + v_at;
          for (int64_t d = 0; d < call.dim; ++d) wide_k[r * call.dim + d] = decode[from_k[d]];
          for (int64_t d = 0; d < call.dim_v; ++d) wide_v[r * call.dim_v + d] = decode[from_v[d]];
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

void paged_attention_tasks(const PagedAttentionCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (call.lanes == 16) {
      paged_tasks<T, 16>(call, begin, end);
    } else {
      paged_tasks<T, 64>(call, begin, end);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(paged_attention_tasks)

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

std::tuple<Tensor, Tensor> paged_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                                               Tensor seq_lens, OptionalTensor sinks, OptionalTensor alibi_slopes,
                                               int64_t left, int64_t right, double scale, double softcap,
                                               double k_scale, double v_scale) {
  Tensor out = torch::stable::new_empty(q, with_last(q, v_cache.size(3)));
  Tensor lse = torch::stable::new_empty(q, statistics_shape(q), ScalarType::Float);
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
  call.lanes = call.sq * call.group <= 16 ? 16 : 64;
  call.tiles = (call.sq * call.group + call.lanes - 1) / call.lanes;
  call.left = bounded(left);
  call.right = bounded(right);
  call.scale = static_cast<float>(scale * k_scale);
  call.softcap = static_cast<float>(softcap);
  call.v_scale = static_cast<float>(v_scale);
  run_parallel(paged_attention_tasks, q.size(0) * call.kv_heads * call.tiles, 1, call);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("paged_attention_fwd", TORCH_BOX(&paged_attention_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
