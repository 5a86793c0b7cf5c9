// Latent rows into the paged cache, one warp per token: norm, RoPE, quantisation and store, one read and one write.
//
// A lane holds 16 neighbouring values, so eight lanes share one scale of the fp8 layout. Made for the few tokens of a
// decode step, where the launch is what counts. Every operation is rounded to nearest on its own, so that the stored
// bits are those of every other backend.
#pragma once

#include "common/cuda.cuh"
#include "common/fp8.h"
#include "mla/latent_row.h"

namespace tilefuse::mla {

constexpr int kPerLane = 16;
constexpr int kPerWarp = 32 * kPerLane;
constexpr int kTokensPerBlock = 4;
constexpr int kGroup = static_cast<int>(kLatentGroup);
// the fp8 family's default
constexpr float kQuantizeEps = 1e-12f;

// cache strides in bytes
struct MlaAppendKvCall {
  const void* kv_a;
  const void* weight;
  const float* cos;
  const float* sin;
  Index positions, slots;
  uint8_t* cache;
  int64_t kv_stride, cos_stride, sin_stride, page_stride, row_stride, pages, page_size, table_rows, tokens;
  int rank, half;
  float eps;
  bool interleaved;
  // 16-byte accesses are possible on the way in and out
  bool vector_in, vector_out;
};

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
  if (first % kGroup == 0) *reinterpret_cast<float*>(row + latent_scale_offset(rank, first / kGroup)) = scale;
}

template <typename T, typename W, bool kFp8>
__global__ void append_kernel(const MlaAppendKvCall call) {
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.y;
  if (token >= call.tokens) return;
  const int64_t slot = call.slots[token];
  const int64_t page = slot / call.page_size;
  // a slot that is not in the pool is skipped
  if (slot < 0 || page >= call.pages) return;
  const T* in = static_cast<const T*>(call.kv_a) + token * call.kv_stride;
  const W* weight = static_cast<const W*>(call.weight);
  uint8_t* out = call.cache + page * call.page_stride + slot % call.page_size * call.row_stride;

  float x[kPerLane];
  double squares = 0.0;
  for (int start = 0; start < call.rank; start += kPerWarp) {
    load_lane(in, start + lane * kPerLane, call.rank, call.vector_in, x);
    // in float64, so that the order of the sum does not show after rounding
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const float mean = static_cast<float>(warp_sum(squares) / call.rank);
  const float rstd = fp8::div_rn(1.0f, sqrt_rn(fp8::add_rn(mean, call.eps)));
  for (int start = 0; start < call.rank; start += kPerWarp) {
    const int first = start + lane * kPerLane;
    // one step holds up to 512 values, DeepSeek's rank: they are still in registers
    if (call.rank > kPerWarp) load_lane(in, first, call.rank, call.vector_in, x);
    float w[kPerLane];
    load_lane(weight, first, call.rank, call.vector_in, w);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = fp8::mul_rn(fp8::mul_rn(x[i], rstd), w[i]);
    if constexpr (kFp8) {
      store_lane_fp8(out, first, call.rank, call.vector_out, x);
    } else {
      store_lane(reinterpret_cast<T*>(out), first, call.rank, call.vector_out, x);
    }
  }

  if (call.half == 0) return;
  int64_t position = call.positions[token];
  // clamped: a wild position reads a wrong angle, never foreign memory
  position = position < 0 ? 0 : position >= call.table_rows ? call.table_rows - 1 : position;
  using Rotated = std::conditional_t<kFp8, bf16, T>;
  const T* rope = in + call.rank;
  Rotated* to = kFp8 ? reinterpret_cast<Rotated*>(out + latent_rope_offset(call.rank))
                     : reinterpret_cast<Rotated*>(out) + call.rank;
  for (int i = lane; i < call.half; i += 32) {
    const int one = call.interleaved ? 2 * i : i, two = call.interleaved ? 2 * i + 1 : i + call.half;
    const float a = to_float(rope[one]), b = to_float(rope[two]);
    const float c = call.cos[position * call.cos_stride + i], s = call.sin[position * call.sin_stride + i];
    to[one] = from_float<Rotated>(fp8::add_rn(fp8::mul_rn(a, c), -fp8::mul_rn(b, s)));
    to[two] = from_float<Rotated>(fp8::add_rn(fp8::mul_rn(b, c), fp8::mul_rn(a, s)));
  }
}

// whether 16-byte accesses are possible; itemsizes of kv_a and weight, the cache's strides in bytes
inline void choose_vectors(MlaAppendKvCall& call, int kv_bytes, int weight_bytes) {
  call.vector_in = aligned(call.kv_a, call.kv_stride, kv_bytes, 16) && aligned(call.weight, 0, weight_bytes, 16);
  call.vector_out = aligned(call.cache, call.page_stride, 1, 16) && call.row_stride % 16 == 0;
}

}  // namespace tilefuse::mla
