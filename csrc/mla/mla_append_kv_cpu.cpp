// Latent rows into the paged cache, on the CPU: norm, RoPE, quantisation and store of one token at a time.
#include "mla/latent_cpu.h"

#include "common/stream_cpu.h"
#include "fp8/block_cpu.h"
#include "mla/latent_row.h"

namespace tilefuse {

struct MlaAppendKvCall {
  LatentCall latent;
  uint8_t* cache;
  // in bytes
  int64_t page_stride, row_stride, row_bytes;
  int64_t page_size;
  Index slots;
  bool fp8, stream;
  Dtype cache_dtype;
};

namespace TILEFUSE_ISA {

namespace {

// the fp8 family's default
constexpr float kQuantizeEps = 1e-12f;

inline void store_fp8_row(const MlaAppendKvCall& call, const float* row, uint8_t* to) {
  static_assert(kLatentGroup == kBlock, "a group of codes is a block of the quantiser");
  const int64_t rank = call.latent.rank;
  for (int64_t group = 0; group < rank / kBlock; ++group) {
    const float scale = quantize_block(row + group * kBlock, kBlock, true, kQuantizeEps, to + group * kBlock);
    std::memcpy(to + latent_scale_offset(rank, group), &scale, 4);
  }
  store_row<bf16>(row + rank, 2 * call.latent.half, to + latent_rope_offset(rank));
}

template <typename T>
void append_rows(const MlaAppendKvCall& call, float* scratch, int64_t begin, int64_t end) {
  const int64_t width = call.latent.rank + 2 * call.latent.half;
  uint8_t* image = reinterpret_cast<uint8_t*>(scratch + width + 2 * call.latent.half);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = call.slots[token];
    if (slot < 0) continue;
    latent_row<T>(call.latent, token, scratch, scratch + width);
    uint8_t* out = call.cache + slot / call.page_size * call.page_stride + slot % call.page_size * call.row_stride;
    uint8_t* to = call.stream ? image : out;
    if (call.fp8) {
      store_fp8_row(call, scratch, to);
    } else {
      TILEFUSE_BY_DTYPE(call.cache_dtype, C, { store_row<C>(scratch, width, to); })
    }
    if (call.stream) stream_copy(out, image, call.row_bytes);
  }
  if (call.stream) stream_done();
}

}  // namespace

// scratch: 2 R + 3 r floats
void mla_append_rows(const MlaAppendKvCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.latent.dtype, T, { append_rows<T>(call, scratch, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_append_rows)

namespace {

// raises before anything is written
void check_slots(const Index& slots, const Index& positions, int64_t tokens, int64_t capacity, int64_t table_rows,
                 bool rope) {
  for (int64_t i = 0; i < tokens; ++i) {
    if (slots[i] >= capacity) {
      throw std::runtime_error("tilefuse.mla_append_kv: slot_mapping must be less than " + std::to_string(capacity) +
                               ", got " + std::to_string(slots[i]));
    }
    if (rope && slots[i] >= 0 && (positions[i] < 0 || positions[i] >= table_rows)) {
      throw std::runtime_error("tilefuse.mla_append_kv: positions must be in [0, " + std::to_string(table_rows) +
                               "), got " + std::to_string(positions[i]));
    }
  }
}

void mla_append_kv_fwd(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor positions, Tensor cache,
                       Tensor slot_mapping, double eps, bool interleaved, std::string layout) {
  const std::vector<float> weights = float_weight(weight);
  MlaAppendKvCall call{};
  call.latent = latent_call(kv_a, weights, cos, sin, positions, eps, interleaved);
  call.slots = index_of(slot_mapping);
  const int64_t tokens = slot_mapping.size(0);
  check_slots(call.slots, call.latent.positions, tokens, cache.size(0) * cache.size(1), cos.size(0),
              call.latent.half > 0);
  call.fp8 = layout == "fp8";
  call.cache = static_cast<uint8_t*>(cache.mutable_data_ptr());
  int64_t itemsize = 1;
  if (!call.fp8) {
    call.cache_dtype = dtype_of(cache);
    itemsize = call.cache_dtype == Dtype::f32 ? 4 : 2;
  }
  call.page_stride = cache.stride(0) * itemsize;
  call.row_stride = cache.stride(1) * itemsize;
  call.page_size = cache.size(1);
  const int64_t width = call.latent.rank + 2 * call.latent.half;
  call.row_bytes = call.fp8 ? latent_row_bytes(call.latent.rank, 2 * call.latent.half) : width * itemsize;
  // rows that end inside of a line are faster through the cache: 1.3 ms for 1.6 (4096 FP8 rows, one thread)
  const bool lines =
      (reinterpret_cast<uintptr_t>(call.cache) | call.page_stride | call.row_stride | call.row_bytes) % 64 == 0;
  call.stream = lines && tokens * call.row_bytes >= kStreamBytes;
  run_parallel(mla_append_rows, tokens, kLatentGrain, call,
               RangeScratch<float>{2 * call.latent.rank + 6 * call.latent.half});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("mla_append_kv_fwd", TORCH_BOX(&mla_append_kv_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
