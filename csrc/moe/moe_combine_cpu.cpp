// moe_combine on the CPU: every token sums its own rows, in slot order.
#include "common/cpu.h"

namespace tilefuse {

struct CombineArgs {
  Dtype dtype;
  const void* y;
  int64_t rows, stride, hidden, top_k;
  const void* inverse;
  bool wide;
  const void* weights;  // [T, k] or nullptr: all 1
  bool weights_f32;
};

namespace TILEFUSE_ISA {

constexpr int64_t CHUNK = 256;
constexpr int64_t LANES = 16;

// row of a slot, -1 where it is dropped
static inline int64_t row_of(const CombineArgs& args, int64_t slot) {
  const int64_t at =
      args.wide ? static_cast<const int64_t*>(args.inverse)[slot] : static_cast<const int32_t*>(args.inverse)[slot];
  return at >= 0 && at < args.rows ? at : -1;
}

template <typename T>
static inline float weight_of(const CombineArgs& args, int64_t slot) {
  if (args.weights == nullptr) return 1.0f;
  return args.weights_f32 ? static_cast<const float*>(args.weights)[slot]
                          : to_float(static_cast<const T*>(args.weights)[slot]);
}

void combine_fwd(const CombineArgs& args, void* out, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(args.dtype, T, {
    float sum[CHUNK];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t start = 0; start < args.hidden; start += CHUNK) {
        const int64_t width = args.hidden - start < CHUNK ? args.hidden - start : CHUNK;
        for (int64_t i = 0; i < width; ++i) sum[i] = 0.0f;
        for (int64_t j = 0; j < args.top_k; ++j) {
          const int64_t row = row_of(args, t * args.top_k + j);
          if (row < 0) continue;
          const float w = weight_of<T>(args, t * args.top_k + j);
          const T* y = static_cast<const T*>(args.y) + row * args.stride + start;
          for (int64_t i = 0; i < width; ++i) sum[i] += w * to_float(y[i]);
        }
        T* to = static_cast<T*>(out) + t * args.hidden + start;
        for (int64_t i = 0; i < width; ++i) to[i] = from_float<T>(sum[i]);
      }
    }
  })
}

// dy was zeroed; a slot's row is its own
void combine_bwd(const CombineArgs& args, const void* grad, void* dy, void* dweights, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(args.dtype, T, {
    for (int64_t t = begin; t < end; ++t) {
      const T* g = static_cast<const T*>(grad) + t * args.hidden;
      for (int64_t slot = t * args.top_k; slot < (t + 1) * args.top_k; ++slot) {
        const int64_t row = row_of(args, slot);
        float part[LANES] = {};
        if (row >= 0) {
          const float w = weight_of<T>(args, slot);
          const T* y = static_cast<const T*>(args.y) + row * args.stride;
          T* to = static_cast<T*>(dy) + row * args.hidden;
          for (int64_t start = 0; start < args.hidden; start += LANES) {
            const int64_t stop = start + LANES < args.hidden ? start + LANES : args.hidden;
            for (int64_t i = start; i < stop; ++i) {
              part[i - start] += to_float(g[i]) * to_float(y[i]);
              to[i] = from_float<T>(w * to_float(g[i]));
            }
          }
          for (int64_t width = LANES / 2; width > 0; width /= 2) {
            for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
          }
        }
        if (args.weights_f32) {
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

TILEFUSE_DISPATCH(combine_fwd, (const CombineArgs&, void*, int64_t, int64_t))
TILEFUSE_DISPATCH(combine_bwd, (const CombineArgs&, const void*, void*, void*, int64_t, int64_t))

static CombineArgs combine_args(const Tensor& y, const Tensor& inverse, const std::optional<Tensor>& weights, int64_t top_k) {
  return {dtype_of(y), y.data_ptr(), y.size(0), stride_or_zero(y, 0), y.size(1), top_k, inverse.data_ptr(),
          inverse.scalar_type() == ScalarType::Long, weights ? weights->data_ptr() : nullptr,
          weights && weights->scalar_type() == ScalarType::Float};
}

// tokens per task: about 32768 elements read
static int64_t combine_grain(const CombineArgs& args) { return 1 + 32768 / (args.hidden * args.top_k + 1); }

static Tensor fwd(Tensor y, Tensor inverse, std::optional<Tensor> weights, int64_t top_k) {
  const int64_t tokens = inverse.numel() / top_k;
  Tensor out = torch::stable::new_empty(y, {tokens, y.size(1)});
  const CombineArgs args = combine_args(y, inverse, weights, top_k);
  const auto run = combine_fwd_dispatch();
  parallel_for(0, tokens, combine_grain(args), [&](int64_t begin, int64_t end) { run(args, out.data_ptr(), begin, end); });
  return out;
}

static std::tuple<Tensor, Tensor> bwd(Tensor grad, Tensor y, Tensor inverse, Tensor weights, int64_t top_k) {
  Tensor dy = torch::stable::new_zeros(y, {y.size(0), y.size(1)});
  Tensor dweights = torch::stable::new_empty(weights, {weights.size(0), weights.size(1)});
  const CombineArgs args = combine_args(y, inverse, weights, top_k);
  const auto run = combine_bwd_dispatch();
  parallel_for(0, weights.size(0), combine_grain(args), [&](int64_t begin, int64_t end) {
    run(args, grad.data_ptr(), dy.data_ptr(), dweights.data_ptr(), begin, end);
  });
  return {dy, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_combine_fwd", TORCH_BOX(&fwd));
  m.impl("moe_combine_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
