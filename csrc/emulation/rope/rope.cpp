// The rotary embedding's CUDA kernels on the CPU.
#include "emulation/binding.h"

#include <vector>

#include "rope/rope.cuh"

using namespace tilefuse;

namespace {

// address, batch, sequence and head stride, heads
using Rows = std::vector<int64_t>;

void set_rows(const void** data, int64_t* strides, const Rows& rows) {
  *data = reinterpret_cast<const void*>(rows[0]);
  for (int i = 0; i < 3; ++i) strides[i] = rows[1 + i];
}

// tensors: in and out of q, then of k; index: address, wide?, three strides (positions) or the count (bounds)
void run(int dtype, const std::vector<Rows>& tensors, const std::vector<int64_t>& sizes, const Rows& cos,
         const Rows& sin, const Rows& positions, const Rows& bounds, bool interleaved, bool conjugate, bool copy,
         const std::vector<int>& section, bool mrope_interleaved) {
  RopeCall p{};
  for (size_t i = 0; i < tensors.size(); i += 2) {
    RopeTensor& x = p.tensors[i / 2];
    const void* out;
    set_rows(&x.in, x.in_strides, tensors[i]);
    set_rows(&out, x.out_strides, tensors[i + 1]);
    x.out = const_cast<void*>(out);
    x.heads = static_cast<int>(tensors[i][4]);
  }
  p.tokens = sizes[0];
  p.seq_len = sizes[1];
  p.table_rows = sizes[2];
  p.dim = static_cast<int>(sizes[3]);
  p.half = static_cast<int>(sizes[4]);
  p.offset = static_cast<int>(sizes[5]);
  p.cos = emulation::pointer<const float>(cos[0]);
  p.sin = emulation::pointer<const float>(sin[0]);
  p.cos_stride = cos[1];
  p.sin_stride = sin[1];
  if (!positions.empty()) {
    p.positions = {emulation::pointer<const void>(positions[0]), positions[1] != 0};
    for (int i = 0; i < 3; ++i) p.position_strides[i] = positions[2 + i];
  }
  if (!bounds.empty()) {
    p.bounds = {emulation::pointer<const void>(bounds[0]), bounds[1] != 0};
    p.num_bounds = static_cast<int>(bounds[2]);
  }
  p.interleaved = interleaved;
  p.conjugate = conjugate;
  p.copy = copy;
  p.mrope = !section.empty();
  p.mrope_interleaved = mrope_interleaved;
  for (size_t i = 0; i < section.size(); ++i) p.section[i] = section[i];
  const auto launch = [&](auto kernel, int64_t blocks) {
    emulation::launch(dim3(static_cast<unsigned>(blocks)), dim3(kRopeThreads), 0, [&] { kernel(p); });
  };
  if (dtype == 0) rope_launch<float>(p, launch);
  if (dtype == 1) rope_launch<bf16>(p, launch);
  if (dtype == 2) rope_launch<f16>(p, launch);
}

}  // namespace

TILEFUSE_EMULATION(m) { m.def("run", &run); }
