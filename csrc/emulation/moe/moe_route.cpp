// The CUDA kernels of moe_route and its gradient, on the CPU.
#include "emulation/binding.h"

#include "moe/moe_route.cuh"

using namespace tilefuse;

namespace {

template <typename T>
void run(const MoeRouteCall& p) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.tokens, kRouteWarps)));
  route_launch<T>(p.experts, [&](auto kernel) {
    emulation::launch(grid, dim3(32 * kRouteWarps), route_shared_bytes(p.groups, p.top_k), [&] { kernel(p); });
  });
}

template <typename T>
void run_backward(const MoeRouteBwdCall& p) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.tokens, kRouteWarps)));
  emulation::launch(grid, dim3(32 * kRouteWarps), route_backward_shared_bytes(p.experts, p.top_k),
                    [&] { moe_route_bwd_kernel<T>(p); });
}

}  // namespace

TILEFUSE_EMULATION(m) {
  m.def("run", [](int dtype, uintptr_t logits, int64_t stride, uintptr_t bias, uintptr_t weights, uintptr_t ids,
                  int64_t tokens, int experts, int top_k, int score, bool renormalize, int groups, int topk_group,
                  bool top2, float scale, bool nan_zero) {
    MoeRouteCall p{};
    p.logits = emulation::pointer<const void>(logits);
    p.stride = stride;
    p.bias = emulation::pointer<const float>(bias);
    p.weights = emulation::pointer<float>(weights);
    p.ids = emulation::pointer<int>(ids);
    p.tokens = tokens;
    p.experts = experts;
    p.top_k = top_k;
    p.groups = groups;
    p.topk_group = topk_group;
    p.score = static_cast<RouteScore>(score);
    p.renormalize = renormalize;
    p.top2 = top2;
    p.nan_zero = nan_zero;
    p.scale = scale;
    if (dtype == 0) run<float>(p);
    if (dtype == 1) run<bf16>(p);
    if (dtype == 2) run<f16>(p);
  });

  m.def("run_backward",
        [](int dtype, uintptr_t dweights, uintptr_t logits, int64_t stride, uintptr_t ids, uintptr_t dlogits,
           int64_t tokens, int experts, int top_k, int score, bool renormalize, float scale, bool nan_zero) {
          MoeRouteBwdCall p{};
          p.dweights = emulation::pointer<const float>(dweights);
          p.logits = emulation::pointer<const void>(logits);
          p.stride = stride;
          p.ids = emulation::pointer<const int>(ids);
          p.dlogits = emulation::pointer<void>(dlogits);
          p.tokens = tokens;
          p.experts = experts;
          p.top_k = top_k;
          p.score = static_cast<RouteScore>(score);
          p.renormalize = renormalize;
          p.nan_zero = nan_zero;
          p.scale = scale;
          if (dtype == 0) run_backward<float>(p);
          if (dtype == 1) run_backward<bf16>(p);
          if (dtype == 2) run_backward<f16>(p);
        });
}
