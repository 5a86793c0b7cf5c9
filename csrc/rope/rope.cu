// Launch and registration of the rotary embedding.
#include "rope/host.h"

namespace tilefuse {

static void run(const char* op, const Tensor& q, RopeParams& p, bool interleaved) {
  if (!has_work(p)) return;
  const CudaCall call(q);
  TILEFUSE_BY_CUDA_DTYPE(dtype_of(q), T, {
    rope_launch<T>(p, interleaved, [&](auto kernel, int64_t blocks) {
      kernel<<<grid_size(blocks, 1), kRopeThreads, 0, call.stream>>>(p);
    });
  });
  call.check(op);
}

static Tensor rope_fwd(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                       std::optional<Tensor> cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                       Section mrope_section, bool mrope_interleaved) {
  Tensor out = empty_contiguous(x);
  RopeParams p = rope_params(x, nullptr, out, nullptr, cos, sin, positions, cu_seqlens, rotary_offset, conjugate, true,
                             mrope_section, mrope_interleaved);
  run("rope", x, p, interleaved);
  return out;
}

static std::tuple<Tensor, Tensor> rope_qk_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin,
                                              std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens,
                                              bool interleaved, int64_t rotary_offset, bool conjugate,
                                              Section mrope_section, bool mrope_interleaved) {
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  RopeParams p = rope_params(q, &k, q_out, &k_out, cos, sin, positions, cu_seqlens, rotary_offset, conjugate, true,
                             mrope_section, mrope_interleaved);
  run("rope_qk", q, p, interleaved);
  return {q_out, k_out};
}

static void rope_inplace(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                         std::optional<Tensor> cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                         Section mrope_section, bool mrope_interleaved) {
  RopeParams p = rope_params(x, nullptr, x, nullptr, cos, sin, positions, cu_seqlens, rotary_offset, conjugate, false,
                             mrope_section, mrope_interleaved);
  run("rope_", x, p, interleaved);
}

static void rope_qk_inplace(Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                            std::optional<Tensor> cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                            Section mrope_section, bool mrope_interleaved) {
  RopeParams p = rope_params(q, &k, q, &k, cos, sin, positions, cu_seqlens, rotary_offset, conjugate, false,
                             mrope_section, mrope_interleaved);
  run("rope_qk_", q, p, interleaved);
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_qk_fwd", TORCH_BOX(&rope_qk_fwd));
  m.impl("rope_inplace", TORCH_BOX(&rope_inplace));
  m.impl("rope_qk_inplace", TORCH_BOX(&rope_qk_inplace));
}

}  // namespace tilefuse
