// Blocked products of the family's projections on the CPU, on the two products of attention/tiles.h.
#pragma once

#include "attention/tiles.h"
#include "rope/rope.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// columns of the result across the registers, rows of it at a time, and words of depth that are one sum
constexpr int kColumns = 64;
constexpr int64_t kResultRows = 48, kDepth = 64;

// c [count][kColumns] = sum over depth of rows and columns, both packed; part: as large as c. Sums of sums: one sum over
// all of the depth would round too often.
template <typename W>
static void multiply(const W* columns, const W* rows, int64_t row_step, int64_t depth, int64_t count, float* c,
                     float* part) {
  for (int64_t d = 0; d < depth; d += kDepth) {
    const int64_t n = depth - d < kDepth ? depth - d : kDepth;
    product<kColumns, false>(columns + d * kColumns, rows + d, row_step, 1, n, count, d == 0 ? c : part);
    if (d == 0) continue;
    for (int64_t i = 0; i < count * kColumns; ++i) c[i] += part[i];
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
