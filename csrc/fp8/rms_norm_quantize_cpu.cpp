// Residual add, RMSNorm and 1 x 128 quantisation in one pass on the CPU.
#include "fp8/block_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// sum of values[0 .. n), n a power of two, by halving: the order of additions that every backend follows
static inline float tree_sum(float* values, int64_t n) {
  for (n /= 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) values[i] += values[i + n];
  }
  return values[0];
}

// the row's float32 sum in `values`, rounded to h; elements [begin, end)
template <typename T>
static inline void add_residual(const T* x, const T* residual, float* values, T* h, int64_t begin, int64_t end) {
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
static void rms_norm_quantize(const T* x, int64_t x_stride, const W* weight, const T* residual, int64_t residual_stride,
                              int64_t k, float norm_eps, uint8_t* q, float* scale, int64_t pitch, T* h, bool pow2,
                              float eps, float* scratch, int64_t padded, int64_t begin, int64_t end) {
  constexpr int64_t RUN = kRun * kBlock;
  alignas(64) float normed[RUN], scales[kRun];
  float* values = scratch;
  float* squares = scratch + padded;
  const int64_t quarter = padded / 4;
  for (int64_t i = k; i < padded; ++i) values[i] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const T* other = residual == nullptr ? nullptr : residual + row * residual_stride;
    // in pieces that are still in L1 when their squares are taken; the tree's first two levels need all four quarters
    constexpr int64_t PIECE = 1024;
    for (int64_t start = 0; start < quarter; start += PIECE) {
      const int64_t stop = start + PIECE < quarter ? start + PIECE : quarter;
      for (int64_t part = 0; part < 4; ++part) {
        const int64_t from = part * quarter + start, to = part * quarter + stop;
        add_residual(x + row * x_stride, other, values, h + row * k, from < k ? from : k, to < k ? to : k);
      }
      const float *a = values, *b = values + quarter, *c = b + quarter, *d = c + quarter;
      for (int64_t i = start; i < stop; ++i) squares[i] = (a[i] * a[i] + c[i] * c[i]) + (b[i] * b[i] + d[i] * d[i]);
    }
    const float mean = tree_sum(squares, quarter) / static_cast<float>(k);
    const float factor = 1.0f / std::sqrt(mean + norm_eps);
    for (int64_t start = 0; start < k; start += RUN) {
      const int64_t count = k - start < RUN ? k - start : RUN;
      for (int64_t i = 0; i < count; ++i) normed[i] = values[start + i] * factor * to_float(weight[start + i]);
      quantize_run<float>(normed, count, pow2, eps, q + row * k + start, scales, nullptr, false);
      float* target = scale + start / kBlock * pitch + row;
      for (int64_t block = 0; block * kBlock < count; ++block) target[block * pitch] = scales[block];
    }
  }
}

void rms_norm_quantize_rows(Dtype dtype, Dtype weight_dtype, const void* x, int64_t x_stride, const void* weight,
                            const void* residual, int64_t residual_stride, int64_t k, float norm_eps, uint8_t* q,
                            float* scale, int64_t pitch, void* h, bool pow2, float eps, float* scratch, int64_t padded,
                            int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(dtype, T, {
    TILEFUSE_BY_DTYPE(weight_dtype, W,
                      rms_norm_quantize(static_cast<const T*>(x), x_stride, static_cast<const W*>(weight),
                                        static_cast<const T*>(residual), residual_stride, k, norm_eps, q, scale, pitch,
                                        static_cast<T*>(h), pow2, eps, scratch, padded, begin, end));
  });
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include <memory>
#include <optional>

#include "fp8/host.h"

namespace tilefuse {

TILEFUSE_DISPATCH(rms_norm_quantize_rows, (Dtype, Dtype, const void*, int64_t, const void*, const void*, int64_t, int64_t,
                                           float, uint8_t*, float*, int64_t, void*, bool, float, float*, int64_t,
                                           int64_t, int64_t))

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight,
                                                     const std::optional<Tensor>& residual, double norm_eps, bool pow2,
                                                     double eps) {
  const int64_t m = x.size(0), k = x.size(1);
  Tensor q = fp8::empty_codes(x, {m, k}), scale = fp8::empty_row_scale(x, m, fp8::blocks_of(k));
  Tensor h = torch::stable::new_empty(x, {m, k});
  const Dtype dtype = dtype_of(x), weight_dtype = dtype_of(weight);
  const void* data = x.const_data_ptr();
  const void* weights = weight.const_data_ptr();
  const void* other = residual.has_value() ? residual->const_data_ptr() : nullptr;
  const int64_t x_stride = stride_or_zero(x, 0), other_stride = other != nullptr ? stride_or_zero(*residual, 0) : 0;
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  void* sums = h.mutable_data_ptr();
  int64_t padded = 128;
  while (padded < k) padded *= 2;
  const auto run = rms_norm_quantize_rows_dispatch();
  parallel_for(0, m, fp8::grain(k * 4), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[2 * padded]);
    run(dtype, weight_dtype, data, x_stride, weights, other, other_stride, k, static_cast<float>(norm_eps), codes, scales,
        fp8::pitch_of(m), sums, pow2, static_cast<float>(eps), scratch.get(), padded, begin, end);
  });
  return {q, scale, h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("rms_norm_quantize_fwd", TORCH_BOX(&rms_norm_quantize)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
