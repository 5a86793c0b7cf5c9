// silu(gate) * up and its 1 x 128 block quantisation on the GPU.
#pragma once

#include "fp8/quantize.cuh"

namespace tilefuse::fp8 {

// p.x holds rows [gate | up], each p.k wide
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads) silu_mul_quantize_kernel(QuantizeCall p) {
  quantize_blocks(p, [&](float (&x)[kPerLane], int64_t row, int64_t first) {
    const T* gate = static_cast<const T*>(p.x) + row * p.row_stride;
    float up[kPerLane];
    load_lane(x, gate, first, p.k, p.vectors);
    load_lane(up, gate + p.k, first, p.k, p.vectors);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = silu_mul(x[i], up[i]);
  });
}

}  // namespace tilefuse::fp8
