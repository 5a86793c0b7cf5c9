// silu(gate) * up and its 1 x 128 quantisation in one pass on the CPU.
#include "fp8/block_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

template <typename T>
static void silu_mul_quantize(const T* gate_up, int64_t row_stride, int64_t k, uint8_t* q, float* scale, int64_t pitch,
                              bool pow2, float eps, int64_t begin, int64_t end) {
  constexpr int64_t RUN = kRun * kBlock;
  alignas(64) float values[RUN], scales[kRun];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t start = 0; start < k; start += RUN) {
      const int64_t count = k - start < RUN ? k - start : RUN;
      const T* gate = gate_up + row * row_stride + start;
      const T* up = gate + k;
      for (int64_t i = 0; i < count; ++i) values[i] = fp8::silu_mul(to_float(gate[i]), to_float(up[i]));
      quantize_run<float>(values, count, pow2, eps, q + row * k + start, scales, nullptr, false);
      float* target = scale + start / kBlock * pitch + row;
      for (int64_t block = 0; block * kBlock < count; ++block) target[block * pitch] = scales[block];
    }
  }
}

void silu_mul_quantize_rows(Dtype dtype, const void* gate_up, int64_t row_stride, int64_t k, uint8_t* q, float* scale,
                            int64_t pitch, bool pow2, float eps, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(dtype, T,
                    silu_mul_quantize(static_cast<const T*>(gate_up), row_stride, k, q, scale, pitch, pow2, eps, begin,
                                      end));
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include "fp8/host.h"

namespace tilefuse {

TILEFUSE_DISPATCH(silu_mul_quantize_rows, (Dtype, const void*, int64_t, int64_t, uint8_t*, float*, int64_t, bool, float,
                                           int64_t, int64_t))

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& gate_up, bool pow2, double eps) {
  const int64_t m = gate_up.size(0), k = gate_up.size(1) / 2, row_stride = stride_or_zero(gate_up, 0);
  Tensor q = fp8::empty_codes(gate_up, {m, k}), scale = fp8::empty_row_scale(gate_up, m, fp8::blocks_of(k));
  const Dtype dtype = dtype_of(gate_up);
  const void* data = gate_up.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  const auto run = silu_mul_quantize_rows_dispatch();
  parallel_for(0, m, fp8::grain(k * 4), [&](int64_t begin, int64_t end) {
    run(dtype, data, row_stride, k, codes, scales, fp8::pitch_of(m), pow2, static_cast<float>(eps), begin, end);
  });
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("silu_mul_quantize_fwd", TORCH_BOX(&silu_mul_quantize)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
