// Paged latent rows to one packed tensor, on the CPU.
#include "common/stream_cpu.h"
#include "mla/latent_row_cpu.h"

namespace tilefuse {

struct MlaGatherKvCall {
  // strides in bytes
  const uint8_t* cache;
  int64_t page_stride, row_stride, page_size, pages;
  Dtype cache_dtype, out_dtype;
  bool fp8, stream;
  int64_t rank, rope;
  Index table;
  int64_t columns;
  // first row of each sequence, and of what follows the last one
  const int64_t* bounds;
  int64_t sequences;
  void* out;
};

namespace TILEFUSE_ISA {

namespace {

template <typename To>
inline void read_fp8_row(const MlaGatherKvCall& call, const uint8_t* row, To* to) {
  read_latent_codes(row, call.rank, to);
  const bf16* rotated = latent_rope(row, call.rank);
  for (int64_t i = 0; i < call.rope; ++i) to[call.rank + i] = from_float<To>(to_float(rotated[i]));
}

template <typename To>
void gather_rows(const MlaGatherKvCall& call, To* buffer, int64_t begin, int64_t end) {
  const int64_t width = call.rank + call.rope, bytes = width * static_cast<int64_t>(sizeof(To));
  const bool same = !call.fp8 && call.cache_dtype == call.out_dtype;
  int64_t sequence = -1;
  for (int64_t token = begin; token < end; ++token) {
    // the last sequence that begins at or before the token
    while (sequence < call.sequences && call.bounds[sequence + 1] <= token) ++sequence;
    To* to = static_cast<To*>(call.out) + token * width;
    const uint8_t* row = nullptr;
    if (sequence >= 0 && sequence < call.sequences) {
      const int64_t key = token - call.bounds[sequence], column = key / call.page_size;
      if (column < call.columns) {
        const int64_t page = call.table[sequence * call.columns + column];
        if (page >= 0 && page < call.pages)
          row = call.cache + page * call.page_stride + key % call.page_size * call.row_stride;
      }
    }
    if (row == nullptr) {
      std::memset(static_cast<void*>(to), 0, bytes);
    } else if (same) {
      if (call.stream) {
        stream_copy(to, row, bytes);
      } else {
        std::memcpy(static_cast<void*>(to), row, bytes);
      }
    } else {
      To* out = call.stream ? buffer : to;
      if (call.fp8) {
        read_fp8_row(call, row, out);
      } else {
        TILEFUSE_BY_DTYPE(call.cache_dtype, From, {
          const From* values = reinterpret_cast<const From*>(row);
          for (int64_t i = 0; i < width; ++i) out[i] = from_float<To>(to_float(values[i]));
        })
      }
      if (call.stream) stream_copy(to, buffer, bytes);
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

// buffer: R + r floats
void mla_gather_rows(const MlaGatherKvCall& call, void* buffer, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.out_dtype, To, { gather_rows<To>(call, static_cast<To*>(buffer), begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_gather_rows)

namespace {

Tensor mla_gather_kv_fwd(Tensor cache, Tensor block_table, Tensor cu_seqlens, int64_t total_tokens,
                         int64_t kv_lora_rank, std::string layout, ScalarType out_dtype) {
  MlaGatherKvCall call{};
  call.fp8 = layout == "fp8";
  call.rank = kv_lora_rank;
  const int64_t columns = cache.size(2);
  call.rope = call.fp8 ? latent_rope_dim(kv_lora_rank, columns) : columns - kv_lora_rank;
  const int64_t width = call.rank + call.rope;
  Tensor out = empty_of(cache, {total_tokens, width}, out_dtype);
  if (out.numel() == 0) return out;
  const int64_t itemsize = static_cast<int64_t>(cache.element_size());
  call.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
  call.page_stride = cache.stride(0) * itemsize;
  call.row_stride = cache.stride(1) * itemsize;
  call.page_size = cache.size(1) > 0 ? cache.size(1) : 1;
  call.pages = cache.numel() == 0 ? 0 : cache.size(0);
  if (!call.fp8) call.cache_dtype = dtype_of(cache);
  call.out_dtype = dtype_of(out);
  const Index bounds = index_of(cu_seqlens);
  call.table = index_of(block_table);
  call.columns = block_table.size(1);
  call.sequences = block_table.size(0);
  std::vector<int64_t> starts(call.sequences + 1);
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = bounds[i];
  call.bounds = starts.data();
  const int64_t row_bytes = width * static_cast<int64_t>(out.element_size());
  call.stream = row_bytes % 64 == 0 && total_tokens * row_bytes >= kStreamBytes;
  call.out = out.mutable_data_ptr();
  prefer_huge_pages(out);
  run_parallel(mla_gather_rows, total_tokens, 64, call, RangeScratch<float>{width});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("mla_gather_kv_fwd", TORCH_BOX(&mla_gather_kv_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
