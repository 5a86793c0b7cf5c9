// What the two launchers of 1 x 128 quantisation share: outputs, alignment, dtype.
#pragma once

#include "common/launch.h"
#include "fp8/host.h"
#include "fp8/quantize.cuh"

namespace tilefuse::fp8 {

using QuantizeKernel = void (*)(QuantizeCall);

// `parts` rows of k elements lie side by side in each row of x (gate and up); one kernel per dtype, in Dtype's order
inline std::tuple<Tensor, Tensor> quantize_launch(const char* op, const QuantizeKernel (&kernels)[3], const Tensor& x,
                                                  int64_t parts, bool pow2, double eps) {
  const int64_t m = x.size(0), k = x.size(1) / parts;
  Tensor codes = empty_codes(x, {m, k}), scales = empty_row_scale(x, m, blocks_of(k));
  if (m == 0 || k == 0) return {codes, scales};
  const int element = static_cast<int>(x.element_size());
  QuantizeCall p{};
  p.x = x.const_data_ptr();
  p.row_stride = stride_or_zero(x, 0);
  p.rows = m;
  p.k = k;
  p.codes = pointer<uint8_t>(codes);
  p.scales = pointer<float>(scales);
  p.pitch = pitch_of(m);
  p.eps = static_cast<float>(eps);
  p.pow2 = pow2;
  p.vectors = aligned(p.x, p.row_stride, element, 16) && k % kPerLane == 0;
  const CudaCall call(x);
  const QuantizeKernel kernel = kernels[static_cast<int>(dtype_of(x))];
  kernel<<<grid_size(quantize_grid(m, k), 1), kQuantizeThreads, 0, call.stream>>>(p);
  call.check(op);
  return {codes, scales};
}

}  // namespace tilefuse::fp8
