// Runs a .cuh kernel on the CPU as ordinary C++, for tests; no GPU and no nvcc.
//
// Every CUDA thread of a block is a fibre with its own stack, and one block runs at a time. A fibre gives way only
// where threads wait for each other, so the schedule decides in which order the stretches between two barriers run. A
// correct kernel gives the same result under every schedule (forward, reverse, random); a racy one does not.
//
// What is an error with a message instead of a hang or a wrong number:
//  * a barrier that some threads do not reach, or that threads reach in different places;
//  * a warp operation whose mask lacks the calling lane, or that the lanes of the mask call with different masks or in
//    different operations;
//  * a misaligned vector access, an index past the end of a (shared or local) array, a signed overflow, a division by
//    zero (by the compiler's sanitizers, reported in the fibre);
//  * a write past dynamic shared memory, and a launch that no GPU accepts.
// Shared memory starts as 0xFF bytes (NaN) in every block and locals start as a pattern, so reading what nobody wrote
// shows in the result. A warp shuffle from a lane that does not take part returns NaN bits. `cp.async` copies land when
// they are waited for, not earlier.
//
// Host compilation contracts nothing: a*b+c rounds twice here, where nvcc may emit one fma.
#pragma once

#define TILEFUSE_EMULATED 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __constant__
// all thread-local variables of a test library are shared memory: they are found and poisoned through its symbol table
#define __shared__ thread_local
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)

// set by the scheduler whenever it resumes a fibre
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace tilefuse::emulation {

struct Site {
  const char* file;
  int line;
};
#define TILEFUSE_SITE ::tilefuse::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

enum class Vote : int { sum, conjunction, disjunction };
enum class Warp : int { sync, index, up, down, butterfly, ballot, match };

// runs `thread` once per thread of the grid; throws std::runtime_error on any of the errors above
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread);

// order: "forward", "reverse" or "random" (of threads within a block and of blocks)
void set_schedule(const char* order, uint64_t seed);

// used by the CUDA functions below
void* dynamic_shared();
int barrier(Vote vote, int value, Site site);
uint64_t warp(Warp operation, uint32_t mask, uint64_t value, int argument, int width, Site site);
void atomic_step();
void yield();
unsigned long long ticks();
[[noreturn]] void fail(const char* what, Site site);
void async_copy(void* to, const void* from, int bytes, int valid_bytes);
void async_commit();
void async_wait(int pending);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move 1 to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const void*>(&value), sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace tilefuse::emulation

inline void __syncthreads(TILEFUSE_SITE) { ::tilefuse::emulation::barrier(::tilefuse::emulation::Vote::sum, 0, site); }
inline int __syncthreads_count(int predicate, TILEFUSE_SITE) {
  return ::tilefuse::emulation::barrier(::tilefuse::emulation::Vote::sum, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, TILEFUSE_SITE) {
  return ::tilefuse::emulation::barrier(::tilefuse::emulation::Vote::conjunction, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, TILEFUSE_SITE) {
  return ::tilefuse::emulation::barrier(::tilefuse::emulation::Vote::disjunction, predicate != 0, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { ::tilefuse::emulation::yield(); }
inline long long clock64() { return static_cast<long long>(::tilefuse::emulation::ticks()); }
inline void __trap(TILEFUSE_SITE) { ::tilefuse::emulation::fail("__trap()", site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, TILEFUSE_SITE) {
  ::tilefuse::emulation::warp(::tilefuse::emulation::Warp::sync, mask, 0, 0, 32, site);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return from_bits<T>(warp(Warp::index, mask, to_bits(value), lane, width, site));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return from_bits<T>(warp(Warp::up, mask, to_bits(value), static_cast<int>(delta), width, site));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return from_bits<T>(warp(Warp::down, mask, to_bits(value), static_cast<int>(delta), width, site));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return from_bits<T>(warp(Warp::butterfly, mask, to_bits(value), lanes, width, site));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return static_cast<unsigned>(warp(Warp::ballot, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return warp(Warp::ballot, mask, predicate != 0, 0, 32, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return warp(Warp::ballot, mask, predicate == 0, 0, 32, site) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, TILEFUSE_SITE) {
  using namespace ::tilefuse::emulation;
  return static_cast<unsigned>(warp(Warp::match, mask, to_bits(value), 0, 32, site));
}
// lanes that happen to run together: one at a time here, which is allowed
inline unsigned __activemask() { return 1u << (threadIdx.x & 31u); }

namespace tilefuse::emulation {
template <typename T, typename F>
T warp_reduce(unsigned mask, T value, Site site, F combine) {
  T total{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const T other = from_bits<T>(warp(Warp::index, mask, to_bits(value), lane, 32, site));
    total = first ? other : combine(total, other);
    first = false;
  }
  return total;
}
}  // namespace tilefuse::emulation

#define TILEFUSE_WARP_REDUCE(name, expression)                                                         \
  template <typename T>                                                                                \
  T name(unsigned mask, T value, TILEFUSE_SITE) {                                                      \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "redux works on 32-bit integers");          \
    return ::tilefuse::emulation::warp_reduce(mask, value, site, [](T a, T b) { return expression; }); \
  }
TILEFUSE_WARP_REDUCE(__reduce_add_sync, static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
TILEFUSE_WARP_REDUCE(__reduce_min_sync, b < a ? b : a)
TILEFUSE_WARP_REDUCE(__reduce_max_sync, a < b ? b : a)
TILEFUSE_WARP_REDUCE(__reduce_and_sync, static_cast<T>(a& b))
TILEFUSE_WARP_REDUCE(__reduce_or_sync, static_cast<T>(a | b))
TILEFUSE_WARP_REDUCE(__reduce_xor_sync, static_cast<T>(a ^ b))
#undef TILEFUSE_WARP_REDUCE

// fibres never run at the same time, so plain code is atomic; each is a place where the schedule may switch
#define TILEFUSE_ATOMIC(name, expression)                     \
  template <typename T, typename U>                           \
  T name(T* address, U operand) {                             \
    ::tilefuse::emulation::atomic_step();                     \
    const T old = *address;                                   \
    [[maybe_unused]] const T value = static_cast<T>(operand); \
    *address = static_cast<T>(expression);                    \
    return old;                                               \
  }
namespace tilefuse::emulation {
template <typename T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}
template <typename T>
T wrapping_sub(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(a) - static_cast<U>(b));
}
}  // namespace tilefuse::emulation
TILEFUSE_ATOMIC(atomicAdd, ::tilefuse::emulation::wrapping_add(old, value))
TILEFUSE_ATOMIC(atomicSub, ::tilefuse::emulation::wrapping_sub(old, value))
TILEFUSE_ATOMIC(atomicMax, old < value ? value : old)
TILEFUSE_ATOMIC(atomicMin, value < old ? value : old)
TILEFUSE_ATOMIC(atomicExch, value)
TILEFUSE_ATOMIC(atomicAnd, old& value)
TILEFUSE_ATOMIC(atomicOr, old | value)
TILEFUSE_ATOMIC(atomicXor, old ^ value)
TILEFUSE_ATOMIC(atomicInc, old >= value ? T{0} : old + T{1})
TILEFUSE_ATOMIC(atomicDec, old == T{0} || old > value ? value : old - T{1})
#undef TILEFUSE_ATOMIC
template <typename T, typename U, typename V>
T atomicCAS(T* address, U compare, V value) {
  ::tilefuse::emulation::atomic_step();
  const T old = *address;
  if (old == static_cast<T>(compare)) *address = static_cast<T>(value);
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldca(const T* address) {
  return *address;
}
template <typename T>
T __ldlu(const T* address) {
  return *address;
}
template <typename T>
T __ldcv(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}
template <typename T>
void __stwt(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 0xffu;
    // bit 3 of a selector replicates the byte's sign
    if (pick & 8u) byte = (byte & 0x80u) ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}

// CUDA's overloads of min and max at global scope
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

// bits of floats, conversions with a rounding mode, correctly rounded and fast arithmetic

inline int __float_as_int(float x) { return ::tilefuse::emulation::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return ::tilefuse::emulation::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return ::tilefuse::emulation::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return ::tilefuse::emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return ::tilefuse::emulation::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return ::tilefuse::emulation::bit_cast<double>(x); }

namespace tilefuse::emulation {
// the GPU saturates and turns NaN into zero where C++ has undefined behaviour
template <typename To>
To saturating(double x) {
  if (!(x == x)) return 0;
  if (x <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}
}  // namespace tilefuse::emulation
inline int __float2int_rn(float x) { return ::tilefuse::emulation::saturating<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return ::tilefuse::emulation::saturating<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return ::tilefuse::emulation::saturating<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return ::tilefuse::emulation::saturating<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return ::tilefuse::emulation::saturating<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return ::tilefuse::emulation::saturating<unsigned>(std::trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanf(float x) { return std::tan(x); }
inline void __sincosf(float x, float* sine, float* cosine) {
  *sine = std::sin(x);
  *cosine = std::cos(x);
}
inline float __saturatef(float x) { return x == x ? std::fmin(std::fmax(x, 0.0f), 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float rcbrtf(float x) { return 1.0f / std::cbrt(x); }
inline float sinpif(float x) { return static_cast<float>(std::sin(3.14159265358979323846 * x)); }
inline float cospif(float x) { return static_cast<float>(std::cos(3.14159265358979323846 * x)); }
using std::isfinite;
using std::isinf;
using std::isnan;
