// Launch and registration of silu_mul_quantize.
#include "fp8/silu_mul_quantize.cuh"

#include "fp8/quantize_launch.h"

namespace tilefuse::fp8 {
namespace {

std::tuple<Tensor, Tensor> silu_mul_quantize(Tensor gate_up, bool pow2, double eps) {
  static const QuantizeKernel kernels[] = {silu_mul_quantize_kernel<float>, silu_mul_quantize_kernel<bf16>,
                                           silu_mul_quantize_kernel<f16>};
  return quantize_launch("silu_mul_quantize", kernels, gate_up, 2, pow2, eps);
}

}  // namespace
}  // namespace tilefuse::fp8

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("silu_mul_quantize_fwd", TORCH_BOX(&tilefuse::fp8::silu_mul_quantize));
}
