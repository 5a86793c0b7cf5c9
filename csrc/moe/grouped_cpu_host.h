// Host side of the grouped CPU kernels: segments, and PyTorch's matmul where the panels do not apply.
#pragma once

#include "common/panel_matmul.h"

#ifdef TILEFUSE_REGISTER

#include <algorithm>
#include <array>

namespace tilefuse {

// start of each group, clamped to the rows there are
inline std::vector<int64_t> bounds_of(const Tensor& offsets, int64_t rows) {
  std::vector<int64_t> bounds(static_cast<size_t>(offsets.numel()));
  const Index index = index_of(offsets);
  for (size_t e = 0; e < bounds.size(); ++e) {
    bounds[e] = std::min(std::max<int64_t>(index[static_cast<int64_t>(e)], 0), rows);
  }
  return bounds;
}

inline SourceRows rows_of(const Tensor& a, const OptionalTensor& index, int64_t div) {
  return SourceRows{a.const_data_ptr(), a.size(0), stride_or_zero(a, 0), index_of(index), div};
}

// bytes of the rows of `t` outside of [bounds.front(), bounds.back()) become zero
inline void zero_outside(const Tensor& t, const std::vector<int64_t>& bounds) {
  const size_t row = static_cast<size_t>(t.size(1)) * static_cast<size_t>(t.element_size());
  char* data = static_cast<char*>(t.data_ptr());
  const int64_t first = bounds.front(), last = std::max(bounds.front(), bounds.back());
  if (row == 0) return;
  std::memset(data, 0, row * static_cast<size_t>(first));
  std::memset(data + row * static_cast<size_t>(last), 0, row * static_cast<size_t>(t.size(0) - last));
}

inline std::vector<Segment> segments_of(const std::vector<int64_t>& bounds) {
  std::vector<Segment> segments;
  for (size_t e = 0; e + 1 < bounds.size(); ++e) {
    if (bounds[e + 1] > bounds[e]) segments.push_back({static_cast<int64_t>(e), bounds[e], bounds[e + 1]});
  }
  return segments;
}

// whether the panels take this call: float32 and float16 are PyTorch's
inline bool panels_apply(const Tensor& a) { return a.scalar_type() == ScalarType::BFloat16; }

inline Tensor blob(void* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides, ScalarType dtype) {
  return torch::stable::from_blob(data, {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// a view on one expert's matrix, without autograd metadata
inline Tensor matrix_of(const Tensor& b, int64_t e) {
  char* data = static_cast<char*>(b.data_ptr()) + e * b.stride(0) * static_cast<int64_t>(b.element_size());
  return blob(data, {b.size(1), b.size(2)}, {b.stride(1), b.stride(2)}, b.scalar_type());
}

// out = a @ w^T (+ bias), in PyTorch
inline void linear_out(const Tensor& a, const Tensor& w, const OptionalTensor& bias, const Tensor& out) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline void copy_rows(const SourceRows& rows, int64_t begin, int64_t end, size_t row_bytes, size_t stride_bytes,
                      char* to) {
  for (int64_t p = begin; p < end; ++p, to += row_bytes) {
    const int64_t at = source_row(rows, p);
    if (at < 0) {
      std::memset(to, 0, row_bytes);
    } else {
      std::memcpy(to, static_cast<const char*>(rows.data) + static_cast<size_t>(at) * stride_bytes, row_bytes);
    }
  }
}

// calls store(first output row, rows, result tile) for every expert's rows in tiles of a fixed number of rows: a plain
// slice changes float32 bits with its row count. The result tile has dtype `result`, a's or float32.
template <typename Store>
inline void matmul_tiles(const Tensor& a, const SourceRows& rows, const Tensor& b, const std::vector<int64_t>& bounds,
                         const OptionalTensor& bias, ScalarType result, const Store& store) {
  constexpr int64_t kFixedRows = 32;
  const int64_t n = b.size(1), k = b.size(2);
  const bool widen = result != a.scalar_type();
  Tensor tile = empty_of(a, {kFixedRows, k});
  Tensor product = empty_of(a, {kFixedRows, n}, result);
  const size_t row_bytes = static_cast<size_t>(k) * static_cast<size_t>(a.element_size());
  const size_t stride_bytes = static_cast<size_t>(rows.stride) * static_cast<size_t>(a.element_size());
  char* to = static_cast<char*>(tile.data_ptr());
  for (size_t e = 0; e + 1 < bounds.size(); ++e) {
    if (bounds[e + 1] <= bounds[e] || n == 0) continue;
    Tensor matrix = matrix_of(b, static_cast<int64_t>(e));
    if (widen) matrix = torch::stable::to(matrix, result);
    OptionalTensor row_bias;
    if (bias) {
      row_bias = torch::stable::select(*bias, 0, static_cast<int64_t>(e));
      if (widen) row_bias = torch::stable::to(*row_bias, result);
    }
    for (int64_t begin = bounds[e]; begin < bounds[e + 1]; begin += kFixedRows) {
      const int64_t end = std::min(begin + kFixedRows, bounds[e + 1]);
      copy_rows(rows, begin, end, row_bytes, stride_bytes, to);
      std::memset(to + static_cast<size_t>(end - begin) * row_bytes, 0,
                  static_cast<size_t>(kFixedRows - (end - begin)) * row_bytes);
      linear_out(widen ? torch::stable::to(tile, result) : tile, matrix, row_bias, product);
      store(begin, end - begin, product);
    }
  }
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
