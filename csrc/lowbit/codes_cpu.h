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
  const auto upper = [](auto a, auto b) { return larger(a, b); };
  const auto lower = [](auto a, auto b) { return smaller(a, b); };
  largest = larger(over_lanes(magnitudes, upper), largest);
  if (largest < kInfiniteBits) {
    if (rule.symmetric) {
      high = bits_to_float(static_cast<uint32_t>(largest));
      return {-high, high};
    }
    return {smaller(over_lanes(lows, lower), low), larger(over_lanes(highs, upper), high)};
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

TILEFUSE_INLINE void pack_nibbles(const uint8_t* codes, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n / 2; ++i) to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (codes[2 * i + 1] << 4));
}

TILEFUSE_INLINE void unpack_nibbles(const uint8_t* from, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n / 2; ++i) {
    codes[2 * i] = from[i] & 15;
    codes[2 * i + 1] = from[i] >> 4;
  }
}

constexpr int64_t kPlane = 32;  // elements of a block of 6-bit codes

// n codes, whole bytes of them, from the start of a block on
static inline void pack_codes(const uint8_t* codes, int64_t n, int32_t bits, uint8_t* to) {
  if (bits == 4) return pack_nibbles(codes, n, to);
  for (int64_t start = 0; start < n; start += kPlane, codes += kPlane, to += kPlane * 3 / 4) {
    const int64_t count = n - start < kPlane ? n - start : kPlane;
    pack_nibbles(codes, count, to);
    uint8_t* pairs = to + count / 2;
    for (int64_t i = 0; i < count / 4; ++i) {
      const uint8_t* c = codes + 4 * i;
      pairs[i] = static_cast<uint8_t>(c[0] >> 4 | c[1] >> 4 << 2 | c[2] >> 4 << 4 | c[3] >> 4 << 6);
    }
  }
}

static inline void unpack_codes(const uint8_t* from, int64_t n, int32_t bits, uint8_t* codes) {
  if (bits == 4) return unpack_nibbles(from, n, codes);
  for (int64_t start = 0; start < n; start += kPlane, codes += kPlane, from += kPlane * 3 / 4) {
    const int64_t count = n - start < kPlane ? n - start : kPlane;
    unpack_nibbles(from, count, codes);
    const uint8_t* pairs = from + count / 2;
    for (int64_t i = 0; i < count; ++i) {
      codes[i] = static_cast<uint8_t>(codes[i] | ((pairs[i / 4] >> (i % 4 * 2)) & 3) << 4);
    }
  }
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
