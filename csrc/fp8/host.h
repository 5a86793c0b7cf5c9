// Allocation helpers of the fp8 family's host code: the physical layout of 1 x 128 scales.
#pragma once

#include <initializer_list>

#include "common/host.h"

namespace tilefuse::fp8 {

inline int64_t blocks_of(int64_t size) { return (size + 127) / 128; }

// distance of two blocks' scales: rows rounded up to 4, what TMA and cuBLASLt read
inline int64_t pitch_of(int64_t rows) { return rows > 0 ? (rows + 3) / 4 * 4 : 4; }

// rows per task of a parallel loop: about 32768 elements
inline int64_t grain(int64_t elements_per_row) {
  return elements_per_row >= 32768 ? 1 : 32768 / (elements_per_row > 0 ? elements_per_row : 1);
}

// codes that no cache would hold until they are read are stored past the caches
inline bool past_caches(int64_t bytes) { return bytes >= (int64_t{16} << 20); }

inline Tensor empty_codes(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor codes =
      empty_of(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), ScalarType::Float8_e4m3fn);
  prefer_huge_pages(codes);
  return codes;
}

// [rows, blocks] float32 with stride 1 over rows
inline Tensor empty_row_scale(const Tensor& like, int64_t rows, int64_t blocks) {
  const int64_t sizes[] = {rows, blocks}, strides[] = {1, pitch_of(rows)};
  return empty_strided(like, aoti_torch_dtype_float32(), 2, sizes, strides);
}

}  // namespace tilefuse::fp8
