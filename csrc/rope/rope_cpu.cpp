// Rotary embedding on the CPU: tokens in parallel, the table row of a token reused over its heads.
#include "rope/rope_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

void rope_tokens(const RopeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (call.interleaved) {
      rotate_tokens<T, true>(call, begin, end);
    } else {
      rotate_tokens<T, false>(call, begin, end);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(rope_tokens)

namespace {

// elements that are worth waking another thread for
constexpr int64_t kGrain = 32768;

void run(const char* op, RopeCall call) {
  const RopeRows rows(op, call);
  run_parallel(rope_tokens, call.tokens, 1 + kGrain / (1 + heads_of(call) * call.dim), call);
}

Tensor rope_fwd(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens, bool interleaved,
                int64_t rotary_offset, bool conjugate, Section mrope_section, bool mrope_interleaved) {
  Tensor out = empty_contiguous(x);
  run("rope", rope_call(x, nullptr, out, nullptr, cos, sin, positions, cu_seqlens, interleaved, rotary_offset,
                        conjugate, true, mrope_section, mrope_interleaved));
  return out;
}

std::tuple<Tensor, Tensor> rope_qk_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, OptionalTensor positions,
                                       OptionalTensor cu_seqlens, bool interleaved, int64_t rotary_offset,
                                       bool conjugate, Section mrope_section, bool mrope_interleaved) {
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  run("rope_qk", rope_call(q, &k, q_out, &k_out, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate,
                           true, mrope_section, mrope_interleaved));
  return {q_out, k_out};
}

void rope_inplace(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens,
                  bool interleaved, int64_t rotary_offset, bool conjugate, Section mrope_section,
                  bool mrope_interleaved) {
  run("rope_", rope_call(x, nullptr, x, nullptr, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate,
                         false, mrope_section, mrope_interleaved));
}

void rope_qk_inplace(Tensor q, Tensor k, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens,
                     bool interleaved, int64_t rotary_offset, bool conjugate, Section mrope_section,
                     bool mrope_interleaved) {
  run("rope_qk_", rope_call(q, &k, q, &k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, false,
                            mrope_section, mrope_interleaved));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_qk_fwd", TORCH_BOX(&rope_qk_fwd));
  m.impl("rope_inplace", TORCH_BOX(&rope_inplace));
  m.impl("rope_qk_inplace", TORCH_BOX(&rope_qk_inplace));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
