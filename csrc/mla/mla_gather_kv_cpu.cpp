// Paged latent rows to one packed tensor, on the CPU.
#include "rope/rope.h"

#include "common/fp8.h"
#include "common/stream_cpu.h"

namespace tilefuse {

struct GatherCall {
  // the bytes of a row are documented in tilefuse/ops/mla/layout.py; strides in bytes
  const uint8_t* cache;
  int64_t page_stride, row_stride, page_size, pages;
  Dtype cache_dtype, out_dtype;
  bool fp8, stream;
  int64_t rank, rope, scale_offset, rope_offset;
  const void* table;
  bool table_wide;
  int64_t columns;
  // first row of each sequence, and of what follows the last one
  const int64_t* bounds;
  int64_t sequences;
  void* out;
};

namespace TILEFUSE_ISA {

template <typename To>
static inline void read_fp8_row(const GatherCall& call, const uint8_t* row, To* to) {
  for (int64_t group = 0; group < call.rank; group += 128) {
    float scale;
    std::memcpy(&scale, row + call.scale_offset + group / 32, 4);
    for (int64_t i = group; i < group + 128; ++i) to[i] = from_float<To>(fp8::decode(row[i]) * scale);
  }
  const bf16* rotated = reinterpret_cast<const bf16*>(row + call.rope_offset);
  for (int64_t i = 0; i < call.rope; ++i) to[call.rank + i] = from_float<To>(to_float(rotated[i]));
}

template <typename To>
static void gather_rows(const GatherCall& call, To* buffer, int64_t begin, int64_t end) {
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
        const int64_t at = sequence * call.columns + column;
        const int64_t page = call.table_wide ? static_cast<const int64_t*>(call.table)[at]
                                             : static_cast<const int32_t*>(call.table)[at];
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

// buffer: R + r floats
void mla_gather_rows(const GatherCall& call, void* buffer, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.out_dtype, To, { gather_rows<To>(call, static_cast<To*>(buffer), begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_gather_rows, (const GatherCall&, void*, int64_t, int64_t))

static Tensor mla_gather_kv_fwd(Tensor cache, Tensor block_table, Tensor cu_seqlens, int64_t total_tokens,
                                int64_t kv_lora_rank, std::string layout,
                                torch::headeronly::ScalarType out_dtype) {
  GatherCall call{};
  call.fp8 = layout == "fp8";
  call.rank = kv_lora_rank;
  const int64_t columns = cache.size(2);
  call.rope = call.fp8 ? (columns - kv_lora_rank - kv_lora_rank / 32) / 2 : columns - kv_lora_rank;
  call.scale_offset = kv_lora_rank;
  call.rope_offset = kv_lora_rank + kv_lora_rank / 32;
  const int64_t width = call.rank + call.rope;
  Tensor out = torch::stable::new_empty(cache, {total_tokens, width}, out_dtype);
  if (out.numel() == 0) return out;
  const int64_t itemsize = static_cast<int64_t>(cache.element_size());
  call.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
  call.page_stride = cache.stride(0) * itemsize;
  call.row_stride = cache.stride(1) * itemsize;
  call.page_size = cache.size(1) > 0 ? cache.size(1) : 1;
  call.pages = cache.numel() == 0 ? 0 : cache.size(0);
  if (!call.fp8) call.cache_dtype = dtype_of(cache);
  call.out_dtype = dtype_of(out);
  const IndexData table = index_data(block_table), bounds = index_data(cu_seqlens);
  call.table = table.data;
  call.table_wide = table.wide;
  call.columns = block_table.size(1);
  call.sequences = block_table.size(0);
  std::vector<int64_t> starts(call.sequences + 1);
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = bounds[i];
  call.bounds = starts.data();
  const int64_t row_bytes = width * static_cast<int64_t>(out.element_size());
  call.stream = row_bytes % 64 == 0 && total_tokens * row_bytes >= kStreamBytes;
  call.out = out.mutable_data_ptr();
  prefer_huge_pages(call.out, total_tokens * row_bytes);
  const auto kernel = mla_gather_rows_dispatch();
  parallel_for(0, total_tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(width);
    kernel(call, buffer.data(), begin, end);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("mla_gather_kv_fwd", TORCH_BOX(&mla_gather_kv_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
