// Launch and registration of moe_plan.
#include "moe/moe_plan.cuh"

#include "common/launch.h"

namespace tilefuse {

namespace {

std::tuple<Tensor, Tensor, Tensor> moe_plan_fwd(Tensor ids, int64_t num_experts) {
  const int64_t slots = ids.numel();
  Tensor order = empty_of(ids, {slots}, ScalarType::Int);
  Tensor inverse = empty_of(ids, {slots}, ScalarType::Int);
  Tensor offsets = empty_of(ids, {num_experts + 1}, ScalarType::Int);
  const int experts = static_cast<int>(num_experts);
  const CudaCall call(ids);
  const auto launch = [&](auto kernel, auto* data) {
    kernel<<<1, kPlanThreads, plan_shared_bytes(experts), call.stream>>>(
        data, static_cast<int>(slots), experts, pointer<int>(order), pointer<int>(inverse), pointer<int>(offsets));
  };
  if (ids.scalar_type() == ScalarType::Long) {
    launch(moe_plan_kernel<int64_t>, pointer<const int64_t>(ids));
  } else {
    launch(moe_plan_kernel<int32_t>, pointer<const int32_t>(ids));
  }
  call.check("moe_plan");
  return {order, inverse, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) { m.impl("moe_plan_fwd", TORCH_BOX(&moe_plan_fwd)); }

}  // namespace tilefuse
