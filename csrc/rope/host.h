// A call of the rope family on the GPU as plain values, from tensors.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/launch.h"
#include "rope/rope.cuh"

namespace tilefuse {

// strides of dims of size 1 never matter, and must not cost the wide accesses
inline void set_strides(int64_t* strides, const Tensor& t) {
  const bool packed = t.dim() == 3;
  strides[0] = packed ? 0 : stride_or_zero(t, 0);
  strides[1] = stride_or_zero(t, packed ? 0 : 1);
  strides[2] = stride_or_zero(t, packed ? 1 : 2);
}

inline void set_tensor(RopeTensor& x, const Tensor& in, const Tensor& out) {
  x.in = in.data_ptr();
  x.out = out.data_ptr();
  set_strides(x.in_strides, in);
  set_strides(x.out_strides, out);
  x.heads = static_cast<int>(in.size(in.dim() - 2));
}

// pairs of each axis; absent without mrope
using Section = std::optional<std::vector<int64_t>>;

inline RopeParams rope_params(const Tensor& q, const Tensor* k, const Tensor& q_out, const Tensor* k_out,
                              const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
                              const std::optional<Tensor>& cu_seqlens, int64_t rotary_offset, bool conjugate, bool copy,
                              const Section& section, bool mrope_interleaved) {
  RopeParams p{};
  set_tensor(p.tensors[0], q, q_out);
  if (k != nullptr) set_tensor(p.tensors[1], *k, *k_out);
  const int64_t rank = q.dim();
  p.seq_len = q.size(rank - 3);
  p.tokens = (rank == 4 ? q.size(0) : 1) * p.seq_len;
  p.table_rows = cos.size(0);
  p.dim = static_cast<int>(q.size(rank - 1));
  p.half = static_cast<int>(cos.size(1));
  p.offset = static_cast<int>(rotary_offset);
  p.cos = pointer<const float>(cos);
  p.sin = pointer<const float>(sin);
  p.cos_stride = cos.stride(0);
  p.sin_stride = sin.stride(0);
  if (positions) {
    p.positions = positions->data_ptr();
    p.wide_index = positions->scalar_type() == ScalarType::Long;
    const int64_t lead = section ? 1 : 0;
    if (lead != 0) p.position_strides[0] = positions->stride(0);
    if (rank == 4) p.position_strides[1] = positions->stride(lead);
    p.position_strides[2] = positions->stride(rank == 4 ? lead + 1 : lead);
  } else if (cu_seqlens) {
    p.bounds = cu_seqlens->data_ptr();
    p.wide_index = cu_seqlens->scalar_type() == ScalarType::Long;
    p.num_bounds = static_cast<int>(cu_seqlens->size(0));
  }
  p.conjugate = conjugate;
  p.copy = copy;
  p.mrope = section.has_value();
  p.mrope_interleaved = mrope_interleaved;
  for (size_t i = 0; section && i < section->size() && i < 3; ++i) p.section[i] = static_cast<int>((*section)[i]);
  return p;
}

inline bool has_work(const RopeParams& p) { return p.tokens > 0 && p.tensors[0].heads + p.tensors[1].heads > 0; }

inline Tensor empty_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

}  // namespace tilefuse
