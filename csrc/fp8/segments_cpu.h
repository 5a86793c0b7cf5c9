// The CPU matmul over runs of rows that meet different weights; dense is one run.
#pragma once

#include "common/cpu.h"

namespace tilefuse::fp8 {

// rows [begin, end) of a meet b[group]
struct Segment {
  int64_t group, begin, end;
};

#ifdef TILEFUSE_REGISTER

// out [M, N] from rows of a [M, K], each segment against its own weight of b [G, N, K] or the only one, [N, K]
void matmul_segments(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale, const float* bias,
                     const std::vector<Segment>& segments, Tensor& out);

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse::fp8
