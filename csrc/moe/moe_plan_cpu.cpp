// moe_plan on the CPU: a stable counting sort, slots cut into chunks that keep their order.
#include "common/cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

namespace {

// expert of a slot, `experts` for a dropped one
inline int64_t expert_of(const Index& ids, int64_t slot, int64_t experts) {
  const int64_t id = ids[slot];
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(experts) ? id : experts;
}

}  // namespace

// counts [experts + 1] of one chunk
void moe_plan_count(const Index& ids, int64_t begin, int64_t end, int64_t experts, int32_t* counts) {
  for (int64_t e = 0; e <= experts; ++e) counts[e] = 0;
  for (int64_t slot = begin; slot < end; ++slot) ++counts[expert_of(ids, slot, experts)];
}

// next [experts + 1]: where this chunk's first slot of each expert goes
void moe_plan_scatter(const Index& ids, int64_t begin, int64_t end, int64_t experts, int32_t* next, int32_t* order,
                      int32_t* inverse) {
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t expert = expert_of(ids, slot, experts);
    const int32_t at = next[expert]++;
    order[at] = static_cast<int32_t>(slot);
    inverse[slot] = expert == experts ? -1 : at;
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(moe_plan_count)
TILEFUSE_DISPATCH(moe_plan_scatter)

namespace {

std::tuple<Tensor, Tensor, Tensor> plan_fwd(Tensor ids, int64_t experts) {
  const int64_t slots = ids.numel();
  Tensor order = empty_of(ids, {slots}, ScalarType::Int);
  Tensor inverse = empty_of(ids, {slots}, ScalarType::Int);
  Tensor offsets = empty_of(ids, {experts + 1}, ScalarType::Int);
  const Index index = index_of(ids);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  // the counters must stay small beside the slots
  const int64_t most = slots / (4 * (experts + 1)) + 1;
  const int64_t chunks = slots <= 16384 ? 1 : (threads < most ? threads : most);
  const int64_t size = (slots + chunks - 1) / chunks;
  std::vector<int32_t> counts(static_cast<size_t>(chunks * (experts + 1)));
  const auto each = [&](const auto& body) {
    parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        body(c * size, (c + 1) * size < slots ? (c + 1) * size : slots, counts.data() + c * (experts + 1));
      }
    });
  };
  each([&](int64_t begin, int64_t end, int32_t* mine) { moe_plan_count(index, begin, end, experts, mine); });
  int32_t* starts = static_cast<int32_t*>(offsets.data_ptr());
  int32_t total = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    starts[e] = total;
    for (int64_t c = 0; c < chunks; ++c) {
      int32_t& counter = counts[static_cast<size_t>(c * (experts + 1) + e)];
      const int32_t here = counter;
      counter = total;
      total += here;
    }
  }
  each([&](int64_t begin, int64_t end, int32_t* mine) {
    moe_plan_scatter(index, begin, end, experts, mine, static_cast<int32_t*>(order.data_ptr()),
                     static_cast<int32_t*>(inverse.data_ptr()));
  });
  return {order, inverse, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("moe_plan_fwd", TORCH_BOX(&plan_fwd)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
