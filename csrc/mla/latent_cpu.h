// Latent rows on the CPU: RMSNorm of the first R values, RoPE of the rest, in float32 into a buffer.
#pragma once

#include "rope/rope_cpu.h"

namespace tilefuse {

struct LatentCall {
  const void* kv_a;
  Dtype dtype;
  int64_t kv_stride;
  int64_t tokens, rank, half;
  const float* weight;
  const float* cos;
  const float* sin;
  int64_t cos_stride, sin_stride;
  // without data: the token's own number
  Index positions;
  float eps;
  bool interleaved;
};

namespace TILEFUSE_ISA {

// 1 / sqrt(mean(x^2) + eps); the float64 sum makes the result independent of its order
static inline float rstd_of(const float* x, int64_t n, float eps) {
  typedef float Narrow __attribute__((vector_size(32), aligned(4), may_alias));
  typedef double Wide __attribute__((vector_size(64)));
  // independent sums: one alone would wait for each addition
  Wide lanes[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < 4; ++j) {
      const Wide values = __builtin_convertvector(*reinterpret_cast<const Narrow*>(x + i + 8 * j), Wide);
      lanes[j] += values * values;
    }
  }
  const Wide sums = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  double total = 0.0;
  for (int j = 0; j < 8; ++j) total += sums[j];
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float mean = static_cast<float>(total / static_cast<double>(n));
  return 1.0f / std::sqrt(mean + eps);
}

// row: R + r floats, scratch: r floats
template <typename T>
static inline void latent_row(const LatentCall& call, int64_t token, float* row, float* scratch) {
  const T* in = static_cast<const T*>(call.kv_a) + token * call.kv_stride;
  for (int64_t i = 0; i < call.rank; ++i) row[i] = to_float(in[i]);
  const float rstd = rstd_of(row, call.rank, call.eps);
  for (int64_t i = 0; i < call.rank; ++i) row[i] = row[i] * rstd * call.weight[i];
  if (call.half == 0) return;
  const int64_t position = call.positions.data == nullptr ? token : call.positions[token];
  const float* cos = call.cos + position * call.cos_stride;
  const float* sin = call.sin + position * call.sin_stride;
  for (int64_t i = 0; i < 2 * call.half; ++i) scratch[i] = to_float(in[call.rank + i]);
  if (call.interleaved) {
    rotate_interleaved(scratch, row + call.rank, cos, sin, call.half);
  } else {
    rotate_half(scratch, row + call.rank, call.half, cos, sin, call.half);
  }
}

template <typename T>
static inline void store_row(const float* row, int64_t n, void* out) {
  T* to = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(row[i]);
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

// the norm's weight as float32
inline std::vector<float> float_weight(const Tensor& weight) {
  std::vector<float> values(weight.size(0));
  TILEFUSE_BY_DTYPE(dtype_of(weight), T, {
    const T* data = static_cast<const T*>(weight.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_float(data[i]);
  })
  return values;
}

inline LatentCall latent_call(const Tensor& kv_a, const std::vector<float>& weight, const Tensor& cos,
                              const Tensor& sin, const OptionalTensor& positions, double eps, bool interleaved) {
  LatentCall call{};
  call.kv_a = kv_a.const_data_ptr();
  call.dtype = dtype_of(kv_a);
  call.kv_stride = stride_or_zero(kv_a, 0);
  call.tokens = kv_a.size(0);
  call.rank = static_cast<int64_t>(weight.size());
  call.half = (kv_a.size(1) - call.rank) / 2;
  call.weight = weight.data();
  call.cos = pointer<const float>(cos);
  call.sin = pointer<const float>(sin);
  call.cos_stride = stride_or_zero(cos, 0);
  call.sin_stride = stride_or_zero(sin, 0);
  call.positions = index_of(positions);
  call.eps = static_cast<float>(eps);
  call.interleaved = interleaved;
  return call;
}

// rows worth waking another thread for
constexpr int64_t kLatentGrain = 32;

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
