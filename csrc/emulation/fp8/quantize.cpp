// The 1 x 128 quantisation kernels, plain and behind silu_mul, on the CPU.
#include "emulation/binding.h"

#include "fp8/silu_mul_quantize.cuh"

using namespace tilefuse;

namespace {

void run(bool silu, int dtype, uintptr_t x, int64_t row_stride, int64_t rows, int64_t k, uintptr_t codes,
         uintptr_t scales, int64_t pitch, float eps, bool pow2) {
  fp8::QuantizeCall p{};
  p.x = emulation::pointer<const void>(x);
  p.row_stride = row_stride;
  p.rows = rows;
  p.k = k;
  p.codes = emulation::pointer<uint8_t>(codes);
  p.scales = emulation::pointer<float>(scales);
  p.pitch = pitch;
  p.eps = eps;
  p.pow2 = pow2;
  p.vectors = aligned(p.x, row_stride, dtype == 0 ? 4 : 2, 16) && k % fp8::kPerLane == 0;
  const auto launch = [&](auto kernel) {
    emulation::launch(dim3(static_cast<unsigned>(fp8::quantize_grid(rows, k))), dim3(fp8::kQuantizeThreads), 0,
                      [&] { kernel(p); });
  };
  if (dtype == 0) launch(silu ? fp8::silu_mul_quantize_kernel<float> : fp8::quantize_rows_kernel<float>);
  if (dtype == 1) launch(silu ? fp8::silu_mul_quantize_kernel<bf16> : fp8::quantize_rows_kernel<bf16>);
  if (dtype == 2) launch(silu ? fp8::silu_mul_quantize_kernel<f16> : fp8::quantize_rows_kernel<f16>);
}

}  // namespace

TILEFUSE_EMULATION(m) { m.def("run", &run); }
