// The activations of gated experts.
#pragma once

#include "common/cpu.h"
#include "common/cpu_math.h"

namespace tilefuse {

// silu with a limit is a kind of its own, so that silu without one stays free of it
enum class Activation : int32_t { silu, silu_clamped, gelu, gelu_erf, swiglu_oai };

struct ActivationOptions {
  Activation kind;
  float alpha, limit;
};

namespace TILEFUSE_ISA {

// written so that NaN passes every comparison
static inline void clamp_to_limit(float limit, float& gate, float& up) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
}

// the kind is an argument of its own, so that a loop over values can have it fixed and become vectors
static inline float activate(Activation kind, float gate, float up, const ActivationOptions& o) {
  switch (kind) {
    case Activation::silu:
      return gate * sigmoid_f32(gate) * up;
    case Activation::silu_clamped:
      clamp_to_limit(o.limit, gate, up);
      return gate * sigmoid_f32(gate) * up;
    case Activation::gelu: {
      const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
      // 0.5 (1 + tanh(inner)) is a sigmoid of twice the argument
      return gate * sigmoid_f32(2.0f * inner) * up;
    }
    case Activation::gelu_erf:
      return gate * 0.5f * (1.0f + std::erf(gate * 0.7071067811865476f)) * up;
    case Activation::swiglu_oai:
      break;
  }
  if (o.limit > 0.0f) clamp_to_limit(o.limit, gate, up);
  return gate * sigmoid_f32(o.alpha * gate) * (up + 1.0f);
}

// out[i] = activate(gate[i], up[i])
template <typename T, typename Out>
static inline void activate_row(const T* gate, const T* up, int64_t count, const ActivationOptions& o, Out* out) {
  switch (o.kind) {
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::silu, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::silu_clamped:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::silu_clamped, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::gelu_erf:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::gelu_erf, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::gelu:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::gelu, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
    case Activation::swiglu_oai:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = from_float<Out>(activate(Activation::swiglu_oai, to_float(gate[i]), to_float(up[i]), o));
      }
      break;
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
