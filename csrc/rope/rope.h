// A call of the rope family in plain values, and the rules of positions that CPU and CUDA share.
#pragma once

#include "common/values.h"

namespace tilefuse {

// one tensor that a call rotates; batch, sequence and head strides in elements
struct RopeTensor {
  const void* in;
  void* out;
  int64_t in_strides[3];
  int64_t out_strides[3];
  int heads;
};

struct RopeCall {
  // q and k; one that is not there has no heads
  RopeTensor tensors[2];
  Dtype dtype;
  int64_t tokens, seq_len, table_rows;
  int dim, half, offset;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
  // strides of axis, batch and sequence; with neither positions nor bounds a token's position is its place
  Index positions;
  int64_t position_strides[3];
  // first tokens of packed sequences
  Index bounds;
  int num_bounds;
  // copy: what is not rotated goes to the output too
  bool interleaved, conjugate, copy, mrope, mrope_interleaved;
  int section[3];
  // CPU: table row of every token (of every axis under mrope), or null: the row is the place in the sequence
  const int64_t* rows;
  // CUDA: heads that one thread walks over; q's groups of heads come before k's
  int heads_per_thread;
};

// axis whose position turns a pair
template <typename I>
TILEFUSE_HD static inline int mrope_axis(const RopeCall& call, I pair) {
  if (call.mrope_interleaved) {
    if (pair % 3 == 1 && pair < 3 * call.section[1]) return 1;
    if (pair % 3 == 2 && pair < 3 * call.section[2]) return 2;
    return 0;
  }
  return (pair >= call.section[0]) + (pair >= call.section[0] + call.section[1]);
}

// place of a packed token behind the last boundary at or before it
TILEFUSE_HD static inline int64_t packed_place(const RopeCall& call, int64_t token) {
  // number of boundaries at or before the token
  int low = 0, high = call.num_bounds;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (call.bounds[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return token - (low > 0 ? call.bounds[low - 1] : 0);
}

}  // namespace tilefuse
