// Attention whose keys and values differ in width, on the CPU: window_attention's kernel with an unbounded window.
#include "attention/window_cpu_host.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

namespace {

std::tuple<Tensor, Tensor> mla_attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q,
                                             OptionalTensor cu_seqlens_k, double softmax_scale, bool causal) {
  return window_attention_fwd(q, k, v, {}, {}, cu_seqlens_q, cu_seqlens_k, {}, -1, causal ? 0 : -1, 1, softmax_scale,
                              0.0, 0);
}

std::tuple<Tensor, Tensor, Tensor> mla_attention_bwd(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                                     Tensor lse, OptionalTensor cu_seqlens_q,
                                                     OptionalTensor cu_seqlens_k, double softmax_scale, bool causal) {
  const auto [dq, dk, dv, no_sinks] =
      window_attention_bwd(dout, dlse, q, k, v, out, lse, {}, {}, cu_seqlens_q, cu_seqlens_k, {}, -1, causal ? 0 : -1,
                           1, softmax_scale, 0.0, 0);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_attention_fwd", TORCH_BOX(&mla_attention_fwd));
  m.impl("mla_attention_bwd", TORCH_BOX(&mla_attention_bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
