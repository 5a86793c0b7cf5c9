// The CUDA kernel of moe_plan, on the CPU.
#include "emulation/binding.h"

#include "moe/moe_plan.cuh"

using namespace tilefuse;

namespace {

template <typename Id>
void run(uintptr_t ids, int slots, int experts, uintptr_t order, uintptr_t inverse, uintptr_t offsets) {
  emulation::launch(dim3(1), dim3(kPlanThreads), plan_shared_bytes(experts), [&] {
    moe_plan_kernel<Id>(emulation::pointer<const Id>(ids), slots, experts, emulation::pointer<int>(order),
                        emulation::pointer<int>(inverse), emulation::pointer<int>(offsets));
  });
}

}  // namespace

TILEFUSE_EMULATION(m) {
  m.def("run",
        [](bool wide, uintptr_t ids, int slots, int experts, uintptr_t order, uintptr_t inverse, uintptr_t offsets) {
          if (wide) {
            run<int64_t>(ids, slots, experts, order, inverse, offsets);
          } else {
            run<int32_t>(ids, slots, experts, order, inverse, offsets);
          }
        });
}
