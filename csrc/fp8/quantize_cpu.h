// A call of the CPU quantisers in plain values.
#pragma once

#include "fp8/block_cpu.h"

namespace tilefuse {

struct QuantizeCall {
  Dtype dtype;
  // [G, M, K]; with one group [M, K]
  const void* x;
  int64_t group_stride, row_stride, m, k;
  uint8_t* codes;
  float* scales;
  // elements between two blocks' scales
  int64_t pitch;
  // of the transpose, where both directions are quantised
  uint8_t* codes_t;
  float* scales_t;
  int64_t pitch_t;
  float eps;
  bool pow2;
  // codes are stored past the caches
  bool stream;
};

}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include "fp8/host.h"

namespace tilefuse {

// rows of x [M, K] into 1 x 128 blocks
inline QuantizeCall quantize_call(const Tensor& x, int64_t k, const Tensor& codes, const Tensor& scales, bool pow2,
                                  double eps) {
  QuantizeCall call{};
  call.dtype = dtype_of(x);
  call.x = x.const_data_ptr();
  call.row_stride = stride_or_zero(x, 0);
  call.m = x.size(0);
  call.k = k;
  call.codes = pointer<uint8_t>(codes);
  call.scales = pointer<float>(scales);
  call.pitch = fp8::pitch_of(call.m);
  call.eps = static_cast<float>(eps);
  call.pow2 = pow2;
  return call;
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
