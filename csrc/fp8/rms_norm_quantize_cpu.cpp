// Residual add, RMSNorm and 1 x 128 quantisation in one pass on the CPU.
#include "fp8/quantize_cpu.h"

namespace tilefuse {

struct RmsNormQuantizeCall {
  // of the normed rows; its x is what comes before the norm
  QuantizeCall quantize;
  Dtype weight_dtype;
  const void* weight;
  // added to x first, or null
  const void* residual;
  int64_t residual_stride;
  float norm_eps;
  // the sum, [M, K]
  void* h;
  // K rounded up to a power of two
  int64_t padded;
};

namespace TILEFUSE_ISA {

namespace {

// sum of values[0 .. n), n a power of two, by halving: the order of additions that every backend follows
inline float tree_sum(float* values, int64_t n) {
  for (n /= 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) values[i] += values[i + n];
  }
  return values[0];
}

// the row's float32 sum in `values`, rounded to h; elements [begin, end)
template <typename T>
inline void add_residual(const T* x, const T* residual, float* values, T* h, int64_t begin, int64_t end) {
  if (residual != nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      values[i] = to_float(x[i]) + to_float(residual[i]);
      h[i] = from_float<T>(values[i]);
    }
  } else {
    for (int64_t i = begin; i < end; ++i) {
      values[i] = to_float(x[i]);
      h[i] = x[i];
    }
  }
}

template <typename T, typename W>
void rms_norm_quantize(const RmsNormQuantizeCall& call, float* scratch, int64_t begin, int64_t end) {
  const QuantizeCall& quantize = call.quantize;
  const T *x = static_cast<const T*>(quantize.x), *residual = static_cast<const T*>(call.residual);
  const W* weight = static_cast<const W*>(call.weight);
  const int64_t x_stride = quantize.row_stride, residual_stride = call.residual_stride;
  const int64_t k = quantize.k, pitch = quantize.pitch, padded = call.padded;
  uint8_t* q = quantize.codes;
  float* scale = quantize.scales;
  T* h = static_cast<T*>(call.h);
  constexpr int64_t kWidth = kRun * kBlock;
  alignas(64) float normed[kWidth], scales[kRun];
  float* values = scratch;
  float* squares = scratch + padded;
  const int64_t quarter = padded / 4;
  for (int64_t i = k; i < padded; ++i) values[i] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const T* other = residual == nullptr ? nullptr : residual + row * residual_stride;
    // in pieces that are still in L1 when their squares are taken; the tree's first two levels need all four quarters
    constexpr int64_t kPiece = 1024;
    for (int64_t start = 0; start < quarter; start += kPiece) {
      const int64_t stop = start + kPiece < quarter ? start + kPiece : quarter;
      for (int64_t part = 0; part < 4; ++part) {
        const int64_t from = part * quarter + start, to = part * quarter + stop;
        add_residual(x + row * x_stride, other, values, h + row * k, from < k ? from : k, to < k ? to : k);
      }
      const float *a = values, *b = values + quarter, *c = b + quarter, *d = c + quarter;
      for (int64_t i = start; i < stop; ++i) squares[i] = (a[i] * a[i] + c[i] * c[i]) + (b[i] * b[i] + d[i] * d[i]);
    }
    const float mean = tree_sum(squares, quarter) / static_cast<float>(k);
    const float factor = 1.0f / std::sqrt(mean + call.norm_eps);
    for (int64_t start = 0; start < k; start += kWidth) {
      const int64_t count = k - start < kWidth ? k - start : kWidth;
      for (int64_t i = 0; i < count; ++i) normed[i] = values[start + i] * factor * to_float(weight[start + i]);
      quantize_run<float>(normed, count, quantize.pow2, quantize.eps, q + row * k + start, scales, nullptr, false);
      float* target = scale + start / kBlock * pitch + row;
      for (int64_t block = 0; block * kBlock < count; ++block) target[block * pitch] = scales[block];
    }
  }
}

}  // namespace

// scratch: two padded rows
void rms_norm_quantize_rows(const RmsNormQuantizeCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.quantize.dtype, T,
                    { TILEFUSE_BY_DTYPE(call.weight_dtype, W, rms_norm_quantize<T, W>(call, scratch, begin, end)); });
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(rms_norm_quantize_rows)

namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight,
                                                     const OptionalTensor& residual, double norm_eps, bool pow2,
                                                     double eps) {
  const int64_t m = x.size(0), k = x.size(1);
  Tensor codes = fp8::empty_codes(x, {m, k}), scales = fp8::empty_row_scale(x, m, fp8::blocks_of(k));
  Tensor h = empty_of(x, {m, k});
  RmsNormQuantizeCall call{};
  call.quantize = quantize_call(x, k, codes, scales, pow2, eps);
  call.weight_dtype = dtype_of(weight);
  call.weight = weight.const_data_ptr();
  call.residual = pointer<const void>(residual);
  call.residual_stride = residual ? stride_or_zero(*residual, 0) : 0;
  call.norm_eps = static_cast<float>(norm_eps);
  call.h = h.mutable_data_ptr();
  call.padded = 128;
  while (call.padded < k) call.padded *= 2;
  run_parallel(rms_norm_quantize_rows, m, fp8::grain(k * 4), call, RangeScratch<float>{2 * call.padded});
  return {codes, scales, h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("rms_norm_quantize_fwd", TORCH_BOX(&rms_norm_quantize)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
