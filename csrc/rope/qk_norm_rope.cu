// Launch and registration of qk_norm_rope.
#include "rope/qk_norm_rope.cuh"

#include "rope/host.h"

namespace tilefuse {

static NormRopeParams norm_rope_params(const Tensor& q, const Tensor& k, const Tensor& q_out, const Tensor& k_out,
                                       const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos,
                                       const Tensor& sin, const std::optional<Tensor>& positions,
                                       const std::optional<Tensor>& cu_seqlens, double eps, double weight_offset,
                                       int64_t rotary_offset, bool backward) {
  NormRopeParams p{};
  p.rope = rope_params(q, &k, q_out, &k_out, cos, sin, positions, cu_seqlens, rotary_offset, backward, true, {}, false);
  p.weight[0] = q_weight.data_ptr();
  p.weight[1] = k_weight.data_ptr();
  p.weight_dtype = static_cast<int>(dtype_of(q_weight));
  p.weight_offset = static_cast<float>(weight_offset);
  p.eps = static_cast<float>(eps);
  return p;
}

static void run(const Tensor& q, const NormRopeParams& p, bool interleaved, const CudaCall& call) {
  TILEFUSE_BY_CUDA_DTYPE(dtype_of(q), T, {
    norm_rope_launch<T>(p, interleaved, [&](auto kernel, int64_t blocks, int shared) {
      kernel<<<grid_size(blocks, 1), kNormThreads, shared, call.stream>>>(p);
    });
  });
  call.check("qk_norm_rope");
}

static std::tuple<Tensor, Tensor> qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos,
                                                   Tensor sin, std::optional<Tensor> positions,
                                                   std::optional<Tensor> cu_seqlens, double eps, double weight_offset,
                                                   bool interleaved, int64_t rotary_offset) {
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  const NormRopeParams p = norm_rope_params(q, k, q_out, k_out, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps,
                                            weight_offset, rotary_offset, false);
  if (has_work(p.rope)) run(q, p, interleaved, CudaCall(q));
  return {q_out, k_out};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd(
    Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
    std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens, double eps, double weight_offset,
    bool interleaved, int64_t rotary_offset) {
  const int64_t dim = q.size(q.dim() - 1);
  Tensor dq = empty_contiguous(q), dk = empty_contiguous(k);
  Tensor dq_weight = torch::stable::new_empty(q_weight, {dim}), dk_weight = torch::stable::new_empty(k_weight, {dim});
  NormRopeParams p = norm_rope_params(q, k, dq, dk, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps,
                                      weight_offset, rotary_offset, true);
  const int64_t rows = p.rope.tokens * (p.rope.tensors[0].heads + p.rope.tensors[1].heads);
  p.rows_per_block = norm_rows_per_block(rows);
  const int64_t blocks = rows > 0 ? ceil_div(rows, p.rows_per_block) : 0;
  Tensor partial = torch::stable::new_empty(q, {blocks, 2, dim}, ScalarType::Float);
  p.partial = pointer<float>(partial);
  p.grad[0] = q_grad.data_ptr();
  p.grad[1] = k_grad.data_ptr();
  set_strides(p.grad_strides[0], q_grad);
  set_strides(p.grad_strides[1], k_grad);
  const CudaCall call(q);
  if (blocks > 0) run(q, p, interleaved, call);
  TILEFUSE_BY_CUDA_DTYPE(dtype_of(q_weight), W, {
    qk_norm_rope_weight_kernel<W><<<grid_size(2 * dim, kNormThreads), kNormThreads, 0, call.stream>>>(
        pointer<const float>(partial), static_cast<int>(blocks), static_cast<int>(dim), pointer<W>(dq_weight),
        pointer<W>(dk_weight));
  });
  call.check("qk_norm_rope");
  return {dq, dk, dq_weight, dk_weight};
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}

}  // namespace tilefuse
