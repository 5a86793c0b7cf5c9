// Rows of logits on the CPU, 64 ids at a time: the statistics of a token, and the gradients of its logits. What the ops
// on logits share with those on heads, so that the same logits have the same statistics.
#pragma once

#include "attention/tiles_cpu.h"
#include "loss/linear_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

constexpr int64_t kVectorsOfPanel = kPanelIds / kWidth;
// exp of anything below is 0
constexpr float kNothing = -200.0f;

// 1 - 2 / (e^2x + 1) loses the small ones, for which the series is exact to float32
static inline vec hyperbolic_tangent(vec x) {
  const vec q = x * x;
  vec p = splat(-1382.0f / 155925.0f);
  p = p * q + 62.0f / 2835.0f;
  p = p * q - 17.0f / 315.0f;
  p = p * q + 2.0f / 15.0f;
  p = p * q - 1.0f / 3.0f;
  const vec near = x + x * (p * q), far = tanh(x);
  return q < 0.1f ? near : far;
}

// scaled, then capped; `uncapped` is 1 / softcap, of no meaning where there is no cap
static inline vec capped_logits(vec z, float scale, float softcap, float uncapped) {
  z *= scale;
  return softcap > 0.0f ? hyperbolic_tangent(z * uncapped) * softcap : z;
}

// of lanes none of which is NaN
static inline float largest_of(vec x) {
  float lanes[kWidth];
  store(lanes, x);
#pragma GCC unroll 4
  for (int width = kWidth / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

static inline float sum_of(vec x) {
  float lanes[kWidth];
  store(lanes, x);
#pragma GCC unroll 4
  for (int width = kWidth / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// statistics of one token's logits in one block of the vocabulary
struct RunningStats {
  float peak, classes;
  float logit, argmax;
  vec total, weighted, costs;
};

static inline void start(RunningStats& s) {
  s.peak = -kInfinity;
  s.classes = 0.0f;
  s.logit = __builtin_nanf("");
  s.argmax = -1.0f;
  s.total = s.weighted = s.costs = vec{};
}

// z [64], -inf past the vocabulary. `costs`: also of the sum of c (z - peak), with class weights c [64] and their sum
// One copy for all ops: which products and sums become one instruction is the compiler's choice, place by place.
void add_panel(const float* z, int64_t ids, int64_t first, const float* c, float classes, RunningStats& s);

static inline void finish(const RunningStats& s, int64_t columns, float* out) {
  const float values[kSmoothedColumns] = {s.peak,   sum_of(s.total), sum_of(s.weighted), s.logit,
                                          s.argmax, sum_of(s.costs), s.classes};
  for (int64_t i = 0; i < columns; ++i) out[i] = values[i];
}

// dz_j = p_j (of_p - of_entropy (logp_j + entropy)) + of_target [j = target] - of_class c_j
struct TokenGradient {
  float peak, log_sum, entropy;
  float of_p, of_entropy, of_target, of_class;
};

// of norm [2, T], entropy [T] and coefficients [4, T]
static inline TokenGradient token_gradient(const float* norm, const float* entropy, const float* coefficients,
                                           int64_t tokens, int64_t token) {
  const float* of = coefficients + token;
  return {norm[token], norm[tokens + token], entropy[token], of[0], of[tokens], of[2 * tokens], of[3 * tokens]};
}

// c [64] holds logits before the temperature, then their gradients. `at`: the target, if it is here; `cooling` is
// 1 / temperature
static inline void gradient_row(const TokenGradient& g, float cooling, float softcap, int64_t at, const float* classes,
                                float* c) {
  const float uncapped = softcap > 0.0f ? 1.0f / softcap : 0.0f;
  float target[kPanelIds];
  const bool here = at >= 0 && at < kPanelIds;
  if (here) {
    std::memset(target, 0, sizeof(target));
    target[at] = g.of_target;
  }
  for (int64_t v = 0; v < kVectorsOfPanel; ++v) {
    const vec capped = load(c + v * kWidth);
    const vec logp = (capped * cooling - g.peak) - g.log_sum;
    const vec p = exp(logp);
    vec dz = p * g.of_p;
    if (g.of_entropy != 0.0f) dz -= p * ((logp < kNothing ? splat(kNothing) : logp) + g.entropy) * g.of_entropy;
    if (here) dz += load(target + v * kWidth);
    if (classes != nullptr) dz -= load(classes + v * kWidth) * g.of_class;
    if (softcap > 0.0f) {
      const vec t = capped * uncapped;
      dz *= 1.0f - t * t;
    }
    store(c + v * kWidth, dz);
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
