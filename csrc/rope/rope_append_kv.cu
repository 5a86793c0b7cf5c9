// Launch and registration of the rotary embedding with the paged cache write.
#include "rope/rope_append_kv.cuh"

#include "common/launch.h"
#include "rope/rope_host.h"

namespace tilefuse {
namespace {

Tensor rope_append_kv_fwd(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache,
                          Tensor v_cache, Tensor slot_mapping, bool interleaved, int64_t rotary_offset, double k_scale,
                          double v_scale) {
  Tensor q_out = empty_contiguous(q);
  RopeAppendKvCall a{};
  a.rope = rope_call(q, &k, q_out, &k, cos, sin, positions, std::nullopt, interleaved, rotary_offset, false, true, {},
                     false);
  a.v = v.const_data_ptr();
  set_strides(a.v_strides, v);
  a.dim_v = static_cast<int>(v.size(v.dim() - 1));
  const Tensor* caches[2] = {&k_cache, &v_cache};
  for (int which = 0; which < 2; ++which) {
    a.cache[which] = caches[which]->mutable_data_ptr();
    for (int i = 0; i < 3; ++i) a.cache_strides[which][i] = stride_or_zero(*caches[which], i);
  }
  a.scale[0] = static_cast<float>(k_scale);
  a.scale[1] = static_cast<float>(v_scale);
  a.slots = index_of(slot_mapping);
  const bool packed = slot_mapping.dim() == 1;
  a.slot_strides[0] = packed ? 0 : slot_mapping.stride(0);
  a.slot_strides[1] = slot_mapping.stride(packed ? 0 : 1);
  a.slot_count = k_cache.size(0) * k_cache.size(1);
  a.page_size = k_cache.size(1);
  if (a.rope.tokens == 0 || heads_of(a.rope) == 0) return q_out;
  const CudaCall call(q);
  const auto launch = [&](auto kernel, int64_t blocks) {
    kernel<<<grid_size(blocks, 1), kRopeThreads, 0, call.stream>>>(a);
  };
  TILEFUSE_BY_CUDA_DTYPE(a.rope.dtype, T, {
    if (k_cache.scalar_type() == ScalarType::Float8_e4m3fn) {
      append_launch<T, cache_e4m3>(a, launch);
    } else {
      TILEFUSE_BY_CUDA_DTYPE(dtype_of(k_cache), C, { append_launch<T, C>(a, launch); });
    }
  });
  call.check("rope_append_kv");
  return q_out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) { m.impl("rope_append_kv_fwd", TORCH_BOX(&rope_append_kv_fwd)); }

}  // namespace tilefuse
