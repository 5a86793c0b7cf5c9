// Latent rows into the paged cache, one warp per token: norm, RoPE, quantisation and store, one read and one write.
//
// A lane holds 16 neighbouring values, so eight lanes share one scale of the fp8 layout. Made for the few tokens of a
// decode step, where the launch is what counts. Every operation is rounded to nearest on its own, so that the stored
// bits are those of every other backend.
#pragma once

#include "common/cuda.cuh"
#include "common/fp8.h"

namespace tilefuse::mla {

constexpr int kPerLane = 16;
constexpr int kPerWarp = 32 * kPerLane;
constexpr int kTokensPerBlock = 4;
constexpr int kGroup = 128;
// the fp8 family's default
constexpr float kQuantizeEps = 1e-12f;

// the bytes of a cache row are documented in tilefuse/ops/mla/layout.py; cache strides in bytes
struct AppendArgs {
  const void* kv_a;
  const void* weight;
  const float* cos;
  const float* sin;
  const void* positions;
  const void* slots;
  uint8_t* cache;
  int64_t kv_stride, cos_stride, sin_stride, page_stride, row_stride, pages, page_size, table_rows, tokens;
  int rank, half;
  float eps;
  bool interleaved, positions_wide, slots_wide;
  // 16-byte accesses are possible on the way in and out
  bool vector_in, vector_out;
};

__device__ __forceinline__ int64_t index_at(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

__device__ __forceinline__ float sqrt_rn(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return sqrtf(x);
#endif
}

// 16 values from column `first`, zero from column `rank` on
template <typename T>
__device__ __forceinline__ void load_lane(const T* row, int first, int rank, bool vector, float* x) {
  if (vector && first + kPerLane <= rank) {
    constexpr int kVec = kVec16<T>;
#pragma unroll
    for (int v = 0; v < kPerLane / kVec; ++v) {
      const Vec<T, kVec> values = load_vec<kVec>(row + first + v * kVec);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[v * kVec + i] = to_float(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = first + i < rank ? to_float(row[first + i]) : 0.0f;
  }
}

template <typename C>
__device__ __forceinline__ void store_lane(C* row, int first, int rank, bool vector, const float* y) {
  if (vector && first + kPerLane <= rank) {
    constexpr int kVec = kVec16<C>;
#pragma unroll
    for (int v = 0; v < kPerLane / kVec; ++v) {
      Vec<C, kVec> values;
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = from_float<C>(y[v * kVec + i]);
      store_vec(row + first + v * kVec, values);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < rank) row[first + i] = from_float<C>(y[i]);
    }
  }
}

// codes of 16 values and, from one lane in eight, the scale of 128
__device__ __forceinline__ void store_lane_fp8(uint8_t* row, int first, int rank, bool vector, const float* y) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t magnitude = fp8::finite_magnitude(y[i]);
    amax = magnitude > amax ? magnitude : amax;
  }
#pragma unroll
  for (int lanes = kGroup / kPerLane / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, amax, lanes, 32);
    amax = other > amax ? other : amax;
  }
  // rank is a multiple of 128: a lane is inside with all of its values or none
  if (first >= rank) return;
  const float scale = fp8::block_scale(amax, kQuantizeEps, true);
  // the inverse of a power of two is exact, and so this product equals the quotient
  const float inverse = fp8::float_of(0x7f000000u - fp8::bits_of(scale));
  Vec<uint8_t, kPerLane> codes;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) codes[i] = fp8::encode(fp8::mul_rn(y[i], inverse));
  if (vector) {
    store_vec(row + first, codes);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[first + i] = codes[i];
  }
  // rows start at multiples of 4 bytes
  if (first % kGroup == 0) reinterpret_cast<float*>(row + rank)[first / kGroup] = scale;
}

template <typename T, typename W, bool kFp8>
__global__ void append_kernel(const AppendArgs args) {
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.y;
  if (token >= args.tokens) return;
  const int64_t slot = index_at(args.slots, args.slots_wide, token);
  const int64_t page = slot / args.page_size;
  // a slot that is not in the pool is skipped
  if (slot < 0 || page >= args.pages) return;
  const T* in = static_cast<const T*>(args.kv_a) + token * args.kv_stride;
  const W* weight = static_cast<const W*>(args.weight);
  uint8_t* out = args.cache + page * args.page_stride + slot % args.page_size * args.row_stride;

  float x[kPerLane];
  double squares = 0.0;
  for (int start = 0; start < args.rank; start += kPerWarp) {
    load_lane(in, start + lane * kPerLane, args.rank, args.vector_in, x);
    // in float64, so that the order of the sum does not show after rounding
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const float mean = static_cast<float>(warp_sum(squares) / args.rank);
  const float rstd = fp8::div_rn(1.0f, sqrt_rn(fp8::add_rn(mean, args.eps)));
  for (int start = 0; start < args.rank; start += kPerWarp) {
    const int first = start + lane * kPerLane;
    // one step holds up to 512 values, DeepSeek's rank: they are still in registers
    if (args.rank > kPerWarp) load_lane(in, first, args.rank, args.vector_in, x);
    float w[kPerLane];
    load_lane(weight, first, args.rank, args.vector_in, w);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = fp8::mul_rn(fp8::mul_rn(x[i], rstd), w[i]);
    if constexpr (kFp8) {
      store_lane_fp8(out, first, args.rank, args.vector_out, x);
    } else {
      store_lane(reinterpret_cast<T*>(out), first, args.rank, args.vector_out, x);
    }
  }

  if (args.half == 0) return;
  int64_t position = index_at(args.positions, args.positions_wide, token);
  // clamped: a wild position reads a wrong angle, never foreign memory
  position = position < 0 ? 0 : position >= args.table_rows ? args.table_rows - 1 : position;
  using Rotated = std::conditional_t<kFp8, bf16, T>;
  const T* rope = in + args.rank;
  Rotated* to = kFp8 ? reinterpret_cast<Rotated*>(out + args.rank + args.rank / 32)
                     : reinterpret_cast<Rotated*>(out) + args.rank;
  for (int i = lane; i < args.half; i += 32) {
    const int one = args.interleaved ? 2 * i : i, two = args.interleaved ? 2 * i + 1 : i + args.half;
    const float a = to_float(rope[one]), b = to_float(rope[two]);
    const float c = args.cos[position * args.cos_stride + i], s = args.sin[position * args.sin_stride + i];
    to[one] = from_float<Rotated>(fp8::add_rn(fp8::mul_rn(a, c), -fp8::mul_rn(b, s)));
    to[two] = from_float<Rotated>(fp8::add_rn(fp8::mul_rn(b, c), fp8::mul_rn(a, s)));
  }
}

// whether 16-byte accesses are possible; itemsizes of kv_a and weight, the cache's strides in bytes
inline void choose_vectors(AppendArgs& args, int kv_bytes, int weight_bytes) {
  args.vector_in = aligned(args.kv_a, args.kv_stride, kv_bytes, 16) && aligned(args.weight, 0, weight_bytes, 16);
  args.vector_out = aligned(args.cache, args.page_stride, 1, 16) && args.row_stride % 16 == 0;
}

}  // namespace tilefuse::mla
