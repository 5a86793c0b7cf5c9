// Scores of a router's row on the CPU, in vector lanes: for moe_route and the losses.
#pragma once

#include "common/cpu.h"
#include "common/cpu_math.h"
#include "moe/moe_route.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

constexpr int64_t kLanes = 16;
constexpr float kNegInf = -__builtin_inff();

// lanes as values: comparisons and selections of whole vectors
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// by reference: passing such a vector by value would depend on the instruction set
template <typename V, typename T>
static inline void load(V& v, const T* p) {
  std::memcpy(&v, p, sizeof(V));
}

static inline float max_no_nan(const float* x, int64_t n) {
  Floats top = Floats{} + kNegInf;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats v;
    load(v, x + i);
    top = v > top ? v : top;
  }
  // in halves: one lane after the other would wait for each
  float part[kLanes];
  std::memcpy(part, &top, sizeof(part));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) part[l] = part[l + width] > part[l] ? part[l + width] : part[l];
  }
  float best = part[0];
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// a sum in a fixed order that vectorises
static inline float sum_lanes(const float* x, int64_t n) {
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) part[l] += x[i + l];
  }
  for (int64_t l = 0; i + l < n; ++l) part[l] += x[i + l];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
  }
  return part[0];
}

// scores in plain arithmetic: NaN wherever that gives NaN; returns softmax's largest logit
static inline float scores_of_row(const float* x, float* s, int64_t n, RouteScore score) {
  float top = 0.0f;
  switch (score) {
    case RouteScore::softmax: {
      top = max_no_nan(x, n);
      for (int64_t i = 0; i < n; ++i) s[i] = exp_f32(x[i] - top);
      const float norm = sum_lanes(s, n);
      for (int64_t i = 0; i < n; ++i) s[i] = s[i] / norm;
      break;
    }
    case RouteScore::sigmoid:
      for (int64_t i = 0; i < n; ++i) s[i] = sigmoid_f32(x[i]);
      break;
    case RouteScore::sqrtsoftplus:
      for (int64_t i = 0; i < n; ++i) s[i] = std::sqrt(softplus_f32(x[i]));
      break;
    case RouteScore::none:
      for (int64_t i = 0; i < n; ++i) s[i] = x[i];
      break;
  }
  return top;
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
