// moe_route on the CPU: scores of a row in vector lanes, then a threshold scan for the best k.
#include "moe/scores_cpu.h"

namespace tilefuse {

struct MoeRouteOptions {
  int64_t experts, top_k, groups, topk_group;
  RouteScore score;
  bool renormalize, top2, nan_zero;
  float scale;
};

struct MoeRouteCall : MoeRouteOptions {
  Dtype dtype;
  const void* logits;
  int64_t stride;     // of a row
  const float* bias;  // [E] or nullptr
  float* weights;     // [T, k]
  int32_t* ids;       // [T, k]
};

struct MoeRouteBwdCall : MoeRouteOptions {
  Dtype dtype;
  const float* dweights;  // [T, k]
  const void* logits;
  int64_t stride;      // of a row
  const int32_t* ids;  // [T, k]
  void* dlogits;       // [T, E]
};

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kSmall = 2048;
// keys: float32 bits in integer order, NaN below -inf, an expert of a masked group below that
constexpr int32_t kNanKey = -2147483647;
constexpr int32_t kMaskedKey = -2147483647 - 1;

inline int32_t ordered(float x) {
  // adding 0 turns -0 into 0
  const int32_t bits = static_cast<int32_t>(float_to_bits(x + 0.0f));
  return x != x ? kNanKey : bits ^ ((bits >> 31) & 0x7fffffff);
}

// softmax with NaN set aside; the largest logit counts 1 even when it is infinite
inline void selection_softmax(const float* x, float* s, int64_t n, float top) {
  for (int64_t i = 0; i < n; ++i) {
    const float e = x[i] == top ? 1.0f : exp_f32(x[i] - top);
    s[i] = x[i] != x[i] ? 0.0f : e;
  }
  const float norm = sum_lanes(s, n);
  for (int64_t i = 0; i < n; ++i) s[i] = x[i] != x[i] ? x[i] : s[i] / norm;
}

// the largest and second largest of a set
struct Top2 {
  float first, second;
};

inline void add(Top2& t, float x) {
  if (x > t.first) {
    t.second = t.first;
    t.first = x;
  } else if (x > t.second) {
    t.second = x;
  }
}

// the best, or the sum of the best two, of one group; NaN counts as -inf
inline float group_score(const float* v, int64_t n, bool top2) {
  Floats first = Floats{} + kNegInf;
  Floats second = first;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats x;
    load(x, v + i);
    x = x > kNegInf ? x : Floats{} + kNegInf;
    const Floats low = x < first ? x : first;
    second = low > second ? low : second;
    first = x > first ? x : first;
  }
  Top2 t{kNegInf, kNegInf};
  if (i > 0) {
    // fold the lanes: 16 to 8 to 4, then one by one
    float f[kLanes], g[kLanes];
    std::memcpy(f, &first, sizeof(f));
    std::memcpy(g, &second, sizeof(g));
    for (int64_t width = kLanes / 2; width >= 4; width /= 2) {
      for (int64_t l = 0; l < width; ++l) {
        const float low = f[l] < f[l + width] ? f[l] : f[l + width];
        const float high = g[l] > g[l + width] ? g[l] : g[l + width];
        f[l] = f[l] > f[l + width] ? f[l] : f[l + width];
        g[l] = low > high ? low : high;
      }
    }
    for (int64_t l = 0; l < 4; ++l) {
      const float low = f[l] < t.first ? f[l] : t.first;
      const float high = g[l] > t.second ? g[l] : t.second;
      t.first = f[l] > t.first ? f[l] : t.first;
      t.second = low > high ? low : high;
    }
  }
  for (; i < n; ++i) add(t, v[i]);
  if (!top2 || n == 1) return t.first;
  const float sum = t.first + t.second;
  return sum > kNegInf ? sum : kNegInf;
}

// the k <= kLanes largest of n keys, descending, equal keys by index; false when too many keys tie for a place
inline bool select_few(const int32_t* keys, int64_t n, int64_t k, int32_t* ids) {
  constexpr int64_t kCandidates = 2 * kLanes;
  // the k-th largest of the lanes' maxima bounds the k-th largest key from below: few keys pass it
  Ints top = Ints{} + kMaskedKey;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Ints v;
    load(v, keys + i);
    top = v > top ? v : top;
  }
  Ints greater = {};
  for (int64_t l = 0; l < kLanes; ++l) greater -= top[l] > top;
  const Ints eligible = greater < static_cast<int32_t>(k) ? top : Ints{} + 2147483647;
  int32_t bound = 2147483647;
  for (int64_t l = 0; l < kLanes; ++l) bound = eligible[l] < bound ? eligible[l] : bound;
  // a masked key never passes
  bound = bound > kMaskedKey ? bound : kNanKey;

  int32_t passed[kCandidates], index[kCandidates];
  int64_t count = 0;
  const auto pass = [&](int64_t j) {
    if (count < kCandidates) {
      passed[count] = keys[j];
      index[count] = static_cast<int32_t>(j);
    }
    ++count;
  };
  for (i = 0; i + kLanes <= n; i += kLanes) {
    uint32_t passing = 0;
    for (int64_t l = 0; l < kLanes; ++l) passing |= static_cast<uint32_t>(keys[i + l] >= bound ? 1 : 0) << l;
    for (; passing != 0; passing &= passing - 1) pass(i + __builtin_ctz(passing));
  }
  for (; i < n; ++i) {
    if (keys[i] >= bound) pass(i);
  }
  if (count > kCandidates) return false;
  for (int64_t c = count; c < kCandidates; ++c) passed[c] = kMaskedKey;

  // a candidate's place is the number of candidates in front of it
  Ints low, high;
  load(low, passed);
  load(high, passed + kLanes);
  Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints low_place = {}, high_place = {};
  for (int32_t c = 0; c < static_cast<int32_t>(count); ++c) {
    const int32_t key = passed[c];
    low_place -= (key > low) | ((key == low) & (c < lane));
    high_place -= (key > high) | ((key == high) & (c < lane + static_cast<int32_t>(kLanes)));
  }
  int32_t place[kCandidates];
  std::memcpy(place, &low_place, sizeof(low_place));
  std::memcpy(place + kLanes, &high_place, sizeof(high_place));
  for (int64_t c = 0; c < count; ++c) {
    if (place[c] < k) ids[place[c]] = index[c];
  }
  return true;
}

// the same for any k; best [k] is scratch
inline void select_many(const int32_t* keys, int64_t n, int64_t k, int32_t* best, int32_t* ids) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t key = keys[j];
    if (key == kMaskedKey || (found == k && key <= best[k - 1])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && best[at - 1] < key; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = key;
    ids[at] = static_cast<int32_t>(j);
  }
}

}  // namespace

void moe_route_fwd(const MoeRouteCall& call, int64_t row_begin, int64_t row_end) {
  const int64_t n = call.experts, k = call.top_k, per = n / call.groups;
  // x, s, biased, keys, best keys, group scores; those of a few hundred experts stay on the stack
  const int64_t room = 4 * n + k + 2 * call.groups;
  float small[kSmall];
  float* x = room <= kSmall ? small : static_cast<float*>(std::malloc(sizeof(float) * room));
  float* s = x + n;
  float* biased = s + n;
  int32_t* keys = reinterpret_cast<int32_t*>(biased + n);
  int32_t* best = keys + n;
  int32_t* group_keys = best + k;
  int32_t* kept = group_keys + call.groups;
  for (int64_t row = row_begin; row < row_end; ++row) {
    TILEFUSE_BY_DTYPE(call.dtype, T, {
      const T* source = static_cast<const T*>(call.logits) + row * call.stride;
      for (int64_t i = 0; i < n; ++i) x[i] = to_float(source[i]);
    })
    const float top = scores_of_row(x, s, n, call.score);
    const float* value = s;
    if (call.score == RouteScore::softmax) {
      value = x;
      if (call.bias != nullptr || (call.groups > 1 && call.top2)) {
        selection_softmax(x, biased, n, top);
        value = biased;
      }
    }
    if (call.bias != nullptr) {
      for (int64_t i = 0; i < n; ++i) biased[i] = value[i] + call.bias[i];
      value = biased;
    }
    // without a call.bias, call.logits order like softmax scores and do not underflow to ties
    const float* key_value = call.score == RouteScore::softmax && call.bias == nullptr ? x : value;
    for (int64_t i = 0; i < n; ++i) keys[i] = ordered(key_value[i]);

    if (call.groups > 1) {
      for (int64_t g = 0; g < call.groups; ++g) {
        group_keys[g] = ordered(group_score((call.top2 ? value : key_value) + g * per, per, call.top2));
        kept[g] = 0;
      }
      for (int64_t r = 0; r < call.topk_group; ++r) {
        int64_t winner = -1;
        for (int64_t g = 0; g < call.groups; ++g) {
          if (!kept[g] && (winner < 0 || group_keys[g] > group_keys[winner])) winner = g;
        }
        kept[winner] = 1;
      }
      for (int64_t g = 0; g < call.groups; ++g) {
        if (kept[g]) continue;
        for (int64_t i = g * per; i < (g + 1) * per; ++i) keys[i] = kMaskedKey;
      }
    }
    int32_t* row_ids = call.ids + row * k;
    if (k > kLanes || !select_few(keys, n, k, row_ids)) select_many(keys, n, k, best, row_ids);

    float* w = call.weights + row * k;
    float total = 0.0f;
    for (int64_t j = 0; j < k; ++j) total += w[j] = s[row_ids[j]];
    bool bad = false;
    for (int64_t j = 0; j < k; ++j) {
      w[j] = (call.renormalize ? w[j] / (total + 1e-20f) : w[j]) * call.scale;
      bad = bad || w[j] != w[j];
    }
    if (bad && call.nan_zero) {
      for (int64_t j = 0; j < k; ++j) w[j] = 0.0f;
    }
  }
  if (x != small) std::free(x);
}

void moe_route_bwd(const MoeRouteBwdCall& call, int64_t row_begin, int64_t row_end) {
  const int64_t n = call.experts, k = call.top_k;
  float* x = static_cast<float*>(std::malloc(sizeof(float) * 3 * n));
  float* s = x + n;
  float* dx = s + n;
  for (int64_t row = row_begin; row < row_end; ++row) {
    TILEFUSE_BY_DTYPE(call.dtype, T, {
      const T* source = static_cast<const T*>(call.logits) + row * call.stride;
      for (int64_t i = 0; i < n; ++i) x[i] = to_float(source[i]);
    })
    scores_of_row(x, s, n, call.score);
    const int32_t* row_ids = call.ids + row * k;
    const float* g = call.dweights + row * k;
    float total = 1e-20f, dot = 0.0f;
    bool bad = false;
    for (int64_t j = 0; j < k; ++j) {
      const float chosen = s[row_ids[j]];
      total += chosen;
      dot += g[j] * call.scale * chosen;
    }
    float inner = 0.0f;
    if (call.score == RouteScore::softmax) inner = call.renormalize ? dot * 1e-20f / (total * total) : dot;
    for (int64_t i = 0; i < n; ++i) dx[i] = call.score == RouteScore::softmax ? s[i] * (0.0f - inner) : 0.0f;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t i = row_ids[j];
      const float d = call.renormalize ? (g[j] * call.scale - dot / total) / total : g[j] * call.scale;
      const float w = (call.renormalize ? s[i] / total : s[i]) * call.scale;
      bad = bad || w != w;
      float slope = 1.0f;
      if (call.score == RouteScore::softmax) slope = s[i];
      if (call.score == RouteScore::sigmoid) slope = s[i] * (1.0f - s[i]);
      if (call.score == RouteScore::sqrtsoftplus) slope = s[i] == 0.0f ? 0.0f : sigmoid_f32(x[i]) / (2.0f * s[i]);
      dx[i] = slope * (d - inner);
    }
    if (bad && call.nan_zero) {
      for (int64_t i = 0; i < n; ++i) dx[i] = 0.0f;
    }
    TILEFUSE_BY_DTYPE(call.dtype, T, {
      T* target = static_cast<T*>(call.dlogits) + row * n;
      for (int64_t i = 0; i < n; ++i) target[i] = from_float<T>(dx[i]);
    })
  }
  std::free(x);
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(moe_route_fwd)
TILEFUSE_DISPATCH(moe_route_bwd)

namespace {

// rows per task: short ranges stay on the calling thread
int64_t route_grain(int64_t experts) { return 4096 / experts > 8 ? 4096 / experts : 8; }

std::tuple<Tensor, Tensor> route_fwd(Tensor logits, OptionalTensor bias, int64_t top_k, std::string score,
                                     bool renormalize, int64_t n_group, int64_t topk_group, std::string group_score,
                                     double scale, std::string nan_policy) {
  const int64_t tokens = logits.size(0);
  Tensor weights = empty_of(logits, {tokens, top_k}, ScalarType::Float);
  Tensor ids = empty_of(logits, {tokens, top_k}, ScalarType::Int);
  MoeRouteCall call{};
  call.experts = logits.size(1);
  call.top_k = top_k;
  call.groups = n_group;
  call.topk_group = topk_group;
  call.score = route_score_named(score.c_str());
  call.renormalize = renormalize;
  call.top2 = group_score == "top2";
  call.nan_zero = nan_policy == "zero";
  call.scale = static_cast<float>(scale);
  call.dtype = dtype_of(logits);
  call.logits = logits.const_data_ptr();
  call.stride = logits.stride(0);
  call.bias = pointer<const float>(bias);
  call.weights = pointer<float>(weights);
  call.ids = pointer<int32_t>(ids);
  run_parallel(moe_route_fwd, tokens, route_grain(call.experts), call);
  return {weights, ids};
}

Tensor route_bwd(Tensor dweights, Tensor logits, Tensor ids, std::string score, bool renormalize, double scale,
                 std::string nan_policy) {
  const int64_t tokens = logits.size(0);
  Tensor dlogits = empty_of(logits, {tokens, logits.size(1)});
  MoeRouteBwdCall call{};
  call.experts = logits.size(1);
  call.top_k = ids.size(1);
  call.score = route_score_named(score.c_str());
  call.renormalize = renormalize;
  call.nan_zero = nan_policy == "zero";
  call.scale = static_cast<float>(scale);
  call.dtype = dtype_of(logits);
  call.dweights = pointer<const float>(dweights);
  call.logits = logits.const_data_ptr();
  call.stride = logits.stride(0);
  call.ids = pointer<const int32_t>(ids);
  call.dlogits = dlogits.mutable_data_ptr();
  run_parallel(moe_route_bwd, tokens, route_grain(call.experts), call);
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_route_fwd", TORCH_BOX(&route_fwd));
  m.impl("moe_route_bwd", TORCH_BOX(&route_bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
