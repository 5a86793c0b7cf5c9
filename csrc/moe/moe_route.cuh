// moe_route for decode, and its gradient: one warp per row, a lane takes experts lane, lane + 32, ...
#pragma once

#include "common/cuda.cuh"
#include "moe/moe_route.h"

namespace tilefuse {

struct MoeRouteCall {
  const void* logits;
  int64_t stride;     // of a row
  const float* bias;  // [E] or nullptr
  float* weights;     // [T, k]
  int* ids;           // [T, k]
  int64_t tokens;
  int experts, top_k, groups, topk_group;
  RouteScore score;
  bool renormalize, top2, nan_zero;
  float scale;
};

struct MoeRouteBwdCall {
  const float* dweights;  // [T, k]
  const void* logits;
  int64_t stride;  // of a row
  const int* ids;  // [T, k], as the forward wrote them: distinct and in range whatever the logits hold
  void* dlogits;   // [T, E]
  int64_t tokens;
  int experts, top_k;
  RouteScore score;
  bool renormalize, nan_zero;
  float scale;
};

constexpr int kRouteWarps = 4;
constexpr float kNegInf = -__builtin_inff();
// keys: float32 bits in integer order, NaN below -inf, an expert of a masked group below that
constexpr int kNanKey = -2147483647;
constexpr int kMaskedKey = -2147483647 - 1;
constexpr long long kTaken = -9223372036854775807ll - 1;

// dynamic shared memory of a block: for each warp the groups' keys and flags, and the chosen scores
__host__ __device__ inline int route_shared_bytes(int groups, int top_k) {
  return kRouteWarps * (2 * groups + top_k) * 4;
}

// the backward's: for each warp a value per expert and the chosen scores
__host__ __device__ inline int route_backward_shared_bytes(int experts, int top_k) {
  return kRouteWarps * (experts + top_k) * 4;
}

__device__ __forceinline__ int route_key(float x) {
  // adding 0 turns -0 into 0
  const int bits = __float_as_int(x + 0.0f);
  return x != x ? kNanKey : bits ^ ((bits >> 31) & 0x7fffffff);
}

// larger key first, then lower index
__device__ __forceinline__ long long route_packed(int key, int index) {
  return (static_cast<long long>(key) * 4294967296ll) + (0x7fffffff - index);
}

__device__ __forceinline__ int route_index(long long packed) {
  return 0x7fffffff - static_cast<int>(packed & 0x7fffffff);
}

__device__ __forceinline__ long long warp_best(long long value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const long long other = __shfl_xor_sync(kFullWarp, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ float route_score(float x, RouteScore score) {
  if (score == RouteScore::sigmoid) return 1.0f / (1.0f + expf(-x));
  if (score == RouteScore::sqrtsoftplus) return sqrtf((x < 0.0f ? 0.0f : x) + log1pf(expf(x < 0.0f ? x : -x)));
  return x;
}

template <typename T, int kPerLane>
__device__ __forceinline__ void route_row(const MoeRouteCall& p, int64_t row, int* group_keys, int* kept,
                                          float* chosen) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* source = static_cast<const T*>(p.logits) + row * p.stride;
  const int per_group = p.experts / p.groups;
  float x[kPerLane], s[kPerLane], value[kPerLane];
  float top = kNegInf;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane;
    x[i] = expert < p.experts ? to_float(source[expert]) : kNegInf;
    top = fmaxf(top, x[i]);  // ignores NaN
  }
  if (p.score == RouteScore::softmax) {
    top = warp_max(top);
    float sum = 0.0f, clean_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool real = i * 32 + lane < p.experts;
      s[i] = real ? expf(x[i] - top) : 0.0f;
      // NaN is set aside and the largest logit counts 1 even when it is infinite
      value[i] = !real || x[i] != x[i] ? 0.0f : x[i] == top ? 1.0f : s[i];
      sum += s[i];
      clean_sum += value[i];
    }
    sum = warp_sum(sum);
    clean_sum = warp_sum(clean_sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      s[i] = s[i] / sum;
      value[i] = x[i] != x[i] ? x[i] : value[i] / clean_sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) value[i] = s[i] = route_score(x[i], p.score);
  }
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * 32 + lane < p.experts) value[i] += p.bias[i * 32 + lane];
    }
  }
  // without a bias, logits order like softmax scores and do not underflow to ties
  const bool by_logit = p.score == RouteScore::softmax && p.bias == nullptr;

  if (p.groups > 1) {
    for (int g = 0; g < p.groups; ++g) {
      float first = kNegInf, second = kNegInf;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int expert = i * 32 + lane;
        const float v = by_logit && !p.top2 ? x[i] : value[i];
        if (expert < p.experts && expert / per_group == g && v > second) {
          second = v > first ? first : v;
          first = v > first ? v : first;
        }
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        const float other_first = __shfl_xor_sync(kFullWarp, first, lanes);
        const float other_second = __shfl_xor_sync(kFullWarp, second, lanes);
        const float low = other_first < first ? other_first : first;
        const float high = other_second > second ? other_second : second;
        first = other_first > first ? other_first : first;
        second = low > high ? low : high;
      }
      float sum = p.top2 && per_group > 1 ? first + second : first;
      sum = sum > kNegInf ? sum : kNegInf;  // inf - inf
      if (lane == 0) {
        group_keys[g] = route_key(sum);
        kept[g] = 0;
      }
    }
    __syncwarp();
    for (int round = 0; round < p.topk_group; ++round) {
      long long best = kTaken;
      for (int g = lane; g < p.groups; g += 32) {
        const long long packed = route_packed(group_keys[g], g);
        if (kept[g] == 0 && packed > best) best = packed;
      }
      best = warp_best(best);
      if (lane == 0) kept[route_index(best)] = 1;
      __syncwarp();
    }
  }

  long long keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane;
    int key = kMaskedKey;
    if (expert < p.experts && (p.groups == 1 || kept[expert / per_group] != 0))
      key = route_key(by_logit ? x[i] : value[i]);
    keys[i] = expert < p.experts ? route_packed(key, expert) : kTaken;
  }
  float total = 0.0f;
  for (int j = 0; j < p.top_k; ++j) {
    long long best = kTaken;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = keys[i] > best ? keys[i] : best;
    best = warp_best(best);
    const int expert = route_index(best);
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (keys[i] == best) {
        mine = s[i];
        keys[i] = kTaken;
      }
    }
    const float score = __shfl_sync(kFullWarp, mine, expert % 32);
    total += score;
    if (lane == 0) {
      chosen[j] = score;
      p.ids[row * p.top_k + j] = expert;
    }
  }
  __syncwarp();
  bool bad = false;
  const float norm = total + 1e-20f;
  for (int j = lane; j < p.top_k; j += 32) {
    const float w = (p.renormalize ? chosen[j] / norm : chosen[j]) * p.scale;
    bad = bad || w != w;
    p.weights[row * p.top_k + j] = w;
  }
  if (p.nan_zero && __any_sync(kFullWarp, bad)) {
    for (int j = lane; j < p.top_k; j += 32) p.weights[row * p.top_k + j] = 0.0f;
  }
}

// blocks of 32 * kRouteWarps threads, one row for each warp
template <typename T, int kPerLane>
__global__ void __launch_bounds__(32 * kRouteWarps) moe_route_kernel(const __grid_constant__ MoeRouteCall p) {
  TILEFUSE_DYNAMIC_SHARED(int, shared);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRouteWarps + warp;
  if (row >= p.tokens) return;
  int* mine = shared + warp * (2 * p.groups + p.top_k);
  route_row<T, kPerLane>(p, row, mine, mine + p.groups, reinterpret_cast<float*>(mine + 2 * p.groups));
}

// `value` [E] holds the softmax scores, then the gradient; a lane reads and writes its own experts but for the chosen
template <typename T>
__device__ __forceinline__ void route_backward_row(const MoeRouteBwdCall& p, int64_t row, float* value, float* chosen) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* source = static_cast<const T*>(p.logits) + row * p.stride;
  const float* dweights = p.dweights + row * p.top_k;
  const int* ids = p.ids + row * p.top_k;
  const bool softmax = p.score == RouteScore::softmax;
  if (softmax) {
    float top = kNegInf, sum = 0.0f;
    for (int expert = lane; expert < p.experts; expert += 32) {
      value[expert] = to_float(source[expert]);
      top = fmaxf(top, value[expert]);  // ignores NaN
    }
    top = warp_max(top);
    for (int expert = lane; expert < p.experts; expert += 32) {
      value[expert] = expf(value[expert] - top);
      sum += value[expert];
    }
    sum = warp_sum(sum);
    for (int expert = lane; expert < p.experts; expert += 32) value[expert] /= sum;
    __syncwarp();
  }

  float total = 0.0f, dot = 0.0f;
  for (int j = lane; j < p.top_k; j += 32) {
    chosen[j] = softmax ? value[ids[j]] : route_score(to_float(source[ids[j]]), p.score);
    total += chosen[j];
    dot += dweights[j] * p.scale * chosen[j];
  }
  total = warp_sum(total) + 1e-20f;
  dot = warp_sum(dot);
  // the sum of s_i ds_i; renormalised weights do not move with a common factor, up to eps
  float inner = 0.0f;
  if (softmax) inner = p.renormalize ? dot * 1e-20f / (total * total) : dot;
  __syncwarp();
  // elementwise scores leave the experts that were not chosen at exactly 0, whatever their logits hold
  for (int expert = lane; expert < p.experts; expert += 32) {
    value[expert] = softmax ? value[expert] * (0.0f - inner) : 0.0f;
  }
  __syncwarp();

  bool bad = false;
  for (int j = lane; j < p.top_k; j += 32) {
    const float score = chosen[j];
    const float weight = (p.renormalize ? score / total : score) * p.scale;
    bad = bad || weight != weight;
    float d = dweights[j] * p.scale;
    if (p.renormalize) d = (d - dot / total) / total;
    float slope = 1.0f;
    if (softmax) slope = score;
    if (p.score == RouteScore::sigmoid) slope = score * (1.0f - score);
    if (p.score == RouteScore::sqrtsoftplus) {
      slope = score == 0.0f ? 0.0f : route_score(to_float(source[ids[j]]), RouteScore::sigmoid) / (2.0f * score);
    }
    value[ids[j]] = slope * (d - inner);
  }
  bad = __any_sync(kFullWarp, bad) && p.nan_zero;
  __syncwarp();
  T* target = static_cast<T*>(p.dlogits) + row * p.experts;
  for (int expert = lane; expert < p.experts; expert += 32) target[expert] = from_float<T>(bad ? 0.0f : value[expert]);
}

// any number of experts, launched like moe_route_kernel
template <typename T>
__global__ void __launch_bounds__(32 * kRouteWarps) moe_route_bwd_kernel(const __grid_constant__ MoeRouteBwdCall p) {
  TILEFUSE_DYNAMIC_SHARED(float, shared);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRouteWarps + warp;
  if (row >= p.tokens) return;
  float* mine = shared + warp * (p.experts + p.top_k);
  route_backward_row<T>(p, row, mine, mine + p.experts);
}

// calls launch(kernel) with the kernel that holds this many experts
template <typename T, typename Launch>
inline void route_launch(int experts, const Launch& launch) {
  if (experts <= 32) return launch(moe_route_kernel<T, 1>);
  if (experts <= 64) return launch(moe_route_kernel<T, 2>);
  if (experts <= 128) return launch(moe_route_kernel<T, 4>);
  if (experts <= 256) return launch(moe_route_kernel<T, 8>);
  if (experts <= 512) return launch(moe_route_kernel<T, 16>);
  return launch(moe_route_kernel<T, 32>);
}

}  // namespace tilefuse
