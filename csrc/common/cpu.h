// What every CPU kernel needs: dtypes, instruction-set dispatch, the parallel loop.
//
// Each csrc/<family>/<op>_cpu.cpp is compiled once per instruction set, with TILEFUSE_ISA = baseline, avx2,
// avx512 or avx512bf16. Kernel code lives in `namespace tilefuse::TILEFUSE_ISA` so that the copies never share a
// symbol; everything in this header is static or in that namespace for the same reason. The baseline object
// alone also has TILEFUSE_REGISTER and holds the registration, with TILEFUSE_DISPATCH choosing the copy for the
// CPU at hand. Kernels use raw pointers and no inline library code that a linker could merge across copies.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifndef TILEFUSE_ISA
#define TILEFUSE_ISA baseline
#endif

namespace tilefuse {

enum class Dtype : int32_t { f32, bf16, f16 };

namespace TILEFUSE_ISA {

// storage types of the two 16-bit floats, distinct so that templates can tell them apart
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float to_float(float x) { return x; }

static inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

static inline float to_float(f16 x) {
#if defined(__F16C__)
  // vectorises to vcvtph2ps
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // shifts the exponent bias by multiplying with 2^112, which also normalises subnormals exactly
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 5.192296858534828e33f));
#endif
}

template <typename T>
static inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// round to nearest even; NaN keeps its sign and becomes quiet
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

template <>
inline f16 from_float<f16>(float x) {
#if defined(__F16C__)
  const _Float16 half = static_cast<_Float16>(x);
  f16 out;
  std::memcpy(&out.bits, &half, 2);
  return out;
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // adding 0.5 aligns the subnormal's last bit with float32's and rounds to nearest even
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return f16{static_cast<uint16_t>(sign | result)};
#endif
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

// calls `body<T>(...)` with T the storage type of a Dtype; use inside namespace TILEFUSE_ISA
#define TILEFUSE_BY_DTYPE(dtype, T, ...) \
  switch (dtype) {                       \
    case ::tilefuse::Dtype::f32: {       \
      using T = float;                   \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::tilefuse::Dtype::bf16: {      \
      using T = bf16;                    \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::tilefuse::Dtype::f16: {       \
      using T = f16;                     \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
  }

#ifdef TILEFUSE_REGISTER

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace tilefuse {

enum class Isa : int { baseline, avx2, avx512, avx512bf16 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// TILEFUSE_CPU_ISA=baseline|avx2|avx512|avx512bf16 lowers the choice, for tests and bug reports
inline Isa isa() {
  static const Isa chosen = [] {
    const Isa best = detect_isa();
    const char* asked = std::getenv("TILEFUSE_CPU_ISA");
    const char* names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
    for (int i = 0; asked != nullptr && i <= static_cast<int>(best); ++i) {
      if (std::strcmp(asked, names[i]) == 0) return static_cast<Isa>(i);
    }
    return best;
  }();
  return chosen;
}

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::bf16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "tilefuse: unsupported dtype");
  }
  return Dtype::f32;
}

inline int64_t stride_or_zero(const torch::stable::Tensor& t, int64_t dim) { return t.size(dim) <= 1 ? 0 : t.stride(dim); }

// a range shorter than `grain` runs on the calling thread, without touching the pool
template <typename F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  if (end <= begin) return;
  if (end - begin <= grain) {
    body(begin, end);
  } else {
    torch::stable::parallel_for(begin, end, grain, body);
  }
}

}  // namespace tilefuse

// TILEFUSE_DISPATCH(name, arguments): declares `void name arguments` in every instruction set's namespace and
// defines `name##_dispatch()`, which returns the copy for this CPU. Use at namespace tilefuse scope.
#if defined(__x86_64__)
#define TILEFUSE_DISPATCH(name, arguments)                  \
  namespace baseline {                                      \
  void name arguments;                                      \
  }                                                         \
  namespace avx2 {                                          \
  void name arguments;                                      \
  }                                                         \
  namespace avx512 {                                        \
  void name arguments;                                      \
  }                                                         \
  namespace avx512bf16 {                                    \
  void name arguments;                                      \
  }                                                         \
  static auto name##_dispatch() -> void(*) arguments {      \
    static void(*const copies[]) arguments = {              \
        baseline::name, avx2::name, avx512::name, avx512bf16::name}; \
    return copies[static_cast<int>(isa())];                 \
  }
#else
#define TILEFUSE_DISPATCH(name, arguments)             \
  namespace baseline {                                 \
  void name arguments;                                 \
  }                                                    \
  static auto name##_dispatch() -> void(*) arguments { return baseline::name; }
#endif

#endif  // TILEFUSE_REGISTER
