// 1 x 128 block quantisation on the GPU: sixteen lanes take one block, eight elements each.
#pragma once

#include "common/cuda.cuh"
#include "common/fp8.h"

namespace tilefuse::fp8 {

constexpr int kBlock = 128;
constexpr int kLanes = 16;
constexpr int kPerLane = kBlock / kLanes;
constexpr int kQuantizeThreads = 128;
constexpr int kBlocksPerCta = kQuantizeThreads / kLanes;

struct QuantizeCall {
  const void* x;
  int64_t row_stride;
  int64_t rows;
  int64_t k;
  uint8_t* codes;
  float* scales;
  // elements between two blocks' scales
  int64_t pitch;
  float eps;
  bool pow2;
  // whether 16-byte reads and 8-byte writes of whole blocks are aligned
  bool vectors;
};

// eight elements from column `first` of a row of k, zero past its end
template <typename T>
__device__ __forceinline__ void load_lane(float (&out)[kPerLane], const T* row, int64_t first, int64_t k,
                                          bool vectors) {
  if (vectors && first + kPerLane <= k) {
    const Vec<T, kPerLane> x = load_vec<kPerLane>(row + first);  // [8]
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] = to_float(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] = first + i < k ? to_float(row[first + i]) : 0.0f;
  }
}

// quantises the block that these sixteen lanes hold; every lane of the warp must take part
__device__ __forceinline__ void quantize_lanes(const QuantizeCall& p, const float (&x)[kPerLane], int64_t row,
                                               int64_t block, int64_t first, bool active) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) amax = max(amax, finite_magnitude(x[i]));
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    amax = max(amax, __shfl_xor_sync(kFullWarp, amax, lanes, kLanes));
  }
  if (!active) return;
  const float scale = block_scale(amax, p.eps, p.pow2);
  if (threadIdx.x % kLanes == 0) p.scales[block * p.pitch + row] = scale;
  Vec<uint8_t, kPerLane> codes;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) codes[i] = quantize(x[i], scale);
  uint8_t* out = p.codes + row * p.k + first;
  if (p.vectors && first + kPerLane <= p.k) {
    store_vec(out, codes);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < p.k) out[i] = codes[i];
    }
  }
}

// `Load(out, row, first)` gives a lane its eight float32 values, zero past column k
template <typename Load>
__device__ __forceinline__ void quantize_blocks(const QuantizeCall& p, const Load& load) {
  const int64_t blocks = ceil_div<int64_t>(p.k, kBlock);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kBlocksPerCta + threadIdx.x / kLanes;
  const bool active = item < p.rows * blocks;
  const int64_t row = active ? item / blocks : 0;
  const int64_t block = active ? item % blocks : 0;
  const int64_t first = block * kBlock + threadIdx.x % kLanes * kPerLane;
  float x[kPerLane] = {};
  if (active) load(x, row, first);
  quantize_lanes(p, x, row, block, first, active);
}

template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows_kernel(QuantizeCall p) {
  quantize_blocks(p, [&](float (&x)[kPerLane], int64_t row, int64_t first) {
    load_lane(x, static_cast<const T*>(p.x) + row * p.row_stride, first, p.k, p.vectors);
  });
}

inline int64_t quantize_grid(int64_t rows, int64_t k) {
  return ceil_div<int64_t>(rows * ceil_div<int64_t>(k, kBlock), kBlocksPerCta);
}

}  // namespace tilefuse::fp8
