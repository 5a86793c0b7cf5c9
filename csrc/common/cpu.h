// What every CPU kernel needs: dtypes, instruction-set dispatch, the parallel loop.
//
// Each csrc/<family>/<op>_cpu.cpp is compiled once per instruction set, with TILEFUSE_ISA = baseline, avx2, avx512 or
// avx512bf16, and avx512vnni for those that ask. Kernel code lives in `namespace tilefuse::TILEFUSE_ISA` so that the
// copies never share a symbol; everything in this header is static or in that namespace for the same reason. The
// baseline object alone also has TILEFUSE_REGISTER and holds the registration; TILEFUSE_DISPATCH names a kernel there,
// and run_parallel calls the copy for the CPU at hand. Kernels use raw pointers and no inline library code that a
// linker could merge across copies.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/values.h"

#ifndef TILEFUSE_ISA
#define TILEFUSE_ISA baseline
#endif

namespace tilefuse {
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

#include <memory>
#include <stdexcept>

#include "common/host.h"

namespace tilefuse {

// the object that registers is the baseline one
using baseline::bf16;
using baseline::f16;
using baseline::from_float;
using baseline::to_float;

enum class Isa : int { baseline, avx2, avx512, avx512vnni, avx512bf16 };
constexpr int kIsas = 5;

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
    const bool pairs = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    return pairs ? Isa::avx512bf16 : Isa::avx512vnni;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// TILEFUSE_CPU_ISA=baseline|avx2|avx512|avx512vnni|avx512bf16 lowers the choice, for tests and bug reports
inline Isa isa() {
  static const Isa chosen = [] {
    const Isa best = detect_isa();
    const char* asked = std::getenv("TILEFUSE_CPU_ISA");
    const char* names[kIsas] = {"baseline", "avx2", "avx512", "avx512vnni", "avx512bf16"};
    for (int i = 0; asked != nullptr && i <= static_cast<int>(best); ++i) {
      if (std::strcmp(asked, names[i]) == 0) return static_cast<Isa>(i);
    }
    return best;
  }();
  return chosen;
}

// a kernel's copies, in the order of Isa; a call goes to the one for this CPU
template <typename Signature>
struct Kernel;

template <typename... Parameters>
struct Kernel<void(Parameters...)> {
  void (*copies[kIsas])(Parameters...);

  void operator()(Parameters... arguments) const { copies[static_cast<int>(isa())](arguments...); }
};

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

// an argument of run_parallel: room for `count` values, not initialised, that each range has for itself
template <typename T>
struct RangeScratch {
  int64_t count;
};

namespace detail {

template <typename T>
struct Argument {
  const T& value;

  const T& get() const { return value; }
};

template <typename T>
struct Argument<RangeScratch<T>> {
  std::unique_ptr<T[]> room;

  explicit Argument(const RangeScratch<T>& wanted) : room(new T[static_cast<size_t>(wanted.count)]) {}

  T* get() const { return room.get(); }
};

}  // namespace detail

// kernel(arguments..., begin, end) for ranges of [0, n), in parallel
template <typename Signature, typename... Arguments>
inline void run_parallel(const Kernel<Signature>& kernel, int64_t n, int64_t grain, const Arguments&... arguments) {
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    kernel(detail::Argument<Arguments>{arguments}.get()..., begin, end);
  });
}

}  // namespace tilefuse

// TILEFUSE_DISPATCH(name): `name` is the Kernel of the functions `name` that the instruction sets' namespaces hold. Use
// at namespace tilefuse scope, behind the declaration of the function. A source whose first lines say
// `// build-isas: avx512vnni` has a copy for that set, and TILEFUSE_AVX512VNNI; the others' avx512 copies serve for it.
#if defined(__x86_64__)
#if defined(TILEFUSE_AVX512VNNI)
#define TILEFUSE_VNNI_COPY avx512vnni
#else
#define TILEFUSE_VNNI_COPY avx512
#endif
#define TILEFUSE_DISPATCH(name)                    \
  namespace avx2 {                                 \
  decltype(baseline::name) name;                   \
  }                                                \
  namespace avx512 {                               \
  decltype(baseline::name) name;                   \
  }                                                \
  namespace TILEFUSE_VNNI_COPY {                   \
  decltype(baseline::name) name;                   \
  }                                                \
  namespace avx512bf16 {                           \
  decltype(baseline::name) name;                   \
  }                                                \
  constexpr Kernel<decltype(baseline::name)> name{ \
      {baseline::name, avx2::name, avx512::name, TILEFUSE_VNNI_COPY::name, avx512bf16::name}};
#else
#define TILEFUSE_DISPATCH(name) constexpr Kernel<decltype(baseline::name)> name{{baseline::name}};
#endif

#endif  // TILEFUSE_REGISTER
