// The bytes of a row of the paged latent cache in the fp8 layout: `rank` codes, a scale for each group of them, and the
// rotated part in bfloat16. tilefuse/ops/mla/layout.py documents them, and a test compares the two.
#pragma once

#include "common/values.h"

namespace tilefuse {

// codes that share one scale
constexpr int64_t kLatentGroup = 128;

// internal linkage: the copies of a CPU kernel must not be merged
TILEFUSE_HD static constexpr int64_t latent_scale_offset(int64_t rank, int64_t group) { return rank + 4 * group; }

TILEFUSE_HD static constexpr int64_t latent_rope_offset(int64_t rank) {
  return latent_scale_offset(rank, rank / kLatentGroup);
}

TILEFUSE_HD static constexpr int64_t latent_row_bytes(int64_t rank, int64_t rope_dim) {
  return latent_rope_offset(rank) + 2 * rope_dim;
}

TILEFUSE_HD static constexpr int64_t latent_rope_dim(int64_t rank, int64_t row_bytes) {
  return (row_bytes - latent_rope_offset(rank)) / 2;
}

}  // namespace tilefuse
