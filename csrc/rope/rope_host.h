// A call of the rope family from tensors, for CPU and CUDA.
#pragma once

#include <stdexcept>

#include "common/host.h"
#include "rope/rope.h"

namespace tilefuse {

// pairs of each axis; absent or empty without mrope
using Section = std::optional<std::vector<int64_t>>;

inline void set_strides(int64_t* strides, const Tensor& t) {
  const bool packed = t.dim() == 3;
  strides[0] = packed ? 0 : stride_or_zero(t, 0);
  strides[1] = stride_or_zero(t, packed ? 0 : 1);
  strides[2] = stride_or_zero(t, packed ? 1 : 2);
}

inline RopeTensor rope_tensor(const Tensor& in, const Tensor& out) {
  RopeTensor tensor{};
  tensor.in = in.const_data_ptr();
  tensor.out = out.mutable_data_ptr();
  set_strides(tensor.in_strides, in);
  set_strides(tensor.out_strides, out);
  tensor.heads = static_cast<int>(in.size(in.dim() - 2));
  return tensor;
}

inline RopeCall rope_call(const Tensor& q, const Tensor* k, const Tensor& q_out, const Tensor* k_out, const Tensor& cos,
                          const Tensor& sin, const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
                          bool interleaved, int64_t rotary_offset, bool conjugate, bool copy, const Section& section,
                          bool mrope_interleaved) {
  const bool mrope = section && !section->empty();
  if (mrope && !positions) throw std::runtime_error("tilefuse.rope: positions must be given with mrope_section");
  RopeCall call{};
  call.tensors[0] = rope_tensor(q, q_out);
  if (k != nullptr) call.tensors[1] = rope_tensor(*k, *k_out);
  const int64_t rank = q.dim();
  call.dtype = dtype_of(q);
  call.seq_len = q.size(rank - 3);
  call.tokens = (rank == 4 ? q.size(0) : 1) * call.seq_len;
  call.table_rows = cos.size(0);
  call.dim = static_cast<int>(q.size(rank - 1));
  call.half = static_cast<int>(cos.size(1));
  call.offset = static_cast<int>(rotary_offset);
  call.cos = pointer<const float>(cos);
  call.sin = pointer<const float>(sin);
  call.cos_stride = cos.stride(0);
  call.sin_stride = sin.stride(0);
  if (positions) {
    call.positions = index_of(*positions);
    const int64_t lead = mrope ? 1 : 0;
    if (lead != 0) call.position_strides[0] = positions->stride(0);
    if (rank == 4) call.position_strides[1] = positions->stride(lead);
    call.position_strides[2] = positions->stride(rank == 4 ? lead + 1 : lead);
  } else if (cu_seqlens) {
    call.bounds = index_of(*cu_seqlens);
    call.num_bounds = static_cast<int>(cu_seqlens->size(0));
  }
  call.interleaved = interleaved;
  call.conjugate = conjugate;
  call.copy = copy;
  call.mrope = mrope;
  call.mrope_interleaved = mrope_interleaved;
  for (size_t i = 0; section && i < section->size() && i < 3; ++i) call.section[i] = static_cast<int>((*section)[i]);
  return call;
}

inline int64_t heads_of(const RopeCall& call) { return int64_t{call.tensors[0].heads} + call.tensors[1].heads; }

}  // namespace tilefuse
