// Allocation helpers of the fp8 family's host code: the physical layout of 1 x 128 scales.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// fresh memory of many megabytes costs more in page faults than in quantisation: ask for huge pages
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (bytes >= (int64_t{4} << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline torch::stable::Tensor empty_codes(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape) {
  torch::stable::Tensor codes = torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), torch::headeronly::ScalarType::Float8_e4m3fn);
  advise_huge_pages(codes.mutable_data_ptr(), codes.numel());
  return codes;
}

// [rows, blocks] float32 with stride 1 over rows
inline torch::stable::Tensor empty_row_scale(const torch::stable::Tensor& like, int64_t rows, int64_t blocks) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int64_t sizes[] = {rows, blocks}, strides[] = {1, pitch_of(rows)};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(), device_type,
                                                         device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace tilefuse::fp8
