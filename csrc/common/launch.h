// What every .cu file needs around its kernels: stream, device guard, dtype dispatch, launch check. Stable ABI only.
//
//   std::tuple<Tensor, Tensor> rope_fwd(const Tensor& q, ...) {
//     const CudaCall call(q);
//     TILEFUSE_BY_CUDA_DTYPE(dtype_of(q), T, {
//       rope_kernel<T><<<grid, block, 0, call.stream>>>(pointer<const T>(q), ...);
//     });
//     call.check("rope_fwd");
//   }
//   STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) { m.impl("rope_fwd", TORCH_BOX(&rope_fwd)); }
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common/cuda.cuh"
#include "common/host.h"

// weak: the library must load under a torch without CUDA, where nobody calls it
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tilefuse {

// makes a tensor's device current for one call and knows the stream to launch on
class CudaCall {
 public:
  explicit CudaCall(const Tensor& tensor) : CudaCall(static_cast<int32_t>(tensor.get_device_index())) {}
  explicit CudaCall(int32_t device_index)
      : device(device_index), stream(current_stream(device_index)), guard_(device_index) {}

  // reports a launch that the driver refused; kernels run asynchronously, so not what they do
  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "tilefuse.", op, ": CUDA launch failed: ", cudaGetErrorString(error));
  }

  const int32_t device;
  const cudaStream_t stream;

 private:
  static cudaStream_t current_stream(int32_t device_index) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "tilefuse: this torch was built without CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

// properties are read once for each device
inline int device_attribute(int32_t device, cudaDeviceAttr attribute) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, "tilefuse: cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return value;
}

inline int multiprocessors(int32_t device) {
  constexpr int kDevices = 64;
  static int counts[kDevices] = {};
  if (device < 0 || device >= kDevices) return device_attribute(device, cudaDevAttrMultiProcessorCount);
  if (counts[device] == 0) counts[device] = device_attribute(device, cudaDevAttrMultiProcessorCount);
  return counts[device];
}

// blocks of a one-dimensional grid; a grid of zero blocks is an error in CUDA, so callers return early on no work
inline unsigned grid_size(int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "tilefuse: ", blocks, " blocks are more than a grid holds");
  return static_cast<unsigned>(blocks);
}

// lets a kernel use more than 48 KiB of dynamic shared memory
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  STD_TORCH_CHECK(error == cudaSuccess, "tilefuse: ", bytes, " bytes of shared memory: ", cudaGetErrorString(error));
}

}  // namespace tilefuse

// runs `...` with T the device type of a Dtype; use inside namespace tilefuse
#define TILEFUSE_BY_CUDA_DTYPE(dtype, T, ...) \
  do {                                        \
    switch (dtype) {                          \
      case ::tilefuse::Dtype::f32: {          \
        using T = float;                      \
        __VA_ARGS__;                          \
        break;                                \
      }                                       \
      case ::tilefuse::Dtype::bf16: {         \
        using T = ::tilefuse::bf16;           \
        __VA_ARGS__;                          \
        break;                                \
      }                                       \
      case ::tilefuse::Dtype::f16: {          \
        using T = ::tilefuse::f16;            \
        __VA_ARGS__;                          \
        break;                                \
      }                                       \
    }                                         \
  } while (false)
