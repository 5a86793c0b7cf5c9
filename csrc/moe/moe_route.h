// How scores are made of logits, for CPU and CUDA.
#pragma once

#include <cstdint>
#include <cstring>

namespace tilefuse {

enum class RouteScore : int32_t { softmax, sigmoid, sqrtsoftplus, none };

static inline RouteScore route_score_named(const char* name) {
  if (std::strcmp(name, "softmax") == 0) return RouteScore::softmax;
  if (std::strcmp(name, "sigmoid") == 0) return RouteScore::sigmoid;
  return std::strcmp(name, "sqrtsoftplus") == 0 ? RouteScore::sqrtsoftplus : RouteScore::none;
}

}  // namespace tilefuse
