// The CUDA kernels of qk_norm_rope on the CPU.
#include "emulation/binding.h"

#include <vector>

#include "rope/qk_norm_rope.cuh"

using namespace tilefuse;

namespace {

// address, batch, sequence and head stride, heads
using Rows = std::vector<int64_t>;

const void* set_rows(int64_t* strides, const Rows& rows) {
  for (int i = 0; i < 3; ++i) strides[i] = rows[1 + i];
  return reinterpret_cast<const void*>(rows[0]);
}

// tensors: q, its output, k, its output; douts: of q and k, or empty; place: address, wide?, three strides (positions)
// or the count (bounds), after a 0 for none, 1 for positions or 2 for bounds
void run(int dtype, const std::vector<Rows>& tensors, const std::vector<Rows>& douts, const std::vector<int64_t>& sizes,
         const Rows& cos, const Rows& sin, const Rows& place, const std::vector<uintptr_t>& weights, int weight_dtype,
         float eps, float weight_offset, bool interleaved, uintptr_t partial, const std::vector<uintptr_t>& dweights) {
  QkNormRopeCall p{};
  RopeCall& r = p.rope;
  for (int which = 0; which < 2; ++which) {
    RopeTensor& x = r.tensors[which];
    x.in = set_rows(x.in_strides, tensors[2 * which]);
    x.out = const_cast<void*>(set_rows(x.out_strides, tensors[2 * which + 1]));
    x.heads = static_cast<int>(tensors[2 * which][4]);
    p.weight[which] = emulation::pointer<const void>(weights[which]);
    if (!douts.empty()) p.dout[which] = set_rows(p.dout_strides[which], douts[which]);
  }
  r.tokens = sizes[0];
  r.seq_len = sizes[1];
  r.table_rows = sizes[2];
  r.dim = static_cast<int>(sizes[3]);
  r.half = static_cast<int>(sizes[4]);
  r.offset = static_cast<int>(sizes[5]);
  r.cos = emulation::pointer<const float>(cos[0]);
  r.sin = emulation::pointer<const float>(sin[0]);
  r.cos_stride = cos[1];
  r.sin_stride = sin[1];
  if (place[0] == 1) {
    r.positions = {emulation::pointer<const void>(place[1]), place[2] != 0};
    for (int i = 0; i < 3; ++i) r.position_strides[i] = place[3 + i];
  } else if (place[0] == 2) {
    r.bounds = {emulation::pointer<const void>(place[1]), place[2] != 0};
    r.num_bounds = static_cast<int>(place[3]);
  }
  r.interleaved = interleaved;
  r.conjugate = !douts.empty();
  r.copy = true;
  p.weight_dtype = static_cast<Dtype>(weight_dtype);
  p.weight_offset = weight_offset;
  p.eps = eps;
  p.partial = douts.empty() ? nullptr : emulation::pointer<float>(partial);
  const int64_t rows = r.tokens * (r.tensors[0].heads + r.tensors[1].heads);
  p.rows_per_block = norm_rows_per_block(rows);
  const auto launch = [&](auto kernel, int64_t blocks, int shared) {
    emulation::launch(dim3(static_cast<unsigned>(blocks)), dim3(kNormThreads), shared, [&] { kernel(p); });
  };
  if (rows > 0) {
    if (dtype == 0) norm_rope_launch<float>(p, launch);
    if (dtype == 1) norm_rope_launch<bf16>(p, launch);
    if (dtype == 2) norm_rope_launch<f16>(p, launch);
  }
  if (douts.empty()) return;
  const int blocks = rows > 0 ? static_cast<int>(ceil_div(rows, p.rows_per_block)) : 0;
  const auto sum = [&](auto type) {
    using W = decltype(type);
    emulation::launch(dim3(ceil_div(2 * r.dim, kNormThreads)), dim3(kNormThreads), 0, [&] {
      qk_norm_rope_weight_kernel<W>(p.partial, blocks, r.dim, emulation::pointer<W>(dweights[0]),
                                    emulation::pointer<W>(dweights[1]));
    });
  };
  if (weight_dtype == 0) sum(float{});
  if (weight_dtype == 1) sum(bf16{});
  if (weight_dtype == 2) sum(f16{});
}

}  // namespace

TILEFUSE_EMULATION(m) {
  m.def("run", &run);
  m.def("blocks", [](int64_t rows) { return rows > 0 ? ceil_div(rows, norm_rows_per_block(rows)) : 0; });
}
