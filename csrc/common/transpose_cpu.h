// Squares of 32-bit values, transposed in registers.
#pragma once

#include <utility>

#include "common/cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {
namespace {

// where lane l of a row of the first (second) of two blocks comes from when the kSide x kSide blocks off the diagonal
// change places
template <int kSide>
constexpr int exchanged(int l, int lanes, bool second) {
  return (l & kSide) != 0 ? lanes + (second ? l : l - kSide) : second ? l + kSide : l;
}

template <int kSide, typename V, int... kLane>
inline __attribute__((always_inline)) void exchange(V (&v)[sizeof...(kLane)],
                                                    std::integer_sequence<int, kLane...> lanes) {
  constexpr int kCount = sizeof...(kLane);
  const V first = {uint32_t{exchanged<kSide>(kLane, kCount, false)}...};
  const V second = {uint32_t{exchanged<kSide>(kLane, kCount, true)}...};
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if ((i & kSide) != 0) continue;
    const V a = v[i], b = v[i + kSide];
    v[i] = __builtin_shuffle(a, b, first);
    v[i + kSide] = __builtin_shuffle(a, b, second);
  }
  if constexpr (kSide > 1) exchange<kSide / 2>(v, lanes);
}

// v[i][j] becomes v[j][i]; V has as many uint32_t as there are rows
template <typename V, int kCount>
inline __attribute__((always_inline)) void transpose(V (&v)[kCount]) {
  exchange<kCount / 2>(v, std::make_integer_sequence<int, kCount>{});
}

}  // namespace
}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
