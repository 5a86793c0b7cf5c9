// build-flags: -ffp-contract=fast
// Sliding-window attention on the CPU, forward and backward: tasks of one tile of one head, no atomics.
#include "attention/window_cpu_host.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

void window_attention_pass(const WindowAttentionCall& call, Pass pass, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { run_window_pass<T, T>(call, pass, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
  m.impl("window_attention_bwd_bias", TORCH_BOX(&window_attention_bwd_bias));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
