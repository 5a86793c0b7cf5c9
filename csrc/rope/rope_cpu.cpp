// Rotary embedding on the CPU: tokens in parallel, the table row of a token reused over its heads.
#include "rope/rope.h"

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

TILEFUSE_DISPATCH(rope_tokens, (const RopeCall&, int64_t, int64_t))

// elements that are worth waking another thread for
constexpr int64_t kGrain = 32768;

static void run(const char* op, const Tensor& q, const Tensor* k, const Tensor& q_out, const Tensor* k_out,
                const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
                const std::optional<Tensor>& cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                const Section& section, bool mrope_interleaved) {
  RopeCall call{};
  const RopeRows rows = rope_call(op, call, q, k, q_out, k_out, cos, sin, positions, cu_seqlens, interleaved,
                                  rotary_offset, conjugate, section, mrope_interleaved);
  const int64_t heads = call.tensors[0].heads + call.tensors[1].heads;
  const auto kernel = rope_tokens_dispatch();
  parallel_for(0, call.tokens, 1 + kGrain / (1 + heads * call.dim),
               [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

static Tensor rope_fwd(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                       std::optional<Tensor> cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                       Section mrope_section, bool mrope_interleaved) {
  Tensor out = empty_contiguous(x);
  run("rope", x, nullptr, out, nullptr, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate,
      mrope_section, mrope_interleaved);
  return out;
}

static std::tuple<Tensor, Tensor> rope_qk_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin,
                                              std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens,
                                              bool interleaved, int64_t rotary_offset, bool conjugate,
                                              Section mrope_section, bool mrope_interleaved) {
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  run("rope_qk", q, &k, q_out, &k_out, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate,
      mrope_section, mrope_interleaved);
  return {q_out, k_out};
}

static void rope_inplace(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                         std::optional<Tensor> cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                         Section mrope_section, bool mrope_interleaved) {
  run("rope_", x, nullptr, x, nullptr, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate,
      mrope_section, mrope_interleaved);
}

static void rope_qk_inplace(Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                            std::optional<Tensor> cu_seqlens, bool interleaved, int64_t rotary_offset, bool conjugate,
                            Section mrope_section, bool mrope_interleaved) {
  run("rope_qk_", q, &k, q, &k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section,
      mrope_interleaved);
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_qk_fwd", TORCH_BOX(&rope_qk_fwd));
  m.impl("rope_inplace", TORCH_BOX(&rope_inplace));
  m.impl("rope_qk_inplace", TORCH_BOX(&rope_qk_inplace));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
