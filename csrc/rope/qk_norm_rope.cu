// Launch and registration of qk_norm_rope.
#include "rope/qk_norm_rope.cuh"

#include "common/launch.h"
#include "rope/rope_host.h"

namespace tilefuse {
namespace {

QkNormRopeCall norm_rope_call(const Tensor& q, const Tensor& k, const Tensor& q_out, const Tensor& k_out,
                              const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                              const OptionalTensor& positions, const OptionalTensor& cu_seqlens, double eps,
                              double weight_offset, bool interleaved, int64_t rotary_offset, bool backward) {
  QkNormRopeCall p{};
  p.rope = rope_call(q, &k, q_out, &k_out, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, backward, true,
                     {}, false);
  p.weight[0] = q_weight.const_data_ptr();
  p.weight[1] = k_weight.const_data_ptr();
  p.weight_dtype = dtype_of(q_weight);
  p.weight_offset = static_cast<float>(weight_offset);
  p.eps = static_cast<float>(eps);
  return p;
}

void run(const QkNormRopeCall& p, const CudaCall& call) {
  TILEFUSE_BY_CUDA_DTYPE(p.rope.dtype, T, {
    norm_rope_launch<T>(p, [&](auto kernel, int64_t blocks, int shared) {
      kernel<<<grid_size(blocks, 1), kNormThreads, shared, call.stream>>>(p);
    });
  });
  call.check("qk_norm_rope");
}

std::tuple<Tensor, Tensor> qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos,
                                            Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens, double eps,
                                            double weight_offset, bool interleaved, int64_t rotary_offset) {
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  const QkNormRopeCall p = norm_rope_call(q, k, q_out, k_out, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps,
                                          weight_offset, interleaved, rotary_offset, false);
  if (p.rope.tokens > 0 && heads_of(p.rope) > 0) run(p, CudaCall(q));
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k,
                                                            Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
                                                            OptionalTensor positions, OptionalTensor cu_seqlens,
                                                            double eps, double weight_offset, bool interleaved,
                                                            int64_t rotary_offset) {
  const int64_t dim = q.size(q.dim() - 1);
  Tensor dq = empty_contiguous(q), dk = empty_contiguous(k);
  Tensor dq_weight = empty_of(q_weight, {dim}), dk_weight = empty_of(k_weight, {dim});
  QkNormRopeCall p = norm_rope_call(q, k, dq, dk, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps,
                                    weight_offset, interleaved, rotary_offset, true);
  const int64_t rows = p.rope.tokens * heads_of(p.rope);
  p.rows_per_block = norm_rows_per_block(rows);
  const int64_t blocks = rows > 0 ? ceil_div(rows, p.rows_per_block) : 0;
  Tensor partial = empty_of(q, {blocks, 2, dim}, ScalarType::Float);
  p.partial = pointer<float>(partial);
  p.dout[0] = dq_out.const_data_ptr();
  p.dout[1] = dk_out.const_data_ptr();
  set_strides(p.dout_strides[0], dq_out);
  set_strides(p.dout_strides[1], dk_out);
  const CudaCall call(q);
  if (blocks > 0) run(p, call);
  TILEFUSE_BY_CUDA_DTYPE(p.weight_dtype, W, {
    qk_norm_rope_weight_kernel<W><<<grid_size(2 * dim, kNormThreads), kNormThreads, 0, call.stream>>>(
        pointer<const float>(partial), static_cast<int>(blocks), static_cast<int>(dim), pointer<W>(dq_weight),
        pointer<W>(dk_weight));
  });
  call.check("qk_norm_rope");
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}

}  // namespace tilefuse
