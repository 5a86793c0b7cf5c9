// Reads rows of the paged latent cache in the fp8 layout, on the CPU.
#pragma once

#include "common/cpu.h"
#include "common/fp8.h"
#include "mla/latent_row.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// the `rank` latent values of a row
template <typename T>
static inline void read_latent_codes(const uint8_t* row, int64_t rank, T* to) {
  for (int64_t first = 0; first < rank; first += kLatentGroup) {
    float scale;
    std::memcpy(&scale, row + latent_scale_offset(rank, first / kLatentGroup), 4);
    for (int64_t i = first; i < first + kLatentGroup; ++i) to[i] = from_float<T>(fp8::decode(row[i]) * scale);
  }
}

// the rotated part of a row
static inline const bf16* latent_rope(const uint8_t* row, int64_t rank) {
  return reinterpret_cast<const bf16*>(row + latent_rope_offset(rank));
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
