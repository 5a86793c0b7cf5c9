// The CUDA kernel of the rotary embedding with the paged cache write, on the CPU.
#include "emulation/binding.h"

#include <vector>

#include "rope/rope_append_kv.cuh"

using namespace tilefuse;

namespace {

// address, then the strides of the first three dims, then the heads
using Rows = std::vector<int64_t>;

void set_strides(int64_t* strides, const Rows& rows) {
  for (int i = 0; i < 3; ++i) strides[i] = rows[1 + i];
}

void run(int dtype, int cache_dtype, const Rows& q, const Rows& out, const Rows& k, const Rows& v,
         const std::vector<Rows>& caches, const std::vector<int64_t>& sizes, const Rows& cos, const Rows& sin,
         const Rows& positions, const Rows& slots, bool interleaved, float k_scale, float v_scale) {
  RopeAppendKvCall a{};
  RopeCall& p = a.rope;
  p.tensors[0].in = emulation::pointer<const void>(q[0]);
  p.tensors[0].out = emulation::pointer<void>(out[0]);
  set_strides(p.tensors[0].in_strides, q);
  set_strides(p.tensors[0].out_strides, out);
  p.tensors[0].heads = static_cast<int>(q[4]);
  p.tensors[1].in = emulation::pointer<const void>(k[0]);
  set_strides(p.tensors[1].in_strides, k);
  p.tensors[1].heads = static_cast<int>(k[4]);
  a.v = emulation::pointer<const void>(v[0]);
  set_strides(a.v_strides, v);
  p.tokens = sizes[0];
  p.seq_len = sizes[1];
  p.table_rows = sizes[2];
  p.dim = static_cast<int>(sizes[3]);
  p.half = static_cast<int>(sizes[4]);
  p.offset = static_cast<int>(sizes[5]);
  a.dim_v = static_cast<int>(sizes[6]);
  a.slot_count = sizes[7];
  a.page_size = sizes[8];
  p.interleaved = interleaved;
  p.copy = true;
  p.cos = emulation::pointer<const float>(cos[0]);
  p.sin = emulation::pointer<const float>(sin[0]);
  p.cos_stride = cos[1];
  p.sin_stride = sin[1];
  p.positions = {emulation::pointer<const void>(positions[0]), positions[1] != 0};
  p.position_strides[1] = positions[2];
  p.position_strides[2] = positions[3];
  a.slots = {emulation::pointer<const void>(slots[0]), slots[1] != 0};
  a.slot_strides[0] = slots[2];
  a.slot_strides[1] = slots[3];
  for (int which = 0; which < 2; ++which) {
    a.cache[which] = emulation::pointer<void>(caches[which][0]);
    set_strides(a.cache_strides[which], caches[which]);
  }
  a.scale[0] = k_scale;
  a.scale[1] = v_scale;
  const auto launch = [&](auto kernel, int64_t blocks) {
    emulation::launch(dim3(static_cast<unsigned>(blocks)), dim3(kRopeThreads), 0, [&] { kernel(a); });
  };
  if (dtype == 0 && cache_dtype == 0) append_launch<float, float>(a, launch);
  if (dtype == 0 && cache_dtype == 3) append_launch<float, cache_e4m3>(a, launch);
  if (dtype == 1 && cache_dtype == 1) append_launch<bf16, bf16>(a, launch);
  if (dtype == 1 && cache_dtype == 2) append_launch<bf16, f16>(a, launch);
  if (dtype == 1 && cache_dtype == 3) append_launch<bf16, cache_e4m3>(a, launch);
}

}  // namespace

TILEFUSE_EMULATION(m) { m.def("run", &run); }
