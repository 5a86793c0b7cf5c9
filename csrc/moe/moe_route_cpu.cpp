// moe_route on the CPU: scores of a row in vector lanes, then a threshold scan for the best k.
#include "common/cpu.h"
#include "common/cpu_math.h"

namespace tilefuse {

enum class Score : int32_t { softmax, sigmoid, sqrtsoftplus, none };

struct RouteOptions {
  int64_t experts, top_k, groups, topk_group;
  Score score;
  bool renormalize, top2, nan_zero;
  float scale;
};

namespace TILEFUSE_ISA {

constexpr int64_t LANES = 16;
constexpr float NEG_INF = -__builtin_inff();
// keys: float32 bits in integer order, NaN below -inf, an expert of a masked group below that
constexpr int32_t NAN_KEY = -2147483647;
constexpr int32_t MASKED_KEY = -2147483647 - 1;

static inline int32_t ordered(float x) {
  // adding 0 turns -0 into 0
  const int32_t bits = static_cast<int32_t>(float_to_bits(x + 0.0f));
  return x != x ? NAN_KEY : bits ^ ((bits >> 31) & 0x7fffffff);
}

// lanes as values: comparisons and selections of whole vectors
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// by reference: passing such a vector by value would depend on the instruction set
template <typename V, typename T>
static inline void load(V& v, const T* p) {
  std::memcpy(&v, p, sizeof(V));
}

static inline float max_no_nan(const float* x, int64_t n) {
  Floats top = Floats{} + NEG_INF;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Floats v;
    load(v, x + i);
    top = v > top ? v : top;
  }
  float best = NEG_INF;
  for (int64_t l = 0; l < LANES; ++l) best = top[l] > best ? top[l] : best;
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// a sum in a fixed order that vectorises
static inline float sum_lanes(const float* x, int64_t n) {
  float part[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int64_t l = 0; l < LANES; ++l) part[l] += x[i + l];
  }
  for (int64_t l = 0; i + l < n; ++l) part[l] += x[i + l];
  for (int64_t width = LANES / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
  }
  return part[0];
}

// scores in plain arithmetic: NaN wherever that gives NaN; returns softmax's largest logit
static inline float scores_of_row(const float* x, float* s, int64_t n, Score score) {
  float top = 0.0f;
  switch (score) {
    case Score::softmax: {
      top = max_no_nan(x, n);
      for (int64_t i = 0; i < n; ++i) s[i] = exp_f32(x[i] - top);
      const float norm = sum_lanes(s, n);
      for (int64_t i = 0; i < n; ++i) s[i] = s[i] / norm;
      break;
    }
    case Score::sigmoid:
      for (int64_t i = 0; i < n; ++i) s[i] = sigmoid_f32(x[i]);
      break;
    case Score::sqrtsoftplus:
      for (int64_t i = 0; i < n; ++i) s[i] = std::sqrt(softplus_f32(x[i]));
      break;
    case Score::none:
      for (int64_t i = 0; i < n; ++i) s[i] = x[i];
      break;
  }
  return top;
}

// softmax with NaN set aside; the largest logit counts 1 even when it is infinite
static inline void selection_softmax(const float* x, float* s, int64_t n, float top) {
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

static inline void add(Top2& t, float x) {
  if (x > t.first) {
    t.second = t.first;
    t.first = x;
  } else if (x > t.second) {
    t.second = x;
  }
}

// the best, or the sum of the best two, of one group; NaN counts as -inf
static inline float group_score(const float* v, int64_t n, bool top2) {
  Floats first = Floats{} + NEG_INF;
  Floats second = first;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Floats x;
    load(x, v + i);
    x = x > NEG_INF ? x : Floats{} + NEG_INF;
    const Floats low = x < first ? x : first;
    second = low > second ? low : second;
    first = x > first ? x : first;
  }
  Top2 t{NEG_INF, NEG_INF};
  if (i > 0) {
    // fold the lanes: 16 to 8 to 4, then one by one
    float f[LANES], g[LANES];
    std::memcpy(f, &first, sizeof(f));
    std::memcpy(g, &second, sizeof(g));
    for (int64_t width = LANES / 2; width >= 4; width /= 2) {
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
  return sum > NEG_INF ? sum : NEG_INF;
}

// the k <= LANES largest of n keys, descending, equal keys by index; false when too many keys tie for a place
static inline bool select_few(const int32_t* keys, int64_t n, int64_t k, int32_t* ids) {
  constexpr int64_t CANDIDATES = 2 * LANES;
  // the k-th largest of the lanes' maxima bounds the k-th largest key from below: few keys pass it
  Ints top = Ints{} + MASKED_KEY;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Ints v;
    load(v, keys + i);
    top = v > top ? v : top;
  }
  Ints greater = {};
  for (int64_t l = 0; l < LANES; ++l) greater -= top[l] > top;
  const Ints eligible = greater < static_cast<int32_t>(k) ? top : Ints{} + 2147483647;
  int32_t bound = 2147483647;
  for (int64_t l = 0; l < LANES; ++l) bound = eligible[l] < bound ? eligible[l] : bound;
  // a masked key never passes
  bound = bound > MASKED_KEY ? bound : NAN_KEY;

  int32_t passed[CANDIDATES], index[CANDIDATES];
  int64_t count = 0;
  const auto pass = [&](int64_t j) {
    if (count < CANDIDATES) {
      passed[count] = keys[j];
      index[count] = static_cast<int32_t>(j);
    }
    ++count;
  };
  for (i = 0; i + LANES <= n; i += LANES) {
    uint32_t passing = 0;
    for (int64_t l = 0; l < LANES; ++l) passing |= static_cast<uint32_t>(keys[i + l] >= bound ? 1 : 0) << l;
    for (; passing != 0; passing &= passing - 1) pass(i + __builtin_ctz(passing));
  }
  for (; i < n; ++i) {
    if (keys[i] >= bound) pass(i);
  }
  if (count > CANDIDATES) return false;
  for (int64_t c = count; c < CANDIDATES; ++c) passed[c] = MASKED_KEY;

  // a candidate's place is the number of candidates in front of it
  Ints low, high;
  load(low, passed);
  load(high, passed + LANES);
  Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints low_place = {}, high_place = {};
  for (int32_t c = 0; c < static_cast<int32_t>(count); ++c) {
    const int32_t key = passed[c];
    low_place -= (key > low) | ((key == low) & (c < lane));
    high_place -= (key > high) | ((key == high) & (c < lane + static_cast<int32_t>(LANES)));
  }
  int32_t place[CANDIDATES];
  std::memcpy(place, &low_place, sizeof(low_place));
  std::memcpy(place + LANES, &high_place, sizeof(high_place));
  for (int64_t c = 0; c < count; ++c) {
    if (place[c] < k) ids[place[c]] = index[c];
  }
  return true;
}

// the same for any k; best [k] is scratch
static inline void select_many(const int32_t* keys, int64_t n, int64_t k, int32_t* best, int32_t* ids) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t key = keys[j];
    if (key == MASKED_KEY || (found == k && key <= best[k - 1])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && best[at - 1] < key; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = key;
    ids[at] = static_cast<int32_t>(j);
  }
}

void moe_route_fwd(const void* logits, int64_t stride, Dtype dtype, const float* bias, float* weights, int32_t* ids,
                   int64_t row_begin, int64_t row_end, const RouteOptions& o) {
  const int64_t n = o.experts, k = o.top_k, per = n / o.groups;
  // x, s, biased, keys, best keys, group scores
  float* x = static_cast<float*>(std::malloc(sizeof(float) * (4 * n + k + 2 * o.groups)));
  float* s = x + n;
  float* biased = s + n;
  int32_t* keys = reinterpret_cast<int32_t*>(biased + n);
  int32_t* best = keys + n;
  int32_t* group_keys = best + k;
  int32_t* kept = group_keys + o.groups;
  for (int64_t row = row_begin; row < row_end; ++row) {
    TILEFUSE_BY_DTYPE(dtype, T, {
      const T* source = static_cast<const T*>(logits) + row * stride;
      for (int64_t i = 0; i < n; ++i) x[i] = to_float(source[i]);
    })
    const float top = scores_of_row(x, s, n, o.score);
    const float* value = s;
    if (o.score == Score::softmax) {
      value = x;
      if (bias != nullptr || (o.groups > 1 && o.top2)) {
        selection_softmax(x, biased, n, top);
        value = biased;
      }
    }
    if (bias != nullptr) {
      for (int64_t i = 0; i < n; ++i) biased[i] = value[i] + bias[i];
      value = biased;
    }
    // without a bias, logits order like softmax scores and do not underflow to ties
    const float* key_value = o.score == Score::softmax && bias == nullptr ? x : value;
    for (int64_t i = 0; i < n; ++i) keys[i] = ordered(key_value[i]);

    if (o.groups > 1) {
      for (int64_t g = 0; g < o.groups; ++g) {
        group_keys[g] = ordered(group_score((o.top2 ? value : key_value) + g * per, per, o.top2));
        kept[g] = 0;
      }
      for (int64_t r = 0; r < o.topk_group; ++r) {
        int64_t winner = -1;
        for (int64_t g = 0; g < o.groups; ++g) {
          if (!kept[g] && (winner < 0 || group_keys[g] > group_keys[winner])) winner = g;
        }
        kept[winner] = 1;
      }
      for (int64_t g = 0; g < o.groups; ++g) {
        if (kept[g]) continue;
        for (int64_t i = g * per; i < (g + 1) * per; ++i) keys[i] = MASKED_KEY;
      }
    }
    int32_t* row_ids = ids + row * k;
    if (k > LANES || !select_few(keys, n, k, row_ids)) select_many(keys, n, k, best, row_ids);

    float* w = weights + row * k;
    float total = 0.0f;
    for (int64_t j = 0; j < k; ++j) total += w[j] = s[row_ids[j]];
    bool bad = false;
    for (int64_t j = 0; j < k; ++j) {
      w[j] = (o.renormalize ? w[j] / (total + 1e-20f) : w[j]) * o.scale;
      bad = bad || w[j] != w[j];
    }
    if (bad && o.nan_zero) {
      for (int64_t j = 0; j < k; ++j) w[j] = 0.0f;
    }
  }
  std::free(x);
}

void moe_route_bwd(const float* grad, const void* logits, int64_t stride, Dtype dtype, const int32_t* ids, void* out,
                   int64_t row_begin, int64_t row_end, const RouteOptions& o) {
  const int64_t n = o.experts, k = o.top_k;
  float* x = static_cast<float*>(std::malloc(sizeof(float) * 3 * n));
  float* s = x + n;
  float* dx = s + n;
  for (int64_t row = row_begin; row < row_end; ++row) {
    TILEFUSE_BY_DTYPE(dtype, T, {
      const T* source = static_cast<const T*>(logits) + row * stride;
      for (int64_t i = 0; i < n; ++i) x[i] = to_float(source[i]);
    })
    scores_of_row(x, s, n, o.score);
    const int32_t* row_ids = ids + row * k;
    const float* g = grad + row * k;
    float total = 1e-20f, dot = 0.0f;
    bool bad = false;
    for (int64_t j = 0; j < k; ++j) {
      const float chosen = s[row_ids[j]];
      total += chosen;
      dot += g[j] * o.scale * chosen;
    }
    float inner = 0.0f;
    if (o.score == Score::softmax) inner = o.renormalize ? dot * 1e-20f / (total * total) : dot;
    for (int64_t i = 0; i < n; ++i) dx[i] = o.score == Score::softmax ? s[i] * (0.0f - inner) : 0.0f;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t i = row_ids[j];
      const float d = o.renormalize ? (g[j] * o.scale - dot / total) / total : g[j] * o.scale;
      const float w = (o.renormalize ? s[i] / total : s[i]) * o.scale;
      bad = bad || w != w;
      float slope = 1.0f;
      if (o.score == Score::softmax) slope = s[i];
      if (o.score == Score::sigmoid) slope = s[i] * (1.0f - s[i]);
      if (o.score == Score::sqrtsoftplus) slope = s[i] == 0.0f ? 0.0f : sigmoid_f32(x[i]) / (2.0f * s[i]);
      dx[i] = slope * (d - inner);
    }
    if (bad && o.nan_zero) {
      for (int64_t i = 0; i < n; ++i) dx[i] = 0.0f;
    }
    TILEFUSE_BY_DTYPE(dtype, T, {
      T* target = static_cast<T*>(out) + row * n;
      for (int64_t i = 0; i < n; ++i) target[i] = from_float<T>(dx[i]);
    })
  }
  std::free(x);
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include <optional>
#include <string>
#include <tuple>

namespace tilefuse {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

TILEFUSE_DISPATCH(moe_route_fwd, (const void*, int64_t, Dtype, const float*, float*, int32_t*, int64_t, int64_t,
                                  const RouteOptions&))
TILEFUSE_DISPATCH(moe_route_bwd, (const float*, const void*, int64_t, Dtype, const int32_t*, void*, int64_t, int64_t,
                                  const RouteOptions&))

// rows per task: short ranges stay on the calling thread
static int64_t route_grain(int64_t experts) { return 4096 / experts > 8 ? 4096 / experts : 8; }

static Score score_of(const std::string& name) {
  if (name == "softmax") return Score::softmax;
  if (name == "sigmoid") return Score::sigmoid;
  return name == "sqrtsoftplus" ? Score::sqrtsoftplus : Score::none;
}

static std::tuple<Tensor, Tensor> route_fwd(Tensor logits, std::optional<Tensor> bias, int64_t top_k,
                                            std::string score, bool renormalize, int64_t n_group, int64_t topk_group,
                                            std::string group_score, double scale, std::string nan_policy) {
  const int64_t tokens = logits.size(0);
  const RouteOptions options{logits.size(1),  top_k,       n_group,
                             topk_group,      score_of(score), renormalize,
                             group_score == "top2", nan_policy == "zero", static_cast<float>(scale)};
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Int);
  const auto run = moe_route_fwd_dispatch();
  parallel_for(0, tokens, route_grain(options.experts), [&](int64_t begin, int64_t end) {
    run(logits.data_ptr(), logits.stride(0), dtype_of(logits),
        bias ? static_cast<const float*>(bias->data_ptr()) : nullptr, static_cast<float*>(weights.data_ptr()),
        static_cast<int32_t*>(ids.data_ptr()), begin, end, options);
  });
  return {weights, ids};
}

static Tensor route_bwd(Tensor grad, Tensor logits, Tensor ids, std::string score, bool renormalize, double scale,
                        std::string nan_policy) {
  const int64_t tokens = logits.size(0);
  const RouteOptions options{logits.size(1),   ids.size(1), 1,
                             1,                score_of(score), renormalize,
                             false,            nan_policy == "zero", static_cast<float>(scale)};
  Tensor out = torch::stable::new_empty(logits, {tokens, logits.size(1)});
  const auto run = moe_route_bwd_dispatch();
  parallel_for(0, tokens, route_grain(options.experts), [&](int64_t begin, int64_t end) {
    run(static_cast<const float*>(grad.data_ptr()), logits.data_ptr(), logits.stride(0), dtype_of(logits),
        static_cast<const int32_t*>(ids.data_ptr()), out.data_ptr(), begin, end, options);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_route_fwd", TORCH_BOX(&route_fwd));
  m.impl("moe_route_bwd", TORCH_BOX(&route_bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
