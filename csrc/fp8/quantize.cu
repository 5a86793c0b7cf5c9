// Launch and registration of the 1 x 128 quantisation.
#include "fp8/quantize_launch.h"

namespace tilefuse::fp8 {
namespace {

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool pow2, double eps) {
  static const QuantizeKernel kernels[] = {quantize_rows_kernel<float>, quantize_rows_kernel<bf16>,
                                           quantize_rows_kernel<f16>};
  return quantize_launch("fp8_quantize", kernels, x, 1, pow2, eps);
}

}  // namespace
}  // namespace tilefuse::fp8

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("fp8_quantize_rows", TORCH_BOX(&tilefuse::fp8::quantize_rows));
}
