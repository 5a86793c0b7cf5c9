// RMSNorm of each head, then rotary embedding, on the CPU; forward and backward.
#include "rope/rope_cpu.h"

namespace tilefuse {

struct QkNormRopeCall {
  RopeCall rope;
  // upstream gradients (backward only), strides as in RopeTensor
  const void* dout[2];
  int64_t dout_strides[2][3];
  // weight + weight_offset, [D]
  const float* weight[2];
  // per chunk of tokens and tensor, [chunks, 2, D]: partial weight gradients (backward only)
  float* partial;
  float eps;
};

// tokens whose weight gradients are summed together; fixed, so that a sum's order never depends on the threads
constexpr int64_t kChunk = 32;

namespace TILEFUSE_ISA {

namespace {

// sixteen running sums: the order is the same with every vector width
inline float fold(const float* sums) {
  float folded[8];
  for (int i = 0; i < 8; ++i) folded[i] = sums[i] + sums[i + 8];
  return ((folded[0] + folded[4]) + (folded[2] + folded[6])) + ((folded[1] + folded[5]) + (folded[3] + folded[7]));
}

inline float dot(const float* a, const float* b, int64_t n) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i < n; ++i, ++j) sums[j] += a[i] * b[i];
  return fold(sums);
}

template <typename T>
inline void widen(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

// turns the rotary slice of a float row in place
inline void turn(const RopeCall& call, float* row, const float* cos, const float* sin) {
  float* slice = row + call.offset;
  if (call.interleaved) {
    rotate_interleaved(slice, slice, cos, sin, call.half);
  } else {
    rotate_half(slice, slice, call.half, cos, sin, call.half);
  }
}

template <typename T>
void forward_tokens(const QkNormRopeCall& norm, int64_t begin, int64_t end, float* scratch) {
  const RopeCall& call = norm.rope;
  const int64_t dim = call.dim;
  float *row = scratch, *cos_buffer = row + dim, *sin_buffer = cos_buffer + call.half;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / call.seq_len, place = token % call.seq_len;
    const float *cos, *sin;
    token_table(call, token, 0, call.half, cos_buffer, sin_buffer, &cos, &sin);
    for (int which = 0; which < 2; ++which) {
      const RopeTensor& x = call.tensors[which];
      const float* weight = norm.weight[which];
      const T* in = static_cast<const T*>(x.in) + batch * x.in_strides[0] + place * x.in_strides[1];
      T* out = static_cast<T*>(x.out) + batch * x.out_strides[0] + place * x.out_strides[1];
      for (int64_t head = 0; head < x.heads; ++head, in += x.in_strides[2], out += x.out_strides[2]) {
        widen(in, row, dim);
        const float rstd = 1.0f / std::sqrt(dot(row, row, dim) / static_cast<float>(dim) + norm.eps);
        for (int64_t i = 0; i < dim; ++i) row[i] = row[i] * rstd * weight[i];
        turn(call, row, cos, sin);
        for (int64_t i = 0; i < dim; ++i) out[i] = from_float<T>(row[i]);
      }
    }
  }
}

template <typename T>
void backward_tokens(const QkNormRopeCall& norm, int64_t begin, int64_t end, float* scratch) {
  const RopeCall& call = norm.rope;
  const int64_t dim = call.dim;
  float *x_row = scratch, *dx_row = x_row + dim, *cos_buffer = dx_row + dim, *sin_buffer = cos_buffer + call.half;
  float* partial = norm.partial + begin / kChunk * 2 * dim;
  for (int64_t i = 0; i < 2 * dim; ++i) partial[i] = 0.0f;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / call.seq_len, place = token % call.seq_len;
    const float *cos, *sin;
    token_table(call, token, 0, call.half, cos_buffer, sin_buffer, &cos, &sin);
    for (int which = 0; which < 2; ++which) {
      const RopeTensor& x = call.tensors[which];
      const float* weight = norm.weight[which];
      float* dweight = partial + which * dim;
      const int64_t* strides = norm.dout_strides[which];
      const T* in = static_cast<const T*>(x.in) + batch * x.in_strides[0] + place * x.in_strides[1];
      const T* dout = static_cast<const T*>(norm.dout[which]) + batch * strides[0] + place * strides[1];
      T* out = static_cast<T*>(x.out) + batch * x.out_strides[0] + place * x.out_strides[1];
      for (int64_t head = 0; head < x.heads;
           ++head, in += x.in_strides[2], dout += strides[2], out += x.out_strides[2]) {
        widen(in, x_row, dim);
        widen(dout, dx_row, dim);
        turn(call, dx_row, cos, sin);
        const float rstd = 1.0f / std::sqrt(dot(x_row, x_row, dim) / static_cast<float>(dim) + norm.eps);
        for (int64_t i = 0; i < dim; ++i) {
          x_row[i] *= rstd;
          dweight[i] += dx_row[i] * x_row[i];
          dx_row[i] *= weight[i];
        }
        const float mean = dot(dx_row, x_row, dim) / static_cast<float>(dim);
        for (int64_t i = 0; i < dim; ++i) out[i] = from_float<T>(rstd * (dx_row[i] - x_row[i] * mean));
      }
    }
  }
}

}  // namespace

// scratch: two rows and one of the table
void qk_norm_rope_chunks(const QkNormRopeCall& norm, bool backward, float* scratch, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk, next = first + kChunk;
    const int64_t last = next < norm.rope.tokens ? next : norm.rope.tokens;
    TILEFUSE_BY_DTYPE(norm.rope.dtype, T, {
      if (backward) {
        backward_tokens<T>(norm, first, last, scratch);
      } else {
        forward_tokens<T>(norm, first, last, scratch);
      }
    })
  }
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(qk_norm_rope_chunks)

namespace {

std::vector<float> offset_weight(const Tensor& weight, double offset) {
  std::vector<float> out(weight.size(0));
  TILEFUSE_BY_DTYPE(dtype_of(weight), T, {
    const T* data = static_cast<const T*>(weight.const_data_ptr());
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = to_float(data[i]) + static_cast<float>(offset);
    }
  })
  return out;
}

Tensor dweight(const std::vector<float>& partial, int which, int64_t dim, const Tensor& weight) {
  std::vector<double> total(dim, 0.0);
  for (size_t start = which * dim; start < partial.size(); start += 2 * dim) {
    for (int64_t i = 0; i < dim; ++i) total[i] += partial[start + i];
  }
  Tensor out = empty_contiguous(weight);
  TILEFUSE_BY_DTYPE(dtype_of(weight), T, {
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < dim; ++i) data[i] = from_float<T>(static_cast<float>(total[i]));
  })
  return out;
}

struct NormRope {
  Tensor q_out, k_out;
  std::vector<float> partial;
};

NormRope run(const Tensor* dq_out, const Tensor* dk_out, const Tensor& q, const Tensor& k, const Tensor& q_weight,
             const Tensor& k_weight, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
             const OptionalTensor& cu_seqlens, double eps, double weight_offset, bool interleaved,
             int64_t rotary_offset) {
  const bool backward = dq_out != nullptr;
  NormRope result{empty_contiguous(q), empty_contiguous(k), {}};
  QkNormRopeCall call{};
  call.rope = rope_call(q, &k, result.q_out, &result.k_out, cos, sin, positions, cu_seqlens, interleaved, rotary_offset,
                        backward, true, {}, false);
  const RopeRows rows("qk_norm_rope", call.rope);
  const std::vector<float> weights[2] = {offset_weight(q_weight, weight_offset),
                                         offset_weight(k_weight, weight_offset)};
  const int64_t dim = call.rope.dim, chunks = (call.rope.tokens + kChunk - 1) / kChunk;
  for (int which = 0; which < 2; ++which) {
    call.weight[which] = weights[which].data();
    if (backward) {
      const Tensor& dout = which == 0 ? *dq_out : *dk_out;
      call.dout[which] = dout.const_data_ptr();
      set_strides(call.dout_strides[which], dout);
    }
  }
  if (backward) {
    result.partial.resize(chunks * 2 * dim);
    call.partial = result.partial.data();
  }
  call.eps = static_cast<float>(eps);
  run_parallel(qk_norm_rope_chunks, chunks, 1 + 32768 / (kChunk * (1 + heads_of(call.rope) * dim)), call, backward,
               RangeScratch<float>{2 * dim + 2 * call.rope.half});
  return result;
}

std::tuple<Tensor, Tensor> qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos,
                                            Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens, double eps,
                                            double weight_offset, bool interleaved, int64_t rotary_offset) {
  NormRope out = run(nullptr, nullptr, q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, weight_offset,
                     interleaved, rotary_offset);
  return {out.q_out, out.k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k,
                                                            Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
                                                            OptionalTensor positions, OptionalTensor cu_seqlens,
                                                            double eps, double weight_offset, bool interleaved,
                                                            int64_t rotary_offset) {
  NormRope out = run(&dq_out, &dk_out, q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, weight_offset,
                     interleaved, rotary_offset);
  const int64_t dim = q.size(q.dim() - 1);
  return {out.q_out, out.k_out, dweight(out.partial, 0, dim, q_weight), dweight(out.partial, 1, dim, k_weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
