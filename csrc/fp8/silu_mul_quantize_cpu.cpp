// silu(gate) * up and its 1 x 128 quantisation in one pass on the CPU.
#include "fp8/quantize_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

namespace {

// call.x holds rows [gate | up], each call.k wide
template <typename T>
void silu_mul_quantize(const QuantizeCall& call, int64_t begin, int64_t end) {
  const T* gate_up = static_cast<const T*>(call.x);
  const int64_t row_stride = call.row_stride, k = call.k, pitch = call.pitch;
  uint8_t* q = call.codes;
  float* scale = call.scales;
  constexpr int64_t kWidth = kRun * kBlock;
  alignas(64) float values[kWidth], scales[kRun];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t start = 0; start < k; start += kWidth) {
      const int64_t count = k - start < kWidth ? k - start : kWidth;
      const T* gate = gate_up + row * row_stride + start;
      const T* up = gate + k;
      for (int64_t i = 0; i < count; ++i) values[i] = fp8::silu_mul(to_float(gate[i]), to_float(up[i]));
      quantize_run<float>(values, count, call.pow2, call.eps, q + row * k + start, scales, nullptr, false);
      float* target = scale + start / kBlock * pitch + row;
      for (int64_t block = 0; block * kBlock < count; ++block) target[block * pitch] = scales[block];
    }
  }
}

}  // namespace

void silu_mul_quantize_rows(const QuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, silu_mul_quantize<T>(call, begin, end));
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(silu_mul_quantize_rows)

namespace {

std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& gate_up, bool pow2, double eps) {
  const int64_t m = gate_up.size(0), k = gate_up.size(1) / 2;
  Tensor codes = fp8::empty_codes(gate_up, {m, k}), scales = fp8::empty_row_scale(gate_up, m, fp8::blocks_of(k));
  run_parallel(silu_mul_quantize_rows, m, fp8::grain(k * 4), quantize_call(gate_up, k, codes, scales, pow2, eps));
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("silu_mul_quantize_fwd", TORCH_BOX(&silu_mul_quantize)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
