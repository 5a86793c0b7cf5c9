// What tests ask of the memory that kernels allocate: see tilefuse.testing.poisoned.
#ifdef TILEFUSE_REGISTER

#include "common/host.h"

extern "C" __attribute__((visibility("default"))) bool tilefuse_cpu_fill_memory(bool on) {
  const bool before = tilefuse::fill_memory;
  tilefuse::fill_memory = on;
  return before;
}

#endif  // TILEFUSE_REGISTER
