// Integer codes on the CPU: the groups of a row, their scales, what values round to, and how codes lie in bytes. The
// rule is that of tilefuse/reference/lowbit/quantize.py, to the bit.
#pragma once

#include "common/cpu.h"
#include "common/floats_cpu.h"

namespace tilefuse {

// how rows of `columns` values are quantised, in groups of `group` (at least 1), the last one of what is left
struct CodeRule {
  int32_t bits;
  bool symmetric;
  float eps;
  int64_t columns, group, groups;

  int32_t top() const { return (1 << bits) - 1; }
  float qmax() const { return static_cast<float>((1 << (bits - 1)) - 1); }
  // the code of 0 where none is stored
  int32_t middle() const { return bits == 8 ? 0 : 1 << (bits - 1); }
};

// elements of codes and bytes between which rows are packed: whole blocks of both planes of 6 bits
constexpr int64_t kCodePiece = 1024;

namespace TILEFUSE_ISA {

typedef int32_t FloatInts __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t SignedBytes __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int32_t kInfiniteBits = 0x7f800000;
constexpr float kLargestFloat = 3.4028234663852886e38f;
// 1.5 * 2^23: where it is added the last bit of the sum is worth 1, and the low bits are the nearest integer
constexpr float kToInteger = 12582912.0f;

template <typename V>
TILEFUSE_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
TILEFUSE_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

// the nearest integer to |y| < 2^22, ties to even, never -0; V is float or Floats
template <typename V>
TILEFUSE_INLINE V nearest(V y) {
  return (y + kToInteger) - kToInteger;
}

TILEFUSE_INLINE int32_t magnitude_of(float x) { return static_cast<int32_t>(float_to_bits(x) & 0x7fffffffu); }
TILEFUSE_INLINE FloatInts magnitude_of(Floats x) { return (FloatInts)x & 0x7fffffff; }

// op over all lanes, in halves: an order that is the same on every instruction set
template <typename V, typename F>
TILEFUSE_INLINE auto over_lanes(V x, const F& op) {
  decltype(x[0] + x[0]) lanes[kFloats];
  std::memcpy(lanes, &x, sizeof(x));
  for (int64_t width = kFloats / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] = op(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

#if defined(__AVX512F__)

TILEFUSE_INLINE int32_t largest_lane(FloatInts x) { return _mm512_reduce_max_epi32((__m512i)x); }
TILEFUSE_INLINE float largest_lane(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
TILEFUSE_INLINE float least_lane(Floats x) { return _mm512_reduce_min_ps((__m512)x); }
TILEFUSE_INLINE Bytes low_bytes(FloatInts x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }

#else

template <typename V>
TILEFUSE_INLINE auto largest_lane(V x) {
  return over_lanes(x, [](auto a, auto b) { return larger(a, b); });
}

TILEFUSE_INLINE float least_lane(Floats x) {
  return over_lanes(x, [](float a, float b) { return smaller(a, b); });
}

TILEFUSE_INLINE Bytes low_bytes(FloatInts x) { return __builtin_convertvector(x, Bytes); }

#endif

// the ends of a group's finite values and 0; of magnitudes, -high and high
struct Extremes {
  float low, high;
};

template <typename T>
static inline Extremes extremes_of(const CodeRule& rule, const T* x, int64_t n) {
  FloatInts magnitudes{};
  Floats lows{}, highs{};
  int32_t largest = 0;
  float low = 0.0f, high = 0.0f;
  int64_t i = 0;
  if (rule.symmetric) {
    for (; i + kFloats <= n; i += kFloats) magnitudes = larger(magnitude_of(get(x, i, ManyFloats{})), magnitudes);
    for (; i < n; ++i) largest = larger(magnitude_of(to_float(x[i])), largest);
  } else {
    for (; i + kFloats <= n; i += kFloats) {
      const Floats values = get(x, i, ManyFloats{});
      magnitudes = larger(magnitude_of(values), magnitudes);
      lows = smaller(values, lows);
      highs = larger(values, highs);
    }
    for (; i < n; ++i) {
      const float value = to_float(x[i]);
      largest = larger(magnitude_of(value), largest);
      low = smaller(value, low);
      high = larger(value, high);
    }
  }
  largest = larger(largest_lane(magnitudes), largest);
  if (largest < kInfiniteBits) {
    if (rule.symmetric) {
      high = bits_to_float(static_cast<uint32_t>(largest));
      return {-high, high};
    }
    return {smaller(least_lane(lows), low), larger(largest_lane(highs), high)};
  }
  // again, without NaN and infinities
  low = high = 0.0f;
  for (i = 0; i < n; ++i) {
    const float value = to_float(x[i]), kept = magnitude_of(value) < kInfiniteBits ? value : 0.0f;
    low = smaller(kept, low);
    high = larger(kept, high);
  }
  if (!rule.symmetric) return {low, high};
  high = larger(high, -low);
  return {-high, high};
}

// what a group's scale is made of; past float32's range infinite
TILEFUSE_INLINE float spread_of(const CodeRule& rule, Extremes ends) {
  return rule.symmetric ? ends.high : ends.high - ends.low;
}

struct GroupScale {
  float scale;
  int32_t zero;
};

static inline GroupScale group_scale(const CodeRule& rule, Extremes ends) {
  const float spread = smaller(spread_of(rule, ends), kLargestFloat);
  const float steps = rule.symmetric ? rule.qmax() : static_cast<float>(rule.top());
  const float scale = spread == 0.0f ? 1.0f : larger(spread, rule.eps) / steps;
  if (rule.symmetric) return {scale, rule.middle()};
  return {scale, static_cast<int32_t>(smaller(nearest(-ends.low / scale), steps))};
}

// a group's scale as its values are divided by it; `zero` is a float, since every integer here is exact
struct Coding {
  float scale, zero, limit;
};

template <bool Symmetric>
TILEFUSE_INLINE Coding coding_of(const CodeRule& rule, GroupScale group) {
  return {group.scale, static_cast<float>(group.zero), Symmetric ? rule.qmax() : static_cast<float>(rule.top())};
}

// x / scale, 0 for NaN
template <typename V>
TILEFUSE_INLINE V quotient_of(V x, const Coding& coding) {
  const V y = x / coding.scale;
  return y == y ? y : V{};
}

// the asymmetric code that a quotient rounds to, before it is clamped: past any code alike
template <typename V>
TILEFUSE_INLINE V unclamped_code(V y, const Coding& coding) {
  const V far{};
  return nearest(smaller(larger(y, far - 1024.0f), far + 1024.0f)) + coding.zero;
}

// code - zero of a quotient
template <bool Symmetric, typename V>
TILEFUSE_INLINE V level_of(V y, const Coding& coding) {
  const V none{};
  if constexpr (Symmetric) {
    return nearest(smaller(larger(y, none - coding.limit), none + coding.limit));
  } else {
    return smaller(larger(unclamped_code(y, coding), none), none + coding.limit) - coding.zero;
  }
}

// whether a quotient is outside of what codes stand for
template <bool Symmetric, typename V>
TILEFUSE_INLINE auto is_clamped(V y, const Coding& coding) {
  if constexpr (Symmetric) {
    return (y > coding.limit) | (y < -coding.limit);
  } else {
    const V code = unclamped_code(y, coding);
    return (code > coding.limit) | (code < 0.0f);
  }
}

// f(group, i, n) for the parts of groups inside of [start, stop)
template <typename F>
TILEFUSE_INLINE void over_groups(const CodeRule& rule, int64_t start, int64_t stop, const F& f) {
  int64_t group = start / rule.group;
  for (int64_t i = start; i < stop; ++group) {
    const int64_t end = (group + 1) * rule.group, next = end < stop ? end : stop;
    f(group, i, next - i);
    i = next;
  }
}

// elements that fill whole bytes
TILEFUSE_INLINE int64_t filled(int64_t n, int32_t bits) {
  return bits == 8 ? n : bits == 4 ? (n + 1) / 2 * 2 : (n + 3) / 4 * 4;
}

TILEFUSE_INLINE int64_t bytes_of_codes(int64_t n, int32_t bits) {
  return bits == 8 ? n : bits == 4 ? n / 2 : n / 4 * 3;
}

TILEFUSE_INLINE void pack_nibbles(const uint8_t* __restrict codes, int64_t n, uint8_t* __restrict to) {
  for (int64_t i = 0; i < n / 2; ++i) to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (codes[2 * i + 1] << 4));
}

TILEFUSE_INLINE void unpack_nibbles(const uint8_t* __restrict from, int64_t n, uint8_t* __restrict codes) {
  for (int64_t i = 0; i < n / 2; ++i) {
    codes[2 * i] = from[i] & 15;
    codes[2 * i + 1] = from[i] >> 4;
  }
}

constexpr int64_t kPlane = 32;  // elements of a block of 6-bit codes

// both planes of one block of `count` codes, four of them at a time as one word
TILEFUSE_INLINE void pack_planes(const uint8_t* __restrict codes, int64_t count, uint8_t* __restrict to) {
  pack_nibbles(codes, count, to);
  for (int64_t i = 0; i < count / 4; ++i) {
    uint32_t word;
    std::memcpy(&word, codes + 4 * i, 4);
    word = word >> 4 & 0x03030303u;
    to[count / 2 + i] = static_cast<uint8_t>(word | word >> 6 | word >> 12 | word >> 18);
  }
}

TILEFUSE_INLINE void unpack_planes(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict codes) {
  unpack_nibbles(from, count, codes);
  for (int64_t i = 0; i < count / 4; ++i) {
    const uint32_t pairs = from[count / 2 + i];
    uint32_t word;
    std::memcpy(&word, codes + 4 * i, 4);
    word |= ((pairs | pairs << 6 | pairs << 12 | pairs << 18) & 0x03030303u) << 4;
    std::memcpy(codes + 4 * i, &word, 4);
  }
}

// unpack_planes of a whole block
TILEFUSE_INLINE void unpack_block(const uint8_t* from, uint8_t* codes) {
#if defined(__SSE2__)
  const __m128i nibbles = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(nibbles, low), odd = _mm_and_si128(_mm_srli_epi16(nibbles, 4), low);
  // pairs of bits 4 to 5, each of a quarter of the elements
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 16)), place = _mm_set1_epi8(0x30);
  const __m128i first = _mm_and_si128(_mm_slli_epi16(pairs, 4), place);
  const __m128i second = _mm_and_si128(_mm_slli_epi16(pairs, 2), place);
  const __m128i third = _mm_and_si128(pairs, place), fourth = _mm_and_si128(_mm_srli_epi16(pairs, 2), place);
  const __m128i front = _mm_unpacklo_epi8(first, second), back = _mm_unpacklo_epi8(third, fourth);
  __m128i* to = reinterpret_cast<__m128i*>(codes);
  _mm_storeu_si128(to, _mm_or_si128(_mm_unpacklo_epi8(even, odd), _mm_unpacklo_epi16(front, back)));
  _mm_storeu_si128(to + 1, _mm_or_si128(_mm_unpackhi_epi8(even, odd), _mm_unpackhi_epi16(front, back)));
#else
  unpack_planes(from, kPlane, codes);
#endif
}

// n codes, whole bytes of them, from the start of a block on
static inline void pack_codes(const uint8_t* codes, int64_t n, int32_t bits, uint8_t* to) {
  if (bits == 4) return pack_nibbles(codes, n, to);
  int64_t start = 0;
  for (; start + kPlane <= n; start += kPlane) pack_planes(codes + start, kPlane, to + start / 4 * 3);
  if (start < n) pack_planes(codes + start, n - start, to + start / 4 * 3);
}

static inline void unpack_codes(const uint8_t* from, int64_t n, int32_t bits, uint8_t* codes) {
  if (bits == 4) return unpack_nibbles(from, n, codes);
  int64_t start = 0;
  for (; start + kPlane <= n; start += kPlane) unpack_block(from + start / 4 * 3, codes + start);
  if (start < n) unpack_planes(from + start / 4 * 3, n - start, codes + start);
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include "common/host.h"

namespace tilefuse {

inline CodeRule code_rule(int64_t columns, int64_t bits, int64_t group_size, bool symmetric, double eps) {
  CodeRule rule{};
  rule.bits = static_cast<int32_t>(bits);
  rule.symmetric = symmetric;
  rule.eps = static_cast<float>(eps);
  rule.columns = columns;
  rule.group = group_size > 0 ? group_size : columns > 0 ? columns : 1;
  rule.groups = group_size > 0 ? (columns + group_size - 1) / group_size : 1;
  return rule;
}

// rows of one task of a parallel loop: about 16384 elements
inline int64_t rows_of_task(int64_t columns) { return 1 + 16384 / (columns + 1); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
