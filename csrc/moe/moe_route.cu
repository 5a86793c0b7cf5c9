// Launch and registration of moe_route and its gradient.
#include "moe/moe_route.cuh"

#include "common/launch.h"

namespace tilefuse {

namespace {

std::tuple<Tensor, Tensor> moe_route_fwd(Tensor logits, OptionalTensor bias, int64_t top_k, std::string score,
                                         bool renormalize, int64_t n_group, int64_t topk_group, std::string group_score,
                                         double scale, std::string nan_policy) {
  Tensor weights = empty_of(logits, {logits.size(0), top_k}, ScalarType::Float);
  Tensor ids = empty_of(logits, {logits.size(0), top_k}, ScalarType::Int);
  if (logits.size(0) == 0) return {weights, ids};
  MoeRouteCall p{};
  p.logits = logits.const_data_ptr();
  p.stride = stride_or_zero(logits, 0);
  p.bias = pointer<const float>(bias);
  p.weights = pointer<float>(weights);
  p.ids = pointer<int>(ids);
  p.tokens = logits.size(0);
  p.experts = static_cast<int>(logits.size(1));
  p.top_k = static_cast<int>(top_k);
  p.groups = static_cast<int>(n_group);
  p.topk_group = static_cast<int>(topk_group);
  p.score = route_score_named(score.c_str());
  p.renormalize = renormalize;
  p.top2 = group_score == "top2";
  p.nan_zero = nan_policy == "zero";
  p.scale = static_cast<float>(scale);
  const CudaCall call(logits);
  const unsigned blocks = grid_size(p.tokens, kRouteWarps);
  const int shared = route_shared_bytes(p.groups, p.top_k);
  TILEFUSE_BY_CUDA_DTYPE(dtype_of(logits), T, {
    route_launch<T>(p.experts, [&](auto kernel) { kernel<<<blocks, 32 * kRouteWarps, shared, call.stream>>>(p); });
  });
  call.check("moe_route");
  return {weights, ids};
}

Tensor moe_route_bwd(Tensor dweights, Tensor logits, Tensor ids, std::string score, bool renormalize, double scale,
                     std::string nan_policy) {
  Tensor out = empty_of(logits, {logits.size(0), logits.size(1)});
  if (logits.size(0) == 0) return out;
  MoeRouteBwdCall p{};
  p.dweights = pointer<const float>(dweights);
  p.logits = logits.const_data_ptr();
  p.stride = stride_or_zero(logits, 0);
  p.ids = pointer<const int>(ids);
  p.dlogits = out.mutable_data_ptr();
  p.tokens = logits.size(0);
  p.experts = static_cast<int>(logits.size(1));
  p.top_k = static_cast<int>(ids.size(1));
  p.score = route_score_named(score.c_str());
  p.renormalize = renormalize;
  p.nan_zero = nan_policy == "zero";
  p.scale = static_cast<float>(scale);
  const CudaCall call(logits);
  const unsigned blocks = grid_size(p.tokens, kRouteWarps);
  const int shared = route_backward_shared_bytes(p.experts, p.top_k);
  TILEFUSE_BY_CUDA_DTYPE(dtype_of(logits), T,
                         { moe_route_bwd_kernel<T><<<blocks, 32 * kRouteWarps, shared, call.stream>>>(p); });
  call.check("moe_route");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("moe_route_fwd", TORCH_BOX(&moe_route_fwd));
  m.impl("moe_route_bwd", TORCH_BOX(&moe_route_bwd));
}

}  // namespace tilefuse
