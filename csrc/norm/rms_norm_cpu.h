// What the CPU kernels of the norms share.
#pragma once

#include "common/cpu.h"
#include "common/floats_cpu.h"
#include "common/stream_cpu.h"

namespace tilefuse {

// rows whose weight gradients are summed together; fixed, so that a sum's order never depends on the threads
constexpr int64_t kNormSpan = 32;
// columns whose partial sums are added up together
constexpr int64_t kNormColumns = 512;

// rows of a matrix in elements; no data: no such argument
struct NormRows {
  const void* data;
  int64_t stride;
};

namespace TILEFUSE_ISA {

template <typename T>
static inline const T* norm_row(const NormRows& rows, int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<const T*>(rows.data) + row * rows.stride;
}

// 64 running sums: an order that is the same with every vector width
constexpr int64_t kNormLanes = 64;
// values whose running sums are added to the totals: short sums keep their last places
constexpr int64_t kNormRun = 4096;

// sum of value(i, lanes) over [0, n)
template <typename F>
TILEFUSE_INLINE float sum_lanes(int64_t n, const F& value) {
  constexpr int64_t kVectors = kNormLanes / kFloats;
  float totals[kNormLanes] = {};
  for (int64_t start = 0; start < n; start += kNormRun) {
    const int64_t stop = start + kNormRun < n ? start + kNormRun : n;
    Floats sums[kVectors] = {};
    int64_t i = start;
    for (; i + kNormLanes <= stop; i += kNormLanes) {
      for (int64_t j = 0; j < kVectors; ++j) sums[j] += value(i + j * kFloats, ManyFloats{});
    }
    for (int64_t j = 0; j < kVectors; ++j) put(totals, j * kFloats, get(totals, j * kFloats, ManyFloats{}) + sums[j]);
    for (int64_t j = 0; i + j < stop; ++j) totals[j] += value(i + j, OneFloat{});
  }
  for (int64_t width = kNormLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) totals[j] += totals[j + width];
  }
  return totals[0];
}

// what normed values are multiplied with: first `factor`, a power of two, then `value`
struct Rstd {
  float value, factor;
};

template <typename F>
TILEFUSE_INLINE Rstd rstd_of(int64_t n, float eps, const F& value) {
  const float dim = static_cast<float>(n);
  const float squares = sum_lanes(n, [&](int64_t i, auto lanes) {
    const auto x = value(i, lanes);
    return x * x;
  });
  if (!std::isinf(squares)) return {1.0f / std::sqrt(squares / dim + eps), 1.0f};
  const float factor = 7.888609052210118e-31f;  // 2^-100: with it the squares stay finite
  const float small = sum_lanes(n, [&](int64_t i, auto lanes) {
    const auto x = value(i, lanes) * factor;
    return x * x;
  });
  return {1.0f / std::sqrt(small / dim + eps * factor * factor), factor};
}

// out = the sum over spans of partial [spans, dim], for blocks of kNormColumns columns
void sum_spans(const float* partial, int64_t spans, int64_t dim, Dtype dtype, void* out, int64_t begin, int64_t end);

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(sum_spans)

// weight + offset in float32, [dim]; ones without a weight
inline std::unique_ptr<float[]> norm_weight(const OptionalTensor& weight, double offset, int64_t dim) {
  std::unique_ptr<float[]> out(new float[static_cast<size_t>(dim)]);
  if (!weight) {
    for (int64_t i = 0; i < dim; ++i) out[i] = 1.0f;
    return out;
  }
  TILEFUSE_BY_DTYPE(dtype_of(*weight), T, {
    const T* data = static_cast<const T*>(weight->const_data_ptr());
    for (int64_t i = 0; i < dim; ++i) out[i] = to_float(data[i]) + static_cast<float>(offset);
  })
  return out;
}

inline NormRows norm_rows(const Tensor& x) { return {x.const_data_ptr(), stride_or_zero(x, 0)}; }

inline NormRows norm_rows(const OptionalTensor& x) { return x ? norm_rows(*x) : NormRows{}; }

// partial sums of the weight's gradient, and the gradient that they add up to
struct NormWeightGradient {
  int64_t spans, dim;
  std::unique_ptr<float[]> partial;

  NormWeightGradient(int64_t rows, int64_t columns, bool wanted)
      : spans((rows + kNormSpan - 1) / kNormSpan),
        dim(columns),
        partial(wanted ? new float[static_cast<size_t>(spans * dim)] : nullptr) {
    if (wanted) prefer_huge_pages(partial.get(), spans * dim * static_cast<int64_t>(sizeof(float)));
  }

  // an empty tensor like `x` where none was wanted
  Tensor sum(const OptionalTensor& weight, const Tensor& x) const {
    if (partial == nullptr) return empty_of(weight ? *weight : x, {0});
    Tensor out = empty_contiguous(*weight);
    run_parallel(sum_spans, (dim + kNormColumns - 1) / kNormColumns, 1 + 65536 / (kNormColumns * (spans + 1)),
                 partial.get(), spans, dim, dtype_of(*weight), out.mutable_data_ptr());
    return out;
  }
};

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
