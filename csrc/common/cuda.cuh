// What every CUDA kernel needs: dtypes, 16-byte vectors, reductions, PTX behind wrappers. No torch headers.
//
// Included by csrc/<family>/<op>.cuh. nvcc compiles it for the GPU; g++ compiles the same kernel for the tests on top
// of emulation/cuda_emulation.h, so every wrapper around PTX has a host definition beside it.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#else
#include "emulation/cuda_emulation.h"
#endif

#include "common/values.h"

namespace tilefuse {

using bf16 = __nv_bfloat16;
using f16 = __half;
using fp8_e4m3 = __nv_fp8_e4m3;
using fp8_e5m2 = __nv_fp8_e5m2;

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(fp8_e4m3 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(fp8_e5m2 x) { return static_cast<float>(x); }

// rounds to nearest even; the FP8 types saturate: +-inf becomes the largest finite value, NaN stays NaN
template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ fp8_e4m3 from_float<fp8_e4m3>(float x) {
  fp8_e4m3 out;
  out.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  return out;
}
template <>
__device__ __forceinline__ fp8_e5m2 from_float<fp8_e5m2>(float x) {
  fp8_e5m2 out;
  out.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
  return out;
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// N elements that move in one access of up to 16 bytes; the address must be a multiple of the vector's size
template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vec {
  static_assert((N & (N - 1)) == 0, "a vector has a power of two of elements");
  T data[N];

  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

// how many elements a 16-byte access moves
template <typename T>
constexpr int kVec16 = 16 / static_cast<int>(sizeof(T));

namespace detail {

// the machine word of an access of `bytes` bytes
template <int bytes>
struct Word {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<1> {
  using type = unsigned char;
};

}  // namespace detail

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* address) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(out) / sizeof(Word)); ++i) {
    reinterpret_cast<Word*>(&out)[i] = reinterpret_cast<const Word*>(address)[i];
  }
  return out;
}

// for data that nobody reads again: marked to leave the caches first
template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_vec_streaming(const T* address) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(out) / sizeof(Word)); ++i) {
    reinterpret_cast<Word*>(&out)[i] = __ldcs(reinterpret_cast<const Word*>(address) + i);
  }
  return out;
}

template <int N, typename T>
__device__ __forceinline__ void store_vec(T* address, const Vec<T, N>& value) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(value) / sizeof(Word)); ++i) {
    reinterpret_cast<Word*>(address)[i] = reinterpret_cast<const Word*>(&value)[i];
  }
}

// whether rows that start at `address` and are `stride` elements apart can be read in vectors of `bytes` bytes
__host__ __device__ inline bool aligned(const void* address, int64_t stride, int element_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0 && stride * element_bytes % bytes == 0;
}

// every lane of the group gets the result, in an order that does not depend on the data; so do the reductions below
template <int Width = 32, typename T>
__device__ __forceinline__ T warp_sum(T value, unsigned mask = kFullWarp) {
#pragma unroll
  for (int lanes = Width / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(mask, value, lanes, Width);
  return value;
}

// a NaN is ignored, as fmaxf does
template <int Width = 32>
__device__ __forceinline__ float warp_max(float value, unsigned mask = kFullWarp) {
#pragma unroll
  for (int lanes = Width / 2; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(mask, value, lanes, Width));
  }
  return value;
}

// over a block of whole warps in x; `scratch` is shared memory for 32 floats, free to be reused on return
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < warps; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

__device__ __forceinline__ float block_max(float value, float* scratch) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = scratch[0];
  for (int i = 1; i < warps; ++i) largest = fmaxf(largest, scratch[i]);
  __syncthreads();
  return largest;
}

// declares `T* name`, the dynamic shared memory of the launch; `extern __shared__` has no host definition
#if defined(__CUDACC__)
#define TILEFUSE_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(128) unsigned char tilefuse_shared[]; \
  T* name = reinterpret_cast<T*>(tilefuse_shared)
#else
#define TILEFUSE_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::tilefuse::emulation::dynamic_shared())
#endif

// starts a 16-byte copy to shared memory of which the first `valid` bytes are read and the others become zero
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int valid = 16) {
#if defined(__CUDACC__)
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid) : "memory");
#else
  emulation::async_copy(shared, global, 16, valid);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulation::async_commit();
#endif
}

// returns when at most `Pending` of this thread's groups are still under way; a barrier must follow before others read
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#else
  emulation::async_wait(Pending);
#endif
}

// 2^x, correctly rounded for no x but within 2 ulp, one instruction
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

}  // namespace tilefuse
