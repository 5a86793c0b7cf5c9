// What host code needs of tensors, on CPU and CUDA alike. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/values.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tilefuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "tilefuse: unsupported dtype");
  }
  return Dtype::f32;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

// null where there is no tensor
template <typename T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

inline Index index_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long};
}

inline Index index_of(const OptionalTensor& tensor) { return tensor ? index_of(*tensor) : Index{}; }

// strides of dims of size 1 never matter, and must not cost the wide accesses
inline int64_t stride_or_zero(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) <= 1 ? 0 : tensor.stride(dim);
}

// Fresh memory of a large buffer costs more in page faults than the kernel does; huge pages cut their number by 512.
inline void prefer_huge_pages([[maybe_unused]] const void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = 2 << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (data + kHuge - 1) / kHuge * kHuge, last = (data + bytes) / kHuge * kHuge;
  // a hint: where it is refused the small pages do
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// For memory of the CPU only: the driver's ranges are none of the kernel's business.
inline void prefer_huge_pages(const Tensor& tensor) {
  if (!tensor.is_cpu()) return;
  prefer_huge_pages(tensor.const_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
}

// whether new memory of the CPU is filled with bytes that are NaN in every float and -1 in integers, for tests
inline bool fill_memory = false;

inline void fill(const Tensor& tensor) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
}

// on the device of `like`, without the cost of a dispatcher call
inline Tensor empty_strided(const Tensor& like, int32_t dtype, int64_t dims, const int64_t* sizes,
                            const int64_t* strides) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  Tensor out(handle);
  if (fill_memory && out.is_cpu()) fill(out);
  return out;
}

// contiguous, on the device of `like` and of its dtype if none is given
inline Tensor empty_of(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  int64_t strides[8];
  STD_TORCH_CHECK(sizes.size() <= 8, "tilefuse: a tensor of more than 8 dims");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t number = 0;
  if (dtype) {
    number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &number));
  }
  return empty_strided(like, number, static_cast<int64_t>(sizes.size()), sizes.data(), strides);
}

// contiguous, of the shape, the dtype and on the device of `like`
inline Tensor empty_contiguous(const Tensor& like) {
  Tensor out = empty_of(like, like.sizes());
  prefer_huge_pages(out);
  return out;
}

}  // namespace tilefuse
