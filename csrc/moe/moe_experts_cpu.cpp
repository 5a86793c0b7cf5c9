// The expert layer's own CPU kernels: up-projection with the activation in its epilogue, and the activation's backward.
#include "common/panel_matmul.h"
#include "moe/activation_cpu.h"

namespace tilefuse {

struct MoeExpertsUpCall {
  Dtype dtype;
  const void* bias;  // [E, 2 I] or nullptr
  void* h;           // [S, I]
  void* z;           // [S, 2 I] or nullptr
  int64_t inner;
  ActivationOptions activation;
};

struct MoeExpertsActBwdCall {
  Dtype dtype;
  const void* z;
  const void* dh;
  const int32_t* order;
  const void* weights;
  bool weights_f32;
  void* dz;
  void* weighted_h;
  void* dweights;
  int64_t inner, kept_begin, kept_end;
  ActivationOptions activation;
};

namespace TILEFUSE_ISA {

namespace {

struct Slopes {
  float h, gate, up;  // the activation and its derivatives
};

inline Slopes slopes_of(float gate, float up, const ActivationOptions& o) {
  if (o.kind == Activation::gelu_erf) {
    const float cdf = 0.5f * (1.0f + std::erf(gate * 0.7071067811865476f));
    const float density = 0.3989422804014327f * std::exp(-0.5f * gate * gate);
    return {gate * cdf * up, up * (cdf + gate * density), gate * cdf};
  }
  if (o.kind == Activation::gelu) {
    const float square = gate * gate;
    const float s = sigmoid_f32(1.5957691216057308f * (gate + 0.044715f * square * gate));
    const float slope = 1.5957691216057308f * (1.0f + 0.134145f * square);
    const float g = gate * s;
    return {g * up, up * (s + g * (1.0f - s) * slope), g};
  }
  float gate_passes = 1.0f, up_passes = 1.0f;
  if (o.limit > 0.0f) {
    gate_passes = gate > o.limit ? 0.0f : 1.0f;
    up_passes = up > o.limit || up < -o.limit ? 0.0f : 1.0f;
    clamp_to_limit(o.limit, gate, up);
  }
  if (o.kind != Activation::swiglu_oai) {
    const float s = sigmoid_f32(gate);
    const float silu = gate * s;
    return {silu * up, gate_passes * up * (s + silu * (1.0f - s)), up_passes * silu};
  }
  const float s = sigmoid_f32(o.alpha * gate);
  const float g = gate * s;
  return {g * (up + 1.0f), gate_passes * (up + 1.0f) * (s + o.alpha * g * (1.0f - s)), up_passes * g};
}

// a row of panels [64] of gates and ups: plus bias, to z, through the activation to h
template <typename T>
inline void finish_row(const MoeExpertsUpCall& call, int64_t expert, int64_t row, int64_t n, int64_t columns,
                       float* gate, float* up) {
  const int64_t inner = call.inner;
  if (call.bias != nullptr) {
    const T* bias = static_cast<const T*>(call.bias) + expert * 2 * inner + n;
    for (int64_t c = 0; c < columns; ++c) gate[c] += to_float(bias[c]);
    for (int64_t c = 0; c < columns; ++c) up[c] += to_float(bias[inner + c]);
  }
  if (call.z != nullptr) {
    T* z = static_cast<T*>(call.z) + row * 2 * inner + n;
    for (int64_t c = 0; c < columns; ++c) z[c] = from_float<T>(gate[c]);
    for (int64_t c = 0; c < columns; ++c) z[inner + c] = from_float<T>(up[c]);
  }
  activate_row(gate, up, columns, call.activation, static_cast<T*>(call.h) + row * inner + n);
}

}  // namespace

// the work of `product` from begin to end, gates and ups of the same columns together; c: two panels of a part's rows
void experts_up_panels(const PanelProduct& product, const MoeExpertsUpCall& call, float* c, int64_t begin,
                       int64_t end) {
  const int64_t inner = call.inner;
  float* ups = c + kPartRows * kPanelWidth;
  for_items(product, begin, end, [&](const Segment& part, int64_t item) {
    const int64_t n = item * kPanelWidth, columns = inner - n < kPanelWidth ? inner - n : kPanelWidth;
    panel_products(product, part, n, inner + n, c, ups);
    TILEFUSE_BY_DTYPE(call.dtype, T, {
      for (int64_t row = part.begin, at = 0; row < part.end; ++row, at += kPanelWidth) {
        finish_row<T>(call, part.group, row, n, columns, c + at, ups + at);
      }
    })
  });
}

// h [rows, I] from z [rows, 2 I]
void experts_activate(Dtype dtype, const void* z, void* h, int64_t rows, int64_t inner, const ActivationOptions& o) {
  TILEFUSE_BY_DTYPE(dtype, T, {
    for (int64_t r = 0; r < rows; ++r) {
      const T* gate = static_cast<const T*>(z) + r * 2 * inner;
      T* out = static_cast<T*>(h) + r * inner;
      activate_row(gate, gate + inner, inner, o, out);
    }
  })
}

void experts_act_bwd(const MoeExpertsActBwdCall& call, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = 16;
  const int64_t inner = call.inner;
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    for (int64_t row = begin; row < end; ++row) {
      const T* z = static_cast<const T*>(call.z) + row * 2 * inner;
      const T* dh = static_cast<const T*>(call.dh) + row * inner;
      T* dz = static_cast<T*>(call.dz) + row * 2 * inner;
      T* weighted = static_cast<T*>(call.weighted_h) + row * inner;
      const int64_t slot = call.order[row];
      float sum = 0.0f;
      if (row >= call.kept_begin && row < call.kept_end) {
        const float w = call.weights_f32 ? static_cast<const float*>(call.weights)[slot]
                                         : to_float(static_cast<const T*>(call.weights)[slot]);
        float part[kLanes] = {};
        for (int64_t start = 0; start < inner; start += kLanes) {
          const int64_t stop = start + kLanes < inner ? start + kLanes : inner;
          for (int64_t i = start; i < stop; ++i) {
            const Slopes s = slopes_of(to_float(z[i]), to_float(z[inner + i]), call.activation);
            const float d = to_float(dh[i]);
            part[i - start] += s.h * d;
            dz[i] = from_float<T>(s.gate * d * w);
            dz[inner + i] = from_float<T>(s.up * d * w);
            weighted[i] = from_float<T>(s.h * w);
          }
        }
        for (int64_t width = kLanes / 2; width > 0; width /= 2) {
          for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
        }
        sum = part[0];
      } else {
        std::memset(dz, 0, sizeof(T) * 2 * inner);
        std::memset(weighted, 0, sizeof(T) * inner);
      }
      if (call.weights_f32) {
        static_cast<float*>(call.dweights)[slot] = sum;
      } else {
        static_cast<T*>(call.dweights)[slot] = from_float<T>(sum);
      }
    }
  })
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#include "moe/grouped_cpu_host.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(experts_up_panels)
TILEFUSE_DISPATCH(experts_activate)
TILEFUSE_DISPATCH(experts_act_bwd)

namespace {

ActivationOptions activation_of(const std::string& name, double alpha, double limit) {
  Activation kind = Activation::swiglu_oai;
  if (name == "silu") kind = limit > 0.0 ? Activation::silu_clamped : Activation::silu;
  if (name == "gelu") kind = Activation::gelu;
  if (name == "gelu_erf") kind = Activation::gelu_erf;
  return {kind, static_cast<float>(alpha), static_cast<float>(limit)};
}

std::tuple<Tensor, Tensor> experts_up(Tensor x, Tensor w, Tensor offsets, Tensor order, OptionalTensor bias,
                                      int64_t top_k, std::string activation, double alpha, double limit, bool save,
                                      OptionalTensor w_scale) {
  const int64_t rows = order.numel(), inner = w.size(1) / 2;
  const ActivationOptions options = activation_of(activation, alpha, limit);
  Tensor h = empty_of(x, {rows, inner});
  Tensor z = empty_of(x, {save ? rows : 0, 2 * inner});
  prefer_huge_pages(h);
  prefer_huge_pages(z);
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  zero_outside(h, bounds);
  if (save) zero_outside(z, bounds);
  const SourceRows source = rows_of(x, order, top_k);
  if (panels_apply(x)) {
    PanelProduct product{};
    product.weight = panel_weight(w, w_scale, 3, x.size(1));
    product.rows = panel_rows(source);
    product.items = (inner + kPanelWidth - 1) / kPanelWidth;
    const MoeExpertsUpCall call{
        dtype_of(x), pointer<const void>(bias), h.data_ptr(), save ? z.data_ptr() : nullptr, inner, options};
    panel_matmul(product, segments_of(bounds), [&](const PanelProduct& chunk, int64_t units) {
      run_parallel(experts_up_panels, units, 64, chunk, call, RangeScratch<float>{2 * kPartRows * kPanelWidth});
    });
    return {h, z};
  }
  const size_t element = static_cast<size_t>(x.element_size());
  matmul_tiles(x, source, w, bounds, bias, x.scalar_type(), [&](int64_t first, int64_t count, const Tensor& product) {
    experts_activate(dtype_of(x), product.data_ptr(),
                     static_cast<char*>(h.data_ptr()) + static_cast<size_t>(first * inner) * element, count, inner,
                     options);
    if (save) {
      std::memcpy(static_cast<char*>(z.data_ptr()) + static_cast<size_t>(first * 2 * inner) * element,
                  product.data_ptr(), static_cast<size_t>(count * 2 * inner) * element);
    }
  });
  return {h, z};
}

std::tuple<Tensor, Tensor, Tensor> act_bwd(Tensor z, Tensor dh, Tensor offsets, Tensor order, Tensor weights,
                                           std::string activation, double alpha, double limit) {
  const int64_t rows = z.size(0), inner = z.size(1) / 2;
  Tensor dz = empty_of(z, {rows, 2 * inner});
  Tensor weighted = empty_of(z, {rows, inner});
  Tensor dweights = empty_of(weights, {weights.size(0), weights.size(1)});
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  const MoeExpertsActBwdCall call{dtype_of(z),
                                  z.data_ptr(),
                                  dh.data_ptr(),
                                  static_cast<const int32_t*>(order.data_ptr()),
                                  weights.data_ptr(),
                                  weights.scalar_type() == ScalarType::Float,
                                  dz.data_ptr(),
                                  weighted.data_ptr(),
                                  dweights.data_ptr(),
                                  inner,
                                  bounds.front(),
                                  bounds.back(),
                                  activation_of(activation, alpha, limit)};
  run_parallel(experts_act_bwd, rows, 1 + 16384 / (inner + 1), call);
  return {dz, weighted, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_experts_up", TORCH_BOX(&experts_up));
  m.impl("moe_experts_act_bwd", TORCH_BOX(&act_bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
