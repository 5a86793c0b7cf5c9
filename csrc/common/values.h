// Plain values that calls are made of, on the host and on both devices. No torch headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TILEFUSE_HD __host__ __device__
#else
#define TILEFUSE_HD
#endif

namespace tilefuse {

enum class Dtype : int32_t { f32, bf16, f16 };

// integers of either width: positions, offsets, page tables, slots
struct Index {
  const void* data;
  bool wide;  // int64

  // always inlined: each CPU kernel is compiled once per instruction set, and the copies must not be merged
  TILEFUSE_HD __attribute__((always_inline)) int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace tilefuse
