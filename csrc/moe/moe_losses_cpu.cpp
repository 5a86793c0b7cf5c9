// Losses of a router on the CPU. Rows are summed in blocks of fixed length and the blocks in their order, so that the
// number of threads does not matter.
#include "moe/scores_cpu.h"

namespace tilefuse {

// rows of a block
constexpr int64_t kLossRows = 64;

struct RouterRows {
  Dtype dtype;
  const void* logits;
  int64_t stride, tokens, experts;
  const uint8_t* valid;  // [T] or nullptr: all rows

  // inlined always: each CPU kernel is compiled once per instruction set, and the copies must not be merged
  __attribute__((always_inline)) bool used(int64_t row) const { return valid == nullptr || valid[row] != 0; }
};

struct BalanceCall {
  RouterRows rows;
  RouteScore score;
  bool normalized;  // scores are divided by their sum
  int64_t length;   // of a sequence
  int64_t blocks;   // of a sequence
};

// what the blocks found, and what experts are counted by
struct BalanceSums {
  Index ids;
  int64_t top_k, choices;  // the first `choices` of the `top_k` count
  int64_t devices;
  bool by_token;    // a device counts a token once: hits are [D] instead of [E]
  bool by_device;   // experts of a device share its hits
  double factor;    // of the loss, over the number of sequences with a valid token
  float* scores;    // [blocks, E]
  int32_t* hits;    // [blocks, E or D]
  int32_t* counts;  // [blocks] valid rows

  __attribute__((always_inline)) int64_t width(int64_t experts) const { return by_token ? devices : experts; }
};

namespace TILEFUSE_ISA {

namespace {

// log of x >= 1, and of 0, inf and NaN, to about 2 ulp
inline float log_f32(float x) {
  const uint32_t bits = float_to_bits(x);
  const float power = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float mantissa = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
  const float value = power * 0.693147180559945f + log1p_unit_f32(mantissa - 1.0f);
  const float special = x == 0.0f ? -__builtin_inff() : x;
  return x >= 1.0f && x < __builtin_inff() ? value : special;
}

// exp of x <= 0 for sums in which 1 is the largest term: off by |x| 2^-24 of itself, 0 below 2^-126
inline float exp_term(float x) {
  float t = x * 1.44269504088896341f;
  // written so that NaN passes
  t = t < -127.0f ? -127.0f : t;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = t + magic;
  const float f = t - (shifted - magic);
  float p = 1.326472614891827e-3f;
  p = p * f + 9.671512991189957e-3f;
  p = p * f + 5.550733581185341e-2f;
  p = p * f + 2.4022242426872253e-1f;
  p = p * f + 6.931470036506653e-1f;
  p = p * f + 1.0f;
  // the integer is in the lowest bits, and -127 comes out as 0
  return p * bits_to_float((float_to_bits(shifted) + 127u) << 23);
}

inline bool finite(float x) { return x - x == 0.0f; }

inline void load_row(const RouterRows& rows, int64_t row, float* x) {
  TILEFUSE_BY_DTYPE(rows.dtype, T, {
    const T* source = static_cast<const T*>(rows.logits) + row * rows.stride;
    for (int64_t i = 0; i < rows.experts; ++i) x[i] = to_float(source[i]);
  })
}

inline void store_row(const RouterRows& rows, int64_t row, const float* x, void* out) {
  TILEFUSE_BY_DTYPE(rows.dtype, T, {
    T* target = static_cast<T*>(out) + row * rows.experts;
    for (int64_t i = 0; i < rows.experts; ++i) target[i] = from_float<T>(x[i]);
  })
}

// s times the returned factor are the scores of x; kSummed: as terms of sums over tokens
template <bool kSummed>
inline float scaled_scores(const BalanceCall& call, const float* x, float* s) {
  const int64_t n = call.rows.experts;
  if (call.score == RouteScore::softmax) {
    const float top = max_no_nan(x, n);
    if (kSummed && finite(top)) {
      for (int64_t i = 0; i < n; ++i) s[i] = exp_term(x[i] - top);
    } else {
      for (int64_t i = 0; i < n; ++i) s[i] = exp_f32(x[i] - top);
    }
    return 1.0f / sum_lanes(s, n);
  }
  scores_of_row(x, s, n, call.score);
  if (!call.normalized) return 1.0f;
  const float total = sum_lanes(s, n);
  return total == 0.0f ? 0.0f : 1.0f / total;
}

}  // namespace

void z_loss_fwd(const RouterRows& rows, float* x, float* lse, double* partial, int64_t begin, int64_t end) {
  const int64_t n = rows.experts;
  float sum[kLossRows];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLossRows;
    const int64_t count = rows.tokens - first < kLossRows ? rows.tokens - first : kLossRows;
    float* top = lse + first;
    for (int64_t r = 0; r < count; ++r) {
      // log 1 for a row that does not count
      top[r] = 0.0f;
      sum[r] = 1.0f;
      if (!rows.used(first + r)) continue;
      load_row(rows, first + r, x);
      const float largest = max_no_nan(x, n);
      if (finite(largest)) {
        for (int64_t i = 0; i < n; ++i) x[i] = exp_term(x[i] - largest);
        top[r] = largest;
      } else {
        // as it is: inf - inf would be NaN
        for (int64_t i = 0; i < n; ++i) x[i] = exp_f32(x[i]);
      }
      sum[r] = sum_lanes(x, n);
    }
    for (int64_t r = 0; r < count; ++r) top[r] += log_f32(sum[r]);
    double total = 0.0;
    for (int64_t r = 0; r < count; ++r) total += static_cast<double>(top[r]) * static_cast<double>(top[r]);
    partial[block] = total;
  }
}

// slope is 2 dout / valid rows
void z_loss_bwd(const RouterRows& rows, float slope, const float* lse, float* x, void* dlogits, int64_t begin,
                int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (rows.used(row)) {
      load_row(rows, row, x);
      const float shift = lse[row], factor = slope * shift;
      for (int64_t i = 0; i < rows.experts; ++i) x[i] = factor * exp_f32(x[i] - shift);
    } else {
      std::memset(x, 0, sizeof(float) * rows.experts);
    }
    store_row(rows, row, x, dlogits);
  }
}

// sums of scores and hits of each block; x is scratch [2 * E]
void balance_sums(const BalanceCall& call, const BalanceSums& sums, float* x, int64_t begin, int64_t end) {
  const int64_t n = call.rows.experts, width = sums.width(n), per_device = n / sums.devices;
  float* s = x + n;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t sequence = block / call.blocks;
    const int64_t first = sequence * call.length + block % call.blocks * kLossRows;
    const int64_t stop = (sequence + 1) * call.length;
    const int64_t last = first + kLossRows < stop ? first + kLossRows : stop;
    float* p = sums.scores + block * n;
    int32_t* hits = sums.hits + block * width;
    std::memset(p, 0, sizeof(float) * n);
    std::memset(hits, 0, sizeof(int32_t) * width);
    int32_t count = 0;
    for (int64_t row = first; row < last; ++row) {
      if (!call.rows.used(row)) continue;
      ++count;
      load_row(call.rows, row, x);
      const float factor = scaled_scores<true>(call, x, s);
      for (int64_t i = 0; i < n; ++i) p[i] += s[i] * factor;
      for (int64_t j = 0; j < sums.choices; ++j) {
        const int64_t id = sums.ids[row * sums.top_k + j];
        if (id < 0 || id >= n) continue;
        if (!sums.by_token) {
          ++hits[id];
          continue;
        }
        bool seen = false;
        for (int64_t before = 0; before < j; ++before) {
          const int64_t other = sums.ids[row * sums.top_k + before];
          seen = seen || (other >= 0 && other < n && other / per_device == id / per_device);
        }
        if (!seen) ++hits[id / per_device];
      }
    }
    sums.counts[block] = count;
  }
}

// shares [S, E], the slope of the loss by a token's score, and the loss of each sequence; p is scratch [2 * E]
void balance_losses(const BalanceCall& call, const BalanceSums& sums, float* shares, double* losses, double* p,
                    int64_t begin, int64_t end) {
  const int64_t n = call.rows.experts, width = sums.width(n), per_device = n / sums.devices;
  double* f = p + n;
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    for (int64_t i = 0; i < 2 * n; ++i) p[i] = 0.0;
    int64_t count = 0;
    for (int64_t block = sequence * call.blocks; block < (sequence + 1) * call.blocks; ++block) {
      for (int64_t i = 0; i < n; ++i) p[i] += sums.scores[block * n + i];
      for (int64_t g = 0; g < width; ++g) f[g] += sums.hits[block * width + g];
      count += sums.counts[block];
    }
    const double size = count > 0 ? static_cast<double>(count) : 1.0;
    const int64_t reach = sums.choices < sums.devices ? sums.choices : sums.devices;
    const double even = sums.by_token ? static_cast<double>(sums.devices) / static_cast<double>(reach)
                                      : static_cast<double>(n) / static_cast<double>(sums.choices);
    const double scale = even / (size * size) * sums.factor;
    double loss = 0.0;
    for (int64_t d = 0; d < sums.devices; ++d) {
      double of_device = 0.0;
      if (sums.by_device) {
        for (int64_t i = d * per_device; i < (d + 1) * per_device; ++i) of_device += f[i];
        of_device /= static_cast<double>(per_device);
      } else if (sums.by_token) {
        of_device = f[d];
      }
      for (int64_t i = d * per_device; i < (d + 1) * per_device; ++i) {
        const double share = (sums.by_device || sums.by_token ? of_device : f[i]) * scale;
        loss += share * p[i];
        shares[sequence * n + i] = static_cast<float>(share);
      }
    }
    losses[sequence] = loss;
  }
}

// x is scratch [3 * E]
void balance_bwd(const BalanceCall& call, float dout, const float* shares, float* x, void* dlogits, int64_t begin,
                 int64_t end) {
  const int64_t n = call.rows.experts;
  float* s = x + n;
  float* d = s + n;
  for (int64_t row = begin; row < end; ++row) {
    if (!call.rows.used(row)) {
      std::memset(d, 0, sizeof(float) * n);
      store_row(call.rows, row, d, dlogits);
      continue;
    }
    load_row(call.rows, row, x);
    const float factor = scaled_scores<false>(call, x, s);
    const float* c = shares + row / call.length * n;
    // by a score's share of their sum: q (c - sum q c) for softmax
    float mean = 0.0f;
    if (call.score == RouteScore::softmax || call.normalized) {
      for (int64_t i = 0; i < n; ++i) d[i] = s[i] * factor * c[i];
      mean = sum_lanes(d, n);
    }
    const float g = dout * factor;
    switch (call.score) {
      case RouteScore::softmax:
        for (int64_t i = 0; i < n; ++i) d[i] = g * (c[i] - mean) * s[i];
        break;
      case RouteScore::sigmoid:
        for (int64_t i = 0; i < n; ++i) d[i] = g * (c[i] - mean) * (s[i] * (1.0f - s[i]));
        break;
      case RouteScore::sqrtsoftplus:
        for (int64_t i = 0; i < n; ++i) {
          const float slope = sigmoid_f32(x[i]) / (2.0f * s[i]);
          d[i] = s[i] == 0.0f ? 0.0f : g * (c[i] - mean) * slope;
        }
        break;
      case RouteScore::none:
        for (int64_t i = 0; i < n; ++i) d[i] = g * (c[i] - mean);
        break;
    }
    store_row(call.rows, row, d, dlogits);
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include <algorithm>
#include <numeric>

namespace tilefuse {

TILEFUSE_DISPATCH(z_loss_fwd)
TILEFUSE_DISPATCH(z_loss_bwd)
TILEFUSE_DISPATCH(balance_sums)
TILEFUSE_DISPATCH(balance_losses)
TILEFUSE_DISPATCH(balance_bwd)

namespace {

RouterRows router_rows(const Tensor& logits, const OptionalTensor& valid) {
  return {dtype_of(logits), logits.const_data_ptr(), logits.stride(0),
          logits.size(0),   logits.size(1),          pointer<const uint8_t>(valid)};
}

// rows per task: short ranges stay on the calling thread
int64_t loss_grain(const RouterRows& rows) { return 1 + 16384 / rows.experts; }

int64_t loss_blocks(int64_t rows) { return (rows + kLossRows - 1) / kLossRows; }

// valid rows, at least 1
int64_t counted(const RouterRows& rows) {
  if (rows.valid == nullptr) return std::max<int64_t>(rows.tokens, 1);
  const int64_t count = std::count_if(rows.valid, rows.valid + rows.tokens, [](uint8_t v) { return v != 0; });
  return std::max<int64_t>(count, 1);
}

Tensor scalar(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, {}, ScalarType::Float);
  *pointer<float>(out) = static_cast<float>(value);
  return out;
}

std::tuple<Tensor, Tensor> z_fwd(Tensor logits, OptionalTensor valid) {
  const RouterRows rows = router_rows(logits, valid);
  Tensor lse = torch::stable::new_empty(logits, {rows.tokens}, ScalarType::Float);
  std::vector<double> partial(loss_blocks(rows.tokens));
  run_parallel(z_loss_fwd, static_cast<int64_t>(partial.size()), 1 + loss_grain(rows) / kLossRows, rows,
               RangeScratch<float>{rows.experts}, pointer<float>(lse), partial.data());
  const double total = std::accumulate(partial.begin(), partial.end(), 0.0);
  return {scalar(logits, total / static_cast<double>(counted(rows))), lse};
}

Tensor z_bwd(Tensor dout, Tensor logits, Tensor lse, OptionalTensor valid) {
  const RouterRows rows = router_rows(logits, valid);
  Tensor dlogits = torch::stable::new_empty(logits, {rows.tokens, rows.experts});
  const float slope = 2.0f * *pointer<const float>(dout) / static_cast<float>(counted(rows));
  run_parallel(z_loss_bwd, rows.tokens, loss_grain(rows), rows, slope, pointer<const float>(lse),
               RangeScratch<float>{rows.experts}, dlogits.mutable_data_ptr());
  return dlogits;
}

std::tuple<Tensor, Tensor> fwd(Tensor logits, Tensor ids, OptionalTensor valid, std::string kind, std::string score,
                               int64_t n_devices, int64_t sequences, double scale) {
  const RouterRows rows = router_rows(logits, valid);
  const int64_t length = rows.tokens / sequences;
  const BalanceCall call{rows, route_score_named(score.c_str()), kind == "sequence", length, loss_blocks(length)};
  const int64_t blocks = sequences * call.blocks;

  BalanceSums sums{};
  sums.ids = index_of(ids);
  sums.top_k = ids.size(1);
  sums.choices = kind == "gshard" ? 1 : sums.top_k;
  sums.by_token = kind == "communication";
  sums.by_device = kind == "device";
  sums.devices = sums.by_token || sums.by_device ? n_devices : 1;
  const std::unique_ptr<float[]> scores(new float[blocks * rows.experts]);
  const std::unique_ptr<int32_t[]> hits(new int32_t[blocks * sums.width(rows.experts)]);
  std::vector<int32_t> counts(blocks);
  sums.scores = scores.get();
  sums.hits = hits.get();
  sums.counts = counts.data();
  run_parallel(balance_sums, blocks, 1 + loss_grain(rows) / std::min(kLossRows, length), call, sums,
               RangeScratch<float>{2 * rows.experts});

  int64_t used = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    used +=
        std::any_of(&counts[s * call.blocks], &counts[s * call.blocks] + call.blocks, [](int32_t c) { return c > 0; });
  }
  sums.factor = scale / static_cast<double>(std::max<int64_t>(used, 1));
  Tensor shares = torch::stable::new_empty(logits, {sequences, rows.experts}, ScalarType::Float);
  std::vector<double> losses(sequences);
  run_parallel(balance_losses, sequences, 1 + loss_grain(rows) / call.blocks, call, sums, pointer<float>(shares),
               losses.data(), RangeScratch<double>{2 * rows.experts});
  return {scalar(logits, std::accumulate(losses.begin(), losses.end(), 0.0)), shares};
}

Tensor bwd(Tensor dout, Tensor logits, Tensor shares, OptionalTensor valid, std::string score, bool normalized) {
  const RouterRows rows = router_rows(logits, valid);
  const BalanceCall call{rows, route_score_named(score.c_str()), normalized, rows.tokens / shares.size(0), 0};
  Tensor dlogits = torch::stable::new_empty(logits, {rows.tokens, rows.experts});
  run_parallel(balance_bwd, rows.tokens, loss_grain(rows), call, *pointer<const float>(dout),
               pointer<const float>(shares), RangeScratch<float>{3 * rows.experts}, dlogits.mutable_data_ptr());
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("moe_balance_loss_fwd", TORCH_BOX(&fwd));
  m.impl("moe_balance_loss_bwd", TORCH_BOX(&bwd));
  m.impl("moe_z_loss_fwd", TORCH_BOX(&z_fwd));
  m.impl("moe_z_loss_bwd", TORCH_BOX(&z_bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
