// The CPU matmul over runs of rows that meet different weights; dense is one run.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace tilefuse::fp8 {

// rows [begin, end) of a meet b[group]
struct Segment {
  int64_t group, begin, end;
};

// out [M, N] from rows of a [M, K], each segment against its own weight of b [G, N, K] or the only one, [N, K]
void matmul_segments(const torch::stable::Tensor& a, const torch::stable::Tensor& a_scale, const torch::stable::Tensor& b,
                     const torch::stable::Tensor& b_scale, const float* bias, const std::vector<Segment>& segments,
                     torch::stable::Tensor& out);

}  // namespace tilefuse::fp8
