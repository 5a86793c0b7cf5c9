// Rows of a matrix product: gathered ones, and runs of them that meet the same weight.
#pragma once

#include "common/values.h"

namespace tilefuse {

// rows that a kernel reads, gathered where there is an index
struct SourceRows {
  const void* data;
  int64_t count, stride;
  Index index;  // without data: row p itself
  int64_t div;
};

// row of the source that row p reads, -1 where its index points outside
static inline int64_t source_row(const SourceRows& rows, int64_t p) {
  int64_t at = p;
  if (rows.index.data != nullptr) {
    at = rows.index[p];
    if (at < 0) return -1;
    if (rows.div != 1) at /= rows.div;
  }
  return at < rows.count ? at : -1;
}

// rows [begin, end) meet the weight of one group
struct Segment {
  int64_t group, begin, end;
};

}  // namespace tilefuse
