// Launch and registration of the rotary embedding.
#include "rope/rope.cuh"

#include "common/launch.h"
#include "rope/rope_host.h"

namespace tilefuse {
namespace {

void run(const char* op, const Tensor& q, RopeCall p) {
  if (p.tokens == 0 || heads_of(p) == 0) return;
  const CudaCall call(q);
  TILEFUSE_BY_CUDA_DTYPE(p.dtype, T, {
    rope_launch<T>(
        p, [&](auto kernel, int64_t blocks) { kernel<<<grid_size(blocks, 1), kRopeThreads, 0, call.stream>>>(p); });
  });
  call.check(op);
}

Tensor rope_fwd(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens, bool interleaved,
                int64_t rotary_offset, bool conjugate, Section mrope_section, bool mrope_interleaved) {
  Tensor out = empty_contiguous(x);
  run("rope", x,
      rope_call(x, nullptr, out, nullptr, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, true,
                mrope_section, mrope_interleaved));
  return out;
}

std::tuple<Tensor, Tensor> rope_qk_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, OptionalTensor positions,
                                       OptionalTensor cu_seqlens, bool interleaved, int64_t rotary_offset,
                                       bool conjugate, Section mrope_section, bool mrope_interleaved) {
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  run("rope_qk", q,
      rope_call(q, &k, q_out, &k_out, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, true,
                mrope_section, mrope_interleaved));
  return {q_out, k_out};
}

void rope_inplace(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens,
                  bool interleaved, int64_t rotary_offset, bool conjugate, Section mrope_section,
                  bool mrope_interleaved) {
  run("rope_", x,
      rope_call(x, nullptr, x, nullptr, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, false,
                mrope_section, mrope_interleaved));
}

void rope_qk_inplace(Tensor q, Tensor k, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens,
                     bool interleaved, int64_t rotary_offset, bool conjugate, Section mrope_section,
                     bool mrope_interleaved) {
  run("rope_qk_", q,
      rope_call(q, &k, q, &k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, false,
                mrope_section, mrope_interleaved));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_qk_fwd", TORCH_BOX(&rope_qk_fwd));
  m.impl("rope_inplace", TORCH_BOX(&rope_inplace));
  m.impl("rope_qk_inplace", TORCH_BOX(&rope_qk_inplace));
}

}  // namespace tilefuse
