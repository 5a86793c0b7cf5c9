// Launch and registration of the cache writer.
#include <string>

#include "common/launch.h"
#include "mla/mla_append_kv.cuh"

namespace tilefuse::mla {
namespace {

bool is_wide(const Tensor& t) { return t.scalar_type() == ScalarType::Long; }

template <typename T, typename W>
void launch(const AppendArgs& args, bool fp8, cudaStream_t stream) {
  const dim3 grid(grid_size(args.tokens, kTokensPerBlock)), block(32, kTokensPerBlock);
  if (fp8) {
    append_kernel<T, W, true><<<grid, block, 0, stream>>>(args);
  } else {
    append_kernel<T, W, false><<<grid, block, 0, stream>>>(args);
  }
}

// the Python side sends only calls whose weight is of kv_a's dtype or float32, and whose cache is of kv_a's dtype or fp8
void append_kv(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor positions, Tensor cache, Tensor slot_mapping,
               double eps, bool interleaved, std::string layout) {
  AppendArgs args{};
  args.tokens = slot_mapping.size(0);
  if (args.tokens == 0 || cache.numel() == 0) return;
  const CudaCall call(kv_a);
  const Dtype dtype = dtype_of(kv_a), weight_dtype = dtype_of(weight);
  const bool fp8 = layout == "fp8";
  const int kv_bytes = dtype == Dtype::f32 ? 4 : 2, weight_bytes = weight_dtype == Dtype::f32 ? 4 : 2;
  const int64_t cache_bytes = fp8 ? 1 : kv_bytes;
  args.kv_a = pointer<void>(kv_a);
  args.weight = pointer<void>(weight);
  args.cos = pointer<float>(cos);
  args.sin = pointer<float>(sin);
  args.positions = pointer<void>(positions);
  args.slots = pointer<void>(slot_mapping);
  args.cache = static_cast<uint8_t*>(pointer<void>(cache));
  args.kv_stride = stride_or_zero(kv_a, 0);
  args.cos_stride = stride_or_zero(cos, 0);
  args.sin_stride = stride_or_zero(sin, 0);
  args.page_stride = cache.stride(0) * cache_bytes;
  args.row_stride = cache.stride(1) * cache_bytes;
  args.pages = cache.size(0);
  args.page_size = cache.size(1);
  args.table_rows = cos.size(0);
  args.rank = static_cast<int>(weight.size(0));
  args.half = static_cast<int>(kv_a.size(1) - weight.size(0)) / 2;
  args.eps = static_cast<float>(eps);
  args.interleaved = interleaved;
  args.positions_wide = is_wide(positions);
  args.slots_wide = is_wide(slot_mapping);
  choose_vectors(args, kv_bytes, weight_bytes);
  TILEFUSE_BY_CUDA_DTYPE(dtype, T, {
    if (weight_dtype == dtype) {
      launch<T, T>(args, fp8, call.stream);
    } else {
      launch<T, float>(args, fp8, call.stream);
    }
  });
  call.check("mla_append_kv");
}

}  // namespace
}  // namespace tilefuse::mla

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("mla_append_kv_fwd", TORCH_BOX(&tilefuse::mla::append_kv));
}
