// moe_combine on the CPU: every token sums its own rows, in slot order.
#include "common/cpu.h"

namespace tilefuse {

struct MoeCombineCall {
  Dtype dtype;
  const void* y;
  int64_t rows, stride, hidden, top_k;
  Index inverse;
  const void* weights;  // [T, k] or nullptr: all 1
  bool weights_f32;
};

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kLanes = 16;

// row of a slot, -1 where it is dropped
inline int64_t row_of(const MoeCombineCall& call, int64_t slot) {
  const int64_t at = call.inverse[slot];
  return at >= 0 && at < call.rows ? at : -1;
}

template <typename T>
inline float weight_of(const MoeCombineCall& call, int64_t slot) {
  if (call.weights == nullptr) return 1.0f;
  return call.weights_f32 ? static_cast<const float*>(call.weights)[slot]
                          : to_float(static_cast<const T*>(call.weights)[slot]);
}

}  // namespace

void combine_fwd(const MoeCombineCall& call, void* out, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    float sum[kChunk];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t start = 0; start < call.hidden; start += kChunk) {
        const int64_t width = call.hidden - start < kChunk ? call.hidden - start : kChunk;
        for (int64_t i = 0; i < width; ++i) sum[i] = 0.0f;
        for (int64_t j = 0; j < call.top_k; ++j) {
          const int64_t row = row_of(call, t * call.top_k + j);
          if (row < 0) continue;
          const float w = weight_of<T>(call, t * call.top_k + j);
          const T* y = static_cast<const T*>(call.y) + row * call.stride + start;
          for (int64_t i = 0; i < width; ++i) sum[i] += w * to_float(y[i]);
        }
        T* to = static_cast<T*>(out) + t * call.hidden + start;
        for (int64_t i = 0; i < width; ++i) to[i] = from_float<T>(sum[i]);
      }
    }
  })
}

// dy was zeroed; a slot's row is its own
void combine_bwd(const MoeCombineCall& call, const void* dout, void* dy, void* dweights, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    for (int64_t t = begin; t < end; ++t) {
      const T* g = static_cast<const T*>(dout) + t * call.hidden;
      for (int64_t slot = t * call.top_k; slot < (t + 1) * call.top_k; ++slot) {
        const int64_t row = row_of(call, slot);
        float part[kLanes] = {};
        if (row >= 0) {
          const float w = weight_of<T>(call, slot);
          const T* y = static_cast<const T*>(call.y) + row * call.stride;
          T* to = static_cast<T*>(dy) + row * call.hidden;
          for (int64_t start = 0; start < call.hidden; start += kLanes) {
            const int64_t stop = start + kLanes < call.hidden ? start + kLanes : call.hidden;
            for (int64_t i = start; i < stop; ++i) {
              part[i - start] += to_float(g[i]) * to_float(y[i]);
              to[i] = from_float<T>(w * to_float(g[i]));
            }
          }
          for (int64_t width = kLanes / 2; width > 0; width /= 2) {
            for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
          }
        }
        if (call.weights_f32) {
          static_cast<float*>(dweights)[slot] = part[0];
        } else {
          static_cast<T*>(dweights)[slot] = from_float<T>(part[0]);
        }
      }
    }
  })
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(combine_fwd)
TILEFUSE_DISPATCH(combine_bwd)

namespace {

MoeCombineCall combine_call(const Tensor& y, const Tensor& inverse, const OptionalTensor& weights, int64_t top_k) {
  return {dtype_of(y),
          y.data_ptr(),
          y.size(0),
          stride_or_zero(y, 0),
          y.size(1),
          top_k,
          index_of(inverse),
          pointer<const void>(weights),
          weights && weights->scalar_type() == ScalarType::Float};
}

// tokens per task: about 32768 elements read
int64_t combine_grain(const MoeCombineCall& call) { return 1 + 32768 / (call.hidden * call.top_k + 1); }

Tensor fwd(Tensor y, Tensor inverse, OptionalTensor weights, int64_t top_k) {
  const int64_t tokens = inverse.numel() / top_k;
  Tensor out = empty_of(y, {tokens, y.size(1)});
  const MoeCombineCall call = combine_call(y, inverse, weights, top_k);
  run_parallel(combine_fwd, tokens, combine_grain(call), call, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> bwd(Tensor dout, Tensor y, Tensor inverse, Tensor weights, int64_t top_k) {
  Tensor dy = torch::stable::new_zeros(y, {y.size(0), y.size(1)});
  Tensor dweights = empty_of(weights, {weights.size(0), weights.size(1)});
  const MoeCombineCall call = combine_call(y, inverse, weights, top_k);
  run_parallel(combine_bwd, weights.size(0), combine_grain(call), call, dout.const_data_ptr(), dy.mutable_data_ptr(),
               dweights.mutable_data_ptr());
  return {dy, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_combine_fwd", TORCH_BOX(&fwd));
  m.impl("moe_combine_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
