// The expert layer's own CPU kernels: up-projection with the activation in its epilogue, and the activation's backward.
#include "moe/dot_cpu.h"

namespace tilefuse {

struct UpArgs {
  Rows x;
  const void* w;
  int64_t w_expert, w_row;  // strides
  const void* bias;         // [E, 2 I] or nullptr
  void* h;                  // [S, I]
  void* z;                  // [S, 2 I] or nullptr
  int64_t inner, hidden;
  ActivationOptions activation;
};

struct ActBwdArgs {
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

void experts_up_dot([[maybe_unused]] const UpArgs& args, [[maybe_unused]] const Tile* tiles,
                    [[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) {
#if defined(TILEFUSE_MOE_DOT)
  PackedRows packed = packed_rows(args.hidden);
  alignas(64) float gates[TILE_ROWS * PANEL_COLS], ups[TILE_ROWS * PANEL_COLS];
  DotState states[DOT_STATES];
  const int64_t inner = args.inner;
  for (int64_t t = begin; t < end; ++t) {
    const Tile& tile = tiles[t];
    const int64_t count = tile.row_end - tile.row_begin;
    pack(packed, args.x, tile, args.hidden);
    const bf16* w_gate = static_cast<const bf16*>(args.w) + tile.expert * args.w_expert;
    const bf16* w_up = w_gate + inner * args.w_row;
    const bf16* bias = args.bias == nullptr ? nullptr : static_cast<const bf16*>(args.bias) + tile.expert * 2 * inner;
    for (int64_t first = tile.n_begin; first < tile.n_end; first += PANEL_COLS) {
      const int64_t width = tile.n_end - first < PANEL_COLS ? tile.n_end - first : PANEL_COLS;
      fetch_rows(static_cast<const bf16*>(args.h) + tile.row_begin * inner + first, inner, count);
      for (int64_t n = first; n < first + width; n += DOT_COLS) {
        const int64_t after = n + 2 * DOT_COLS <= tile.n_end ? n + DOT_COLS : n;
        const bf16 *gate_rows[DOT_COLS], *up_rows[DOT_COLS], *next[DOT_COLS];
        weight_rows(w_gate, args.w_row, n, tile.n_end, gate_rows);
        weight_rows(w_up, args.w_row, n, tile.n_end, up_rows);
        weight_rows(w_gate, args.w_row, after, tile.n_end, next);
        dot_panel(packed.data, count, gate_rows, up_rows, args.hidden, states, gates + (n - first));
        dot_panel(packed.data, count, up_rows, next, args.hidden, states, ups + (n - first));
      }
      if (bias != nullptr) {
        add_bias(gates, count, width, bias + first);
        add_bias(ups, count, width, bias + inner + first);
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = tile.row_begin + r;
        float *gate = gates + r * PANEL_COLS, *up = ups + r * PANEL_COLS;
        if (args.z != nullptr) {
          bf16* z = static_cast<bf16*>(args.z) + row * 2 * inner + first;
          store_panel_row(gate, width, z);
          store_panel_row(up, width, z + inner);
        }
        activate_row(gate, up, PANEL_COLS, args.activation, gate);
        store_panel_row(gate, width, static_cast<bf16*>(args.h) + row * inner + first);
      }
    }
  }
  std::free(packed.data);
#endif
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

struct Slopes {
  float h, gate, up;  // the activation and its derivatives
};

static inline Slopes slopes_of(float gate, float up, const ActivationOptions& o) {
  if (o.kind == Activation::silu) {
    const float s = sigmoid_f32(gate);
    const float silu = gate * s;
    return {silu * up, up * (s + silu * (1.0f - s)), silu};
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
    gate = gate > o.limit ? o.limit : gate;
    up = up > o.limit ? o.limit : up;
    up = up < -o.limit ? -o.limit : up;
  }
  const float s = sigmoid_f32(o.alpha * gate);
  const float g = gate * s;
  return {g * (up + 1.0f), gate_passes * (up + 1.0f) * (s + o.alpha * g * (1.0f - s)), up_passes * g};
}

void experts_act_bwd(const ActBwdArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t LANES = 16;
  const int64_t inner = args.inner;
  TILEFUSE_BY_DTYPE(args.dtype, T, {
    for (int64_t row = begin; row < end; ++row) {
      const T* z = static_cast<const T*>(args.z) + row * 2 * inner;
      const T* dh = static_cast<const T*>(args.dh) + row * inner;
      T* dz = static_cast<T*>(args.dz) + row * 2 * inner;
      T* weighted = static_cast<T*>(args.weighted_h) + row * inner;
      const int64_t slot = args.order[row];
      float sum = 0.0f;
      if (row >= args.kept_begin && row < args.kept_end) {
        const float w = args.weights_f32 ? static_cast<const float*>(args.weights)[slot]
                                         : to_float(static_cast<const T*>(args.weights)[slot]);
        float part[LANES] = {};
        for (int64_t start = 0; start < inner; start += LANES) {
          const int64_t stop = start + LANES < inner ? start + LANES : inner;
          for (int64_t i = start; i < stop; ++i) {
            const Slopes s = slopes_of(to_float(z[i]), to_float(z[inner + i]), args.activation);
            const float d = to_float(dh[i]);
            part[i - start] += s.h * d;
            dz[i] = from_float<T>(s.gate * d * w);
            dz[inner + i] = from_float<T>(s.up * d * w);
            weighted[i] = from_float<T>(s.h * w);
          }
        }
        for (int64_t width = LANES / 2; width > 0; width /= 2) {
          for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
        }
        sum = part[0];
      } else {
        std::memset(dz, 0, sizeof(T) * 2 * inner);
        std::memset(weighted, 0, sizeof(T) * inner);
      }
      if (args.weights_f32) {
        static_cast<float*>(args.dweights)[slot] = sum;
      } else {
        static_cast<T*>(args.dweights)[slot] = from_float<T>(sum);
      }
    }
  })
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#include "moe/grouped_host.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(experts_up_dot, (const UpArgs&, const Tile*, int64_t, int64_t))
TILEFUSE_DISPATCH(experts_activate, (Dtype, const void*, void*, int64_t, int64_t, const ActivationOptions&))
TILEFUSE_DISPATCH(experts_act_bwd, (const ActBwdArgs&, int64_t, int64_t))

static ActivationOptions activation_of(const std::string& name, double alpha, double limit) {
  const Activation kind = name == "silu" ? Activation::silu : name == "gelu" ? Activation::gelu : Activation::swiglu_oai;
  return {kind, static_cast<float>(alpha), static_cast<float>(limit)};
}

static std::tuple<Tensor, Tensor> experts_up(Tensor x, Tensor w, Tensor offsets, Tensor order,
                                             std::optional<Tensor> bias, int64_t top_k, std::string activation,
                                             double alpha, double limit, bool save) {
  const int64_t rows = order.numel(), inner = w.size(1) / 2, hidden = w.size(2);
  const ActivationOptions options = activation_of(activation, alpha, limit);
  Tensor h = torch::stable::new_empty(x, {rows, inner});
  Tensor z = torch::stable::new_empty(x, {save ? rows : 0, 2 * inner});
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  zero_outside(h, bounds);
  if (save) zero_outside(z, bounds);
  const Rows source = rows_of(x, order, top_k);
  if (dot_applies(x, w)) {
    const UpArgs args{source, w.data_ptr(), w.stride(0), stride_or_zero(w, 1), bias ? bias->data_ptr() : nullptr,
                      h.data_ptr(), save ? z.data_ptr() : nullptr, inner, hidden, options};
    const std::vector<Tile> tiles = tiles_of(bounds, inner);
    const auto run = experts_up_dot_dispatch();
    parallel_for(0, static_cast<int64_t>(tiles.size()), 1,
                 [&](int64_t begin, int64_t end) { run(args, tiles.data(), begin, end); });
    return {h, z};
  }
  const size_t element = static_cast<size_t>(x.element_size());
  const auto activate_rows = experts_activate_dispatch();
  matmul_tiles(x, source, w, bounds, bias, x.scalar_type(), [&](int64_t first, int64_t count, const Tensor& product) {
    activate_rows(dtype_of(x), product.data_ptr(), static_cast<char*>(h.data_ptr()) + static_cast<size_t>(first * inner) * element, count, inner,
                  options);
    if (save) {
      std::memcpy(static_cast<char*>(z.data_ptr()) + static_cast<size_t>(first * 2 * inner) * element, product.data_ptr(),
                  static_cast<size_t>(count * 2 * inner) * element);
    }
  });
  return {h, z};
}

static std::tuple<Tensor, Tensor, Tensor> act_bwd(Tensor z, Tensor dh, Tensor offsets, Tensor order, Tensor weights,
                                                  std::string activation, double alpha, double limit) {
  const int64_t rows = z.size(0), inner = z.size(1) / 2;
  Tensor dz = torch::stable::new_empty(z, {rows, 2 * inner});
  Tensor weighted = torch::stable::new_empty(z, {rows, inner});
  Tensor dweights = torch::stable::new_empty(weights, {weights.size(0), weights.size(1)});
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  const ActBwdArgs args{dtype_of(z), z.data_ptr(), dh.data_ptr(), static_cast<const int32_t*>(order.data_ptr()),
                        weights.data_ptr(), weights.scalar_type() == ScalarType::Float, dz.data_ptr(),
                        weighted.data_ptr(), dweights.data_ptr(), inner, bounds.front(), bounds.back(),
                        activation_of(activation, alpha, limit)};
  const auto run = experts_act_bwd_dispatch();
  parallel_for(0, rows, 1 + 16384 / (inner + 1), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {dz, weighted, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_experts_up", TORCH_BOX(&experts_up));
  m.impl("moe_experts_act_bwd", TORCH_BOX(&act_bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
