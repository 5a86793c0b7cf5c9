// build-flags: -Wno-psabi -ffp-contract=fast
// Gated activations on the CPU, forward and backward: rows in pieces that stay in L1.
#include "common/floats_math_cpu.h"
#include "norm/rms_norm_cpu.h"

#include <type_traits>

namespace tilefuse {

enum class Gating : int32_t { silu, gelu, gelu_tanh, relu2, swiglu_oai };

struct GatedActivationCall {
  Dtype dtype;
  Gating kind;
  float alpha, limit;
  // gate and up take turns in the rows of `gate`
  bool interleaved, stream;
  int64_t columns;
  NormRows gate, up;
  // forward: [T, columns] contiguous
  void* out;
  // backward; the gradients have rows `d_stride` apart
  NormRows dout;
  void *dgate, *dup;
  int64_t d_stride;
};

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kPiece = 512;

// 0.5 erfc(t) / exp(-t^2) for t >= 0, to 4e-7: a polynomial of 1 / (1 + 0.4 t), fitted to that
template <typename V>
TILEFUSE_INLINE V scaled_tail(V t) {
  const V s = 1.0f / (1.0f + 0.4f * t);
  V p = s * 3.53370190e-2f - 1.90500279e-1f;
  p = p * s + 3.33095923e-1f;
  p = p * s - 1.83199969e-1f;
  p = p * s + 2.07231053e-1f;
  p = p * s + 6.58315047e-2f;
  p = p * s + 1.20108559e-1f;
  p = p * s + 1.12060676e-1f;
  return p * s + 3.54542403e-5f;
}

// the activation of gate and its derivative; V is float or Floats
template <Gating K, typename V>
TILEFUSE_INLINE V activated(V gate, float alpha, V* slope) {
  if constexpr (K == Gating::relu2) {
    const V positive = gate < 0.0f ? V{} : gate;
    *slope = 2.0f * positive;
    return positive * positive;
  } else if constexpr (K == Gating::gelu) {
    const V bell = exp_f32(-0.5f * gate * gate), distance = gate < 0.0f ? -gate : gate;
    const V tail = bell * scaled_tail(distance * 0.7071067811865476f);
    const V share = gate < 0.0f ? tail : 1.0f - tail;
    *slope = share + gate * bell * 0.3989422804014327f;
    return gate * share;
  } else if constexpr (K == Gating::gelu_tanh) {
    // 0.5 (1 + tanh(x)) is a sigmoid of twice the argument
    const V share = sigmoid_of(1.5957691216057308f * (gate + 0.044715f * gate * gate * gate));
    const V bend = gate * share * (1.0f - share) * (1.5957691216057308f + 0.2140644488f * gate * gate);
    // far out the square of gate overflows beside a factor that is 0
    *slope = share + (share * (1.0f - share) == 0.0f ? V{} : bend);
    return gate * share;
  } else {
    const float factor = K == Gating::swiglu_oai ? alpha : 1.0f;
    const V share = sigmoid_of(factor * gate);
    *slope = share + factor * gate * share * (1.0f - share);
    return gate * share;
  }
}

// the smaller of both, NaN where x is
template <typename V>
TILEFUSE_INLINE V at_most(V x, float limit) {
  return x > limit ? V{} + limit : x;
}

template <typename V>
TILEFUSE_INLINE V between(V x, float limit) {
  const V below = at_most(x, limit);
  return below < -limit ? V{} - limit : below;
}

// a piece of a row whose gate and up take turns, apart, and of what becomes of them
template <typename T>
struct Piece {
  T gate[kPiece], up[kPiece], dgate[kPiece], dup[kPiece];
};

template <typename T>
TILEFUSE_INLINE void take_apart(const T* both, int64_t n, T* gate, T* up) {
  for (int64_t i = 0; i < n; ++i) {
    gate[i] = both[2 * i];
    up[i] = both[2 * i + 1];
  }
}

template <typename T>
TILEFUSE_INLINE void join(const T* gate, const T* up, int64_t n, T* both) {
  for (int64_t i = 0; i < n; ++i) {
    both[2 * i] = gate[i];
    both[2 * i + 1] = up[i];
  }
}

template <Gating K, typename T>
void forward_piece(const GatedActivationCall& call, const T* gate, const T* up, int64_t n, T* out) {
  const float alpha = call.alpha, limit = call.limit, shift = K == Gating::swiglu_oai ? 1.0f : 0.0f;
  const auto activate = [=](int64_t i, auto g, auto u) {
    decltype(g) slope;
    put(out, i, activated<K>(g, alpha, &slope) * (u + shift));
  };
  if (limit > 0.0f) {
    over_floats(n, [=](int64_t i, auto lanes) {
      activate(i, at_most(get(gate, i, lanes), limit), between(get(up, i, lanes), limit));
    });
  } else {
    over_floats(n, [=](int64_t i, auto lanes) { activate(i, get(gate, i, lanes), get(up, i, lanes)); });
  }
}

template <Gating K, typename T>
void backward_piece(const GatedActivationCall& call, const T* dout, const T* gate, const T* up, int64_t n, T* dgate,
                    T* dup) {
  const float alpha = call.alpha, shift = K == Gating::swiglu_oai ? 1.0f : 0.0f;
  const float limit = call.limit > 0.0f ? call.limit : __builtin_inff();
  over_floats(n, [=](int64_t i, auto lanes) {
    const auto g = get(gate, i, lanes), u = get(up, i, lanes), upstream = get(dout, i, lanes);
    typename std::remove_const<decltype(g)>::type slope, none{};
    const auto value = activated<K>(at_most(g, limit), alpha, &slope);
    const auto to_gate = upstream * (between(u, limit) + shift) * slope, to_up = upstream * value;
    put(dgate, i, g > limit ? none : to_gate);
    put(dup, i, (u > limit) | (u < -limit) ? none : to_up);
  });
}

template <Gating K, typename T>
void forward_row(const GatedActivationCall& call, int64_t row, Piece<T>& piece) {
  const T* gate = static_cast<const T*>(call.gate.data) + row * call.gate.stride;
  const T* up = static_cast<const T*>(call.up.data) + row * call.up.stride;
  T* out = static_cast<T*>(call.out) + row * call.columns;
  for (int64_t start = 0; start < call.columns; start += kPiece) {
    const int64_t n = call.columns - start < kPiece ? call.columns - start : kPiece;
    if (call.interleaved) take_apart(gate + 2 * start, n, piece.gate, piece.up);
    T* to = call.stream ? piece.dgate : out + start;
    forward_piece<K>(call, call.interleaved ? piece.gate : gate + start, call.interleaved ? piece.up : up + start, n,
                     to);
    if (call.stream) stream_copy(out + start, to, n * static_cast<int64_t>(sizeof(T)));
  }
}

template <Gating K, typename T>
void backward_row(const GatedActivationCall& call, int64_t row, Piece<T>& piece) {
  const T* dout = static_cast<const T*>(call.dout.data) + row * call.dout.stride;
  const T* gate = static_cast<const T*>(call.gate.data) + row * call.gate.stride;
  const T* up = static_cast<const T*>(call.up.data) + row * call.up.stride;
  T* dgate = static_cast<T*>(call.dgate) + row * call.d_stride;
  T* dup = static_cast<T*>(call.dup) + row * call.d_stride;
  for (int64_t start = 0; start < call.columns; start += kPiece) {
    const int64_t n = call.columns - start < kPiece ? call.columns - start : kPiece;
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    if (call.interleaved) {
      take_apart(gate + 2 * start, n, piece.gate, piece.up);
      backward_piece<K>(call, dout + start, piece.gate, piece.up, n, piece.dgate, piece.dup);
      join(piece.dgate, piece.dup, n, dgate + 2 * start);
    } else if (call.stream) {
      backward_piece<K>(call, dout + start, gate + start, up + start, n, piece.dgate, piece.dup);
      stream_copy(dgate + start, piece.dgate, bytes);
      stream_copy(dup + start, piece.dup, bytes);
    } else {
      backward_piece<K>(call, dout + start, gate + start, up + start, n, dgate + start, dup + start);
    }
  }
}

template <typename T, Gating K>
void gated(const GatedActivationCall& call, int64_t begin, int64_t end) {
  alignas(64) Piece<T> piece;
  for (int64_t row = begin; row < end; ++row) {
    if (call.out != nullptr) {
      forward_row<K>(call, row, piece);
    } else {
      backward_row<K>(call, row, piece);
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

void gated_activation_rows(const GatedActivationCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    switch (call.kind) {
      case Gating::silu:
        return gated<T, Gating::silu>(call, begin, end);
      case Gating::gelu:
        return gated<T, Gating::gelu>(call, begin, end);
      case Gating::gelu_tanh:
        return gated<T, Gating::gelu_tanh>(call, begin, end);
      case Gating::relu2:
        return gated<T, Gating::relu2>(call, begin, end);
      case Gating::swiglu_oai:
        return gated<T, Gating::swiglu_oai>(call, begin, end);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(gated_activation_rows)

namespace {

Gating gating_of(const std::string& name) {
  const char* names[] = {"silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"};
  for (int32_t i = 0; i < 5; ++i) {
    if (name == names[i]) return static_cast<Gating>(i);
  }
  STD_TORCH_CHECK(false, "tilefuse.gated_activation: activation must be known, got ", name);
  return Gating::silu;
}

GatedActivationCall call_of(const Tensor& gate, const OptionalTensor& up, const std::string& activation, double alpha,
                            double limit, bool interleaved) {
  GatedActivationCall call{};
  call.dtype = dtype_of(gate);
  call.kind = gating_of(activation);
  call.alpha = static_cast<float>(alpha);
  call.limit = static_cast<float>(limit);
  call.interleaved = interleaved;
  call.columns = up ? gate.size(1) : gate.size(1) / 2;
  call.gate = call.up = norm_rows(gate);
  if (up) {
    call.up = norm_rows(*up);
  } else if (!interleaved) {
    call.up.data = static_cast<const char*>(call.up.data) + call.columns * gate.element_size();
  }
  call.stream = gate.size(0) * call.columns * static_cast<int64_t>(gate.element_size()) >= kStreamBytes;
  return call;
}

void run(const GatedActivationCall& call, int64_t rows) {
  run_parallel(gated_activation_rows, rows, 1 + 8192 / (call.columns + 1), call);
}

Tensor gated_activation_fwd(Tensor gate, OptionalTensor up, std::string activation, double alpha, double limit,
                            bool interleaved) {
  GatedActivationCall call = call_of(gate, up, activation, alpha, limit, interleaved);
  Tensor out = torch::stable::new_empty(gate, {gate.size(0), call.columns});
  prefer_huge_pages(out);
  call.out = out.mutable_data_ptr();
  run(call, out.numel() > 0 ? gate.size(0) : 0);
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(Tensor dout, Tensor gate, OptionalTensor up, std::string activation,
                                                double alpha, double limit, bool interleaved) {
  GatedActivationCall call = call_of(gate, up, activation, alpha, limit, interleaved);
  Tensor dgate = empty_contiguous(gate);
  Tensor dup = up ? empty_contiguous(*up) : torch::stable::new_empty(gate, {0});
  call.dout = norm_rows(dout);
  call.dgate = dgate.mutable_data_ptr();
  call.dup =
      up ? dup.mutable_data_ptr() : static_cast<char*>(dgate.mutable_data_ptr()) + call.columns * gate.element_size();
  call.d_stride = gate.size(1);
  run(call, dout.numel() > 0 ? gate.size(0) : 0);
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("gated_activation_fwd", TORCH_BOX(&gated_activation_fwd));
  m.impl("gated_activation_bwd", TORCH_BOX(&gated_activation_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
