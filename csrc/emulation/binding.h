// Included first by every csrc/emulation/<family>/<op>.cpp; tilefuse.testing.emulation builds and loads those.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation/cuda_emulation.h"

namespace tilefuse::emulation {

// the memory of a tensor: bindings take `tensor.data_ptr()` as an integer
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace tilefuse::emulation

// opens the module: `TILEFUSE_EMULATION(m) { m.def("name", [](uintptr_t x, int64_t n) { launch(...); }); }`
#define TILEFUSE_EMULATION(m)                                         \
  static void tilefuse_emulation_bindings(pybind11::module_& m);      \
  PYBIND11_MODULE(TILEFUSE_EMULATION_NAME, module) {                  \
    module.def("set_schedule", &::tilefuse::emulation::set_schedule); \
    tilefuse_emulation_bindings(module);                              \
  }                                                                   \
  static void tilefuse_emulation_bindings([[maybe_unused]] pybind11::module_& m)
