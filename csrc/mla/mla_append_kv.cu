// Launch and registration of the cache writer.
#include <string>

#include "common/launch.h"
#include "mla/mla_append_kv.cuh"

namespace tilefuse::mla {
namespace {

template <typename T, typename W>
void launch(const MlaAppendKvCall& call, bool fp8, cudaStream_t stream) {
  const dim3 grid(grid_size(call.tokens, kTokensPerBlock)), block(32, kTokensPerBlock);
  if (fp8) {
    append_kernel<T, W, true><<<grid, block, 0, stream>>>(call);
  } else {
    append_kernel<T, W, false><<<grid, block, 0, stream>>>(call);
  }
}

// the Python side sends only calls whose weight is of kv_a's dtype or float32, and whose cache is of kv_a's dtype or
// fp8
void append_kv(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor positions, Tensor cache, Tensor slot_mapping,
               double eps, bool interleaved, std::string layout) {
  MlaAppendKvCall call{};
  call.tokens = slot_mapping.size(0);
  if (call.tokens == 0 || cache.numel() == 0) return;
  const CudaCall cuda(kv_a);
  const Dtype dtype = dtype_of(kv_a), weight_dtype = dtype_of(weight);
  const bool fp8 = layout == "fp8";
  const int kv_bytes = dtype == Dtype::f32 ? 4 : 2, weight_bytes = weight_dtype == Dtype::f32 ? 4 : 2;
  const int64_t cache_bytes = fp8 ? 1 : kv_bytes;
  call.kv_a = kv_a.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.cos = pointer<const float>(cos);
  call.sin = pointer<const float>(sin);
  call.positions = index_of(positions);
  call.slots = index_of(slot_mapping);
  call.cache = pointer<uint8_t>(cache);
  call.kv_stride = stride_or_zero(kv_a, 0);
  call.cos_stride = stride_or_zero(cos, 0);
  call.sin_stride = stride_or_zero(sin, 0);
  call.page_stride = cache.stride(0) * cache_bytes;
  call.row_stride = cache.stride(1) * cache_bytes;
  call.pages = cache.size(0);
  call.page_size = cache.size(1);
  call.table_rows = cos.size(0);
  call.rank = static_cast<int>(weight.size(0));
  call.half = static_cast<int>(kv_a.size(1) - weight.size(0)) / 2;
  call.eps = static_cast<float>(eps);
  call.interleaved = interleaved;
  choose_vectors(call, kv_bytes, weight_bytes);
  TILEFUSE_BY_CUDA_DTYPE(dtype, T, {
    if (weight_dtype == dtype) {
      launch<T, T>(call, fp8, cuda.stream);
    } else {
      launch<T, float>(call, fp8, cuda.stream);
    }
  });
  cuda.check("mla_append_kv");
}

}  // namespace
}  // namespace tilefuse::mla

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) { m.impl("mla_append_kv_fwd", TORCH_BOX(&tilefuse::mla::append_kv)); }
