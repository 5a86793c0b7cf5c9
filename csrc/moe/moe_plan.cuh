// moe_plan for decode: one block sorts all slots. Each warp owns a run of slots and a histogram, and counts 32 slots at
// a time by matching lanes, so the order inside an expert is the order of the slots and nothing is added atomically.
#pragma once

#include "common/cuda.cuh"

namespace tilefuse {

constexpr int kPlanWarps = 8;
constexpr int kPlanThreads = 32 * kPlanWarps;

__host__ __device__ inline int plan_shared_bytes(int experts) { return (experts + 1) * kPlanWarps * 4; }

template <typename Id>
__global__ void __launch_bounds__(kPlanThreads)
    moe_plan_kernel(const Id* ids, int slots, int experts, int* order, int* inverse, int* offsets) {
  TILEFUSE_DYNAMIC_SHARED(int, counts);  // [experts + 1][kPlanWarps]
  __shared__ int warp_totals[kPlanWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int rows = experts + 1;
  for (int i = thread; i < rows * kPlanWarps; i += kPlanThreads) counts[i] = 0;
  __syncthreads();

  const int per_warp = round_up(ceil_div(slots, kPlanWarps), 32);
  const int begin = warp * per_warp, end = begin + per_warp < slots ? begin + per_warp : slots;
  const auto expert_of = [&](int slot) {
    const Id id = ids[slot];
    return id >= 0 && id < static_cast<Id>(experts) ? static_cast<int>(id) : experts;
  };
  // visit(slot, expert, rank): rank counts the earlier slots of this warp with the same expert
  const auto each_slot = [&](const auto& visit) {
    for (int start = begin; start < end; start += 32) {
      const int slot = start + lane;
      const int expert = slot < end ? expert_of(slot) : -1;
      const unsigned peers = __match_any_sync(kFullWarp, expert);
      const int before = __popc(peers & ((1u << lane) - 1u));
      int base = 0;
      if (expert >= 0) base = counts[expert * kPlanWarps + warp];
      __syncwarp();
      if (expert >= 0) {
        visit(slot, expert, base + before);
        if (before == 0) counts[expert * kPlanWarps + warp] = base + __popc(peers);
      }
      __syncwarp();
    }
  };
  each_slot([](int, int, int) {});
  __syncthreads();

  // exclusive scan in the order of experts, then warps; a thread takes consecutive experts
  const int per_thread = ceil_div(rows, kPlanThreads);
  const int first = thread * per_thread, last = first + per_thread < rows ? first + per_thread : rows;
  int mine = 0;
  for (int e = first; e < last; ++e) {
    for (int w = 0; w < kPlanWarps; ++w) mine += counts[e * kPlanWarps + w];
  }
  int scanned = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, scanned, distance);
    if (lane >= distance) scanned += other;
  }
  if (lane == 31) warp_totals[warp] = scanned;
  __syncthreads();
  int position = scanned - mine;
  for (int w = 0; w < warp; ++w) position += warp_totals[w];
  for (int e = first; e < last; ++e) {
    offsets[e] = position;
    for (int w = 0; w < kPlanWarps; ++w) {
      const int count = counts[e * kPlanWarps + w];
      counts[e * kPlanWarps + w] = position;
      position += count;
    }
  }
  __syncthreads();

  each_slot([&](int slot, int expert, int at) {
    order[at] = slot;
    inverse[slot] = expert == experts ? -1 : at;
  });
}

}  // namespace tilefuse
