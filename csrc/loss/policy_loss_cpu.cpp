// policy_loss on the CPU: a sequence is one task, in pieces of kPiece tokens that stay in L1.
#include "common/cpu_math.h"
#include "common/floats_cpu.h"

namespace tilefuse {

enum class PolicyKind : int32_t { clip, cispo, reinforce };
enum class PolicyKl : int32_t { none, k1, k2, k3, k3_plus };

struct PolicyLossCall {
  const float* logp;
  const float* advantages;  // [T], or one per sequence
  bool per_sequence;
  const float* old_logp;      // or nullptr: logp itself
  const float* ref_logp;      // or nullptr
  const uint8_t* mask;        // or nullptr: all kept
  const float* token_weight;  // or nullptr: all 1
  Index bounds;               // of packed sequences; without data a sequence has `length` tokens
  int64_t tokens, sequences, length;
  PolicyKind kind;
  PolicyKl kl;
  bool by_sequence;  // one ratio for each sequence
  float low, high, dual, beta, limit;
  bool kl_weighted;
};

// sums over the kept tokens of a sequence
struct PolicySums {
  double loss, count, low, high, dual, k1, k3, ratio;
  float largest;
};

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kPiece = 256;

struct Span {
  int64_t begin, end;
};

inline int64_t clamped(int64_t at, int64_t high) { return at < 0 ? 0 : at < high ? at : high; }

inline Span span_of(const PolicyLossCall& call, int64_t sequence) {
  if (call.bounds.data != nullptr) {
    return {clamped(call.bounds[sequence], call.tokens), clamped(call.bounds[sequence + 1], call.tokens)};
  }
  const int64_t begin = sequence * call.length;
  return {begin, clamped(begin + call.length, call.tokens)};
}

// tokens of a piece, neutral where masked and past its end
struct Piece {
  float keep[kPiece], weight[kPiece], logp[kPiece], advantage[kPiece], token_log[kPiece], e[kPiece];
};

// neutral past the tokens of a piece
void fill_rest(float* out, int64_t count) {
  for (int64_t i = count; i < kPiece; ++i) out[i] = 0.0f;
}

// x - y of kept tokens; without y, x alone
void kept_difference(const float* keep, const float* x, const float* y, int64_t count, float* out) {
  if (y == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = x[i];
      out[i] = keep[i] != 0.0f ? value : 0.0f;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float value = x[i] - y[i];
      out[i] = keep[i] != 0.0f ? value : 0.0f;
    }
  }
  fill_rest(out, count);
}

void fill(float* out, float value) {
  for (int64_t i = 0; i < kPiece; ++i) out[i] = value;
}

void load_keep(const PolicyLossCall& call, int64_t begin, int64_t count, float* keep) {
  fill(keep, 1.0f);
  if (call.mask != nullptr) {
    for (int64_t i = 0; i < count; ++i) keep[i] = call.mask[begin + i] != 0 ? 1.0f : 0.0f;
  }
  fill_rest(keep, count);
}

void load_log_ratio(const PolicyLossCall& call, int64_t begin, int64_t count, Piece& p) {
  if (call.old_logp == nullptr) {
    fill(p.token_log, 0.0f);
  } else {
    kept_difference(p.keep, call.logp + begin, call.old_logp + begin, count, p.token_log);
  }
}

void load(const PolicyLossCall& call, int64_t sequence, int64_t begin, int64_t count, Piece& p) {
  load_keep(call, begin, count, p.keep);
  load_log_ratio(call, begin, count, p);
  kept_difference(p.keep, call.logp + begin, nullptr, count, p.logp);
  if (call.token_weight == nullptr) {
    for (int64_t i = 0; i < kPiece; ++i) p.weight[i] = p.keep[i];
  } else {
    kept_difference(p.keep, call.token_weight + begin, nullptr, count, p.weight);
  }
  if (call.per_sequence) {
    fill(p.advantage, call.advantages[sequence]);
    kept_difference(p.keep, p.advantage, nullptr, count, p.advantage);
  } else {
    kept_difference(p.keep, call.advantages + begin, nullptr, count, p.advantage);
  }
  if (call.ref_logp == nullptr) {
    fill(p.e, 0.0f);
  } else {
    kept_difference(p.keep, call.ref_logp + begin, call.logp + begin, count, p.e);
  }
}

inline float total(const float* x) {
  Floats sum = get(x, 0, ManyFloats{});
  for (int64_t i = kFloats; i < kPiece; i += kFloats) sum += get(x, i, ManyFloats{});
  float part[kFloats];
  put(part, 0, sum);
  for (int64_t width = kFloats / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) part[l] += part[l + width];
  }
  return part[0];
}

inline float maximum(const float* x) {
  Floats most = get(x, 0, ManyFloats{});
  for (int64_t i = kFloats; i < kPiece; i += kFloats) {
    const Floats here = get(x, i, ManyFloats{});
    most = here > most ? here : most;
  }
  float part[kFloats];
  put(part, 0, most);
  for (int64_t l = 1; l < kFloats; ++l) part[0] = part[l] > part[0] ? part[l] : part[0];
  return part[0];
}

// What follows computes all branches and then chooses, so that loops over it vectorise.

// NaN stays NaN
inline float limited(float x, float limit) {
  const bool above = x > limit, below = x < -limit;
  const float y = above ? limit : x;
  return below ? -limit : y;
}

inline bool is_inside(float x, float limit) {
  const bool above = x > limit, below = x < -limit;
  return !(above | below);
}

// factor * x, where a factor of 0 gives 0 even times inf
inline float nonzero(float factor, float x) {
  const float product = factor * x;
  return factor == 0.0f ? 0.0f : product;
}

// exp(e) - e - 1, by its series where that cancels
inline float k3_of(float e) {
  float series = 1.0f + e * (1.0f / 11.0f);
  series = 1.0f + series * e * (1.0f / 10.0f);
  series = 1.0f + series * e * (1.0f / 9.0f);
  series = 1.0f + series * e * (1.0f / 8.0f);
  series = 1.0f + series * e * (1.0f / 7.0f);
  series = 1.0f + series * e * (1.0f / 6.0f);
  series = 1.0f + series * e * (1.0f / 5.0f);
  series = 1.0f + series * e * (1.0f / 4.0f);
  series = 1.0f + series * e * (1.0f / 3.0f);
  const float near = e * e * 0.5f * series, far = exp_f32(e) - 1.0f - e;
  const bool below = e<1.0f, above = e> - 1.0f;
  return below & above ? near : far;
}

// number of tokens kept, and the mean of their log-ratio
struct Mean {
  float count, log_ratio;
};

Mean mean_of(const PolicyLossCall& call, int64_t sequence, Piece& p) {
  const Span span = span_of(call, sequence);
  double count = 0.0, sum = 0.0;
  for (int64_t at = span.begin; at < span.end; at += kPiece) {
    const int64_t here = span.end - at < kPiece ? span.end - at : kPiece;
    load_keep(call, at, here, p.keep);
    load_log_ratio(call, at, here, p);
    count += total(p.keep);
    sum += total(p.token_log);
  }
  return {static_cast<float>(count), count > 0.0 ? static_cast<float>(sum / count) : 0.0f};
}

// what the loss of a piece and its gradient are made of
struct Terms {
  float loss[kPiece];    // unweighted
  float dratio[kPiece];  // derivative of the loss in the logarithm of the ratio
  float dlogp[kPiece];   // the rest of its derivative in logp
  float passes[kPiece];  // 1 where the log-ratio is within its limit
  float ratio[kPiece], low[kPiece], high[kPiece], dual[kPiece], k1[kPiece], k3[kPiece];
};

// `ratio` and `inside`: of the sequence, at that level
void policy_terms(const PolicyLossCall& call, float ratio, bool inside, const Piece& p, Terms& t) {
  if (call.by_sequence) {
    fill(t.ratio, ratio);
    fill(t.passes, inside ? 1.0f : 0.0f);
  } else {
    for (int64_t i = 0; i < kPiece; ++i) {
      t.ratio[i] = exp_f32(limited(p.token_log[i], call.limit));
      t.passes[i] = is_inside(p.token_log[i], call.limit) ? 1.0f : 0.0f;
    }
  }
  if (call.kind == PolicyKind::clip) {
    for (int64_t i = 0; i < kPiece; ++i) {
      const float a = p.advantage[i], r = t.ratio[i];
      const bool below = r<call.low, above = r> call.high, far = r > call.dual, worse = a < 0.0f, better = a > 0.0f;
      const bool low = below & worse, high = above & better, dual = far & worse;
      float used = dual ? call.dual : r;
      used = high ? call.high : used;
      used = low ? call.low : used;
      const float slope = nonzero(-a, r);
      t.dratio[i] = low | high | dual | (t.passes[i] == 0.0f) ? 0.0f : slope;
      t.loss[i] = nonzero(-a, used);
      t.dlogp[i] = 0.0f;
      t.low[i] = low ? 1.0f : 0.0f;
      t.high[i] = high ? 1.0f : 0.0f;
      t.dual[i] = dual ? 1.0f : 0.0f;
    }
    return;
  }
  // the ratio counts for cispo alone
  const bool cispo = call.kind == PolicyKind::cispo;
  for (int64_t i = 0; i < kPiece; ++i) {
    const bool high = cispo & (t.ratio[i] > call.high);
    const float used = high ? call.high : cispo ? t.ratio[i] : 1.0f;
    t.dlogp[i] = nonzero(-p.advantage[i], used);
    t.loss[i] = nonzero(t.dlogp[i], p.logp[i]);
    t.high[i] = high ? p.keep[i] : 0.0f;
    t.low[i] = t.dual[i] = t.dratio[i] = 0.0f;
  }
}

void kl_terms(const PolicyLossCall& call, const Piece& p, Terms& t) {
  if (call.ref_logp == nullptr) {
    fill(t.k1, 0.0f);
    fill(t.k3, 0.0f);
    return;
  }
  for (int64_t i = 0; i < kPiece; ++i) {
    const float e = limited(p.e[i], call.limit);
    t.k1[i] = -e;
    t.k3[i] = k3_of(e);
  }
  if (call.kl == PolicyKl::none) return;
  float value[kPiece], slope[kPiece];
  for (int64_t i = 0; i < kPiece; ++i) {
    value[i] = t.k3[i];
    slope[i] = t.k1[i];
  }
  if (call.kl == PolicyKl::k1) {
    for (int64_t i = 0; i < kPiece; ++i) value[i] = t.k1[i];
    fill(slope, 1.0f);
  } else if (call.kl == PolicyKl::k2) {
    for (int64_t i = 0; i < kPiece; ++i) value[i] = t.k1[i] * t.k1[i] * 0.5f;
  } else if (call.kl == PolicyKl::k3) {
    for (int64_t i = 0; i < kPiece; ++i) slope[i] = -(t.k3[i] - t.k1[i]);
  }
  for (int64_t i = 0; i < kPiece; ++i) slope[i] = is_inside(p.e[i], call.limit) ? slope[i] : 0.0f;
  if (call.kl_weighted) {
    for (int64_t i = 0; i < kPiece; ++i) {
      const float r = exp_f32(limited(p.token_log[i], call.limit));
      const float through = is_inside(p.token_log[i], call.limit) ? value[i] : 0.0f;
      slope[i] = r * (slope[i] + through);
      value[i] = r * value[i];
    }
  }
  for (int64_t i = 0; i < kPiece; ++i) {
    t.loss[i] += call.beta * value[i];
    t.dlogp[i] += call.beta * slope[i];
  }
}

// the ratio of a sequence, at that level, and whether its logarithm is within the limit
struct Ratio {
  float value;
  bool inside;
};

Ratio ratio_of(const PolicyLossCall& call, float log_ratio) {
  return {exp_f32(limited(log_ratio, call.limit)), is_inside(log_ratio, call.limit)};
}

}  // namespace

// `loss` [T] or nullptr was zeroed
void policy_fwd(const PolicyLossCall& call, float* loss, PolicySums* sums, int64_t begin, int64_t end) {
  Piece p;
  Terms t;
  float each[kPiece];
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const Span span = span_of(call, sequence);
    Ratio ratio{1.0f, true};
    if (call.by_sequence) ratio = ratio_of(call, mean_of(call, sequence, p).log_ratio);
    PolicySums s = {};
    for (int64_t at = span.begin; at < span.end; at += kPiece) {
      const int64_t count = span.end - at < kPiece ? span.end - at : kPiece;
      load(call, sequence, at, count, p);
      policy_terms(call, ratio.value, ratio.inside, p, t);
      kl_terms(call, p, t);
      for (int64_t i = 0; i < kPiece; ++i) {
        each[i] = nonzero(p.weight[i], t.loss[i]);
        t.ratio[i] = p.keep[i] == 0.0f ? 0.0f : t.ratio[i];
      }
      const float here = maximum(t.ratio);
      s.largest = here > s.largest ? here : s.largest;
      if (loss != nullptr) {
        for (int64_t i = 0; i < count; ++i) loss[at + i] = each[i];
      }
      s.loss += total(each);
      s.count += total(p.keep);
      s.low += total(t.low);
      s.high += total(t.high);
      s.dual += total(t.dual);
      s.k1 += total(t.k1);
      s.k3 += total(t.k3);
      s.ratio += total(t.ratio);
    }
    sums[sequence] = s;
  }
}

// dlogp was zeroed. Upstream: `dloss` of each token or, without `each`, of all; divided by `divisor` and with `mean` by
// the number of the sequence's tokens.
void policy_bwd(const PolicyLossCall& call, const float* dloss, bool each, float divisor, bool mean, float* dlogp,
                int64_t begin, int64_t end) {
  Piece p;
  Terms t;
  float c[kPiece], through[kPiece];
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const Span span = span_of(call, sequence);
    Ratio ratio{1.0f, true};
    float size = 1.0f;
    if (call.by_sequence || mean) {
      const Mean found = mean_of(call, sequence, p);
      ratio = ratio_of(call, found.log_ratio);
      size = found.count > 1.0f ? found.count : 1.0f;
    }
    const float one = each || divisor == 0.0f ? 0.0f : mean ? dloss[0] / divisor / size : dloss[0] / divisor;
    // at the level of the sequence the first pass collects what the second one spreads
    double sum = 0.0;
    const int first = call.by_sequence && call.kind == PolicyKind::clip ? 0 : 1;
    for (int pass = first; pass < 2; ++pass) {
      const float spread = static_cast<float>(sum / size);
      for (int64_t at = span.begin; at < span.end; at += kPiece) {
        const int64_t count = span.end - at < kPiece ? span.end - at : kPiece;
        load(call, sequence, at, count, p);
        policy_terms(call, ratio.value, ratio.inside, p, t);
        kl_terms(call, p, t);
        fill(c, one);
        if (each) {
          for (int64_t i = 0; i < count; ++i) c[i] = dloss[at + i];
        }
        for (int64_t i = 0; i < kPiece; ++i) {
          c[i] = nonzero(p.weight[i], c[i]);
          through[i] = nonzero(c[i], t.dratio[i]);
        }
        if (pass == 0) {
          sum += total(through);
          continue;
        }
        if (first == 0) {
          for (int64_t i = 0; i < kPiece; ++i) through[i] = p.keep[i] == 0.0f ? 0.0f : spread;
        }
        for (int64_t i = 0; i < count; ++i) dlogp[at + i] = through[i] + nonzero(c[i], t.dlogp[i]);
      }
    }
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include <limits>

namespace tilefuse {

TILEFUSE_DISPATCH(policy_fwd)
TILEFUSE_DISPATCH(policy_bwd)

namespace {

// packed tokens without bounds are cut into pieces of this many
constexpr int64_t kLoose = 4096;

struct PolicyTensors {
  const Tensor& logp;
  const Tensor& advantages;
  const OptionalTensor& old_logp;
  const OptionalTensor& ref_logp;
  const OptionalTensor& mask;
  const OptionalTensor& token_weight;
  const OptionalTensor& cu_seqlens;
};

struct PolicyOptions {
  const std::string& kind;
  const std::string& level;
  double clip_low, clip_high, dual_clip;
  const std::string& kl;
  double kl_beta;
  bool kl_weighted;
  double log_ratio_limit;
};

PolicyLossCall policy_call(const PolicyTensors& tensors, const PolicyOptions& options) {
  const float inf = std::numeric_limits<float>::infinity();
  const int64_t tokens = tensors.logp.numel();
  int64_t sequences = (tokens + kLoose - 1) / kLoose, length = kLoose;
  if (tensors.cu_seqlens) {
    sequences = tensors.cu_seqlens->size(0) - 1;
  } else if (tensors.logp.dim() == 2) {
    sequences = tensors.logp.size(0);
    length = tensors.logp.size(1);
  }
  const PolicyKl kl = options.kl == "k1"   ? PolicyKl::k1
                      : options.kl == "k2" ? PolicyKl::k2
                      : options.kl == "k3" ? PolicyKl::k3
                                           : PolicyKl::k3_plus;
  return {pointer<const float>(tensors.logp),
          pointer<const float>(tensors.advantages),
          tensors.advantages.dim() == 2 && tensors.advantages.size(1) == 1,
          pointer<const float>(tensors.old_logp),
          pointer<const float>(tensors.ref_logp),
          tensors.mask ? static_cast<const uint8_t*>(tensors.mask->const_data_ptr()) : nullptr,
          pointer<const float>(tensors.token_weight),
          index_of(tensors.cu_seqlens),
          tokens,
          sequences,
          length,
          options.kind == "clip"    ? PolicyKind::clip
          : options.kind == "cispo" ? PolicyKind::cispo
                                    : PolicyKind::reinforce,
          options.kl_beta == 0.0 ? PolicyKl::none : kl,
          options.level == "sequence",
          static_cast<float>(1.0 - options.clip_low),
          static_cast<float>(1.0 + options.clip_high),
          options.dual_clip == 0.0 ? inf : static_cast<float>(options.dual_clip),
          static_cast<float>(options.kl_beta),
          options.log_ratio_limit == 0.0 ? inf : static_cast<float>(options.log_ratio_limit),
          options.kl_weighted};
}

// sequences per task: about 4096 tokens
int64_t policy_grain(const PolicyLossCall& call) {
  return 1 + kLoose * call.sequences / (call.tokens > 0 ? call.tokens : 1);
}

// what a reduction divides by
float divisor_of(const std::string& reduction, const OptionalTensor& num_items, double count, int64_t sequences) {
  if (num_items) return *pointer<const float>(*num_items);
  return reduction == "token"      ? static_cast<float>(count)
         : reduction == "sequence" ? static_cast<float>(sequences)
                                   : 1.0f;
}

std::tuple<Tensor, Tensor> fwd(Tensor logp, Tensor advantages, OptionalTensor old_logp, OptionalTensor ref_logp,
                               OptionalTensor mask, OptionalTensor token_weight, OptionalTensor cu_seqlens,
                               OptionalTensor num_items, std::string kind, std::string level, double clip_low,
                               double clip_high, double dual_clip, std::string kl, double kl_beta, bool kl_weighted,
                               double log_ratio_limit, std::string reduction) {
  const PolicyLossCall call =
      policy_call({logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens},
                  {kind, level, clip_low, clip_high, dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit});
  const bool each = reduction == "none";
  Tensor loss = each ? torch::stable::new_zeros(logp, logp.sizes()) : torch::stable::new_empty(logp, {});
  Tensor stats = torch::stable::new_empty(logp, {8});
  std::vector<PolicySums> sums(static_cast<size_t>(call.sequences));
  run_parallel(policy_fwd, call.sequences, policy_grain(call), call, each ? pointer<float>(loss) : nullptr,
               sums.data());
  PolicySums all = {};
  double sum = 0.0;
  for (const PolicySums& s : sums) {
    sum += reduction == "sequence" ? (s.count > 0.0 ? s.loss / s.count : 0.0) : s.loss;
    all.count += s.count;
    all.low += s.low;
    all.high += s.high;
    all.dual += s.dual;
    all.k1 += s.k1;
    all.k3 += s.k3;
    all.ratio += s.ratio;
    all.largest = s.largest > all.largest ? s.largest : all.largest;
  }
  const double n = all.count > 0.0 ? all.count : 1.0;
  const double means[] = {all.low / n, all.high / n, all.dual / n, all.k1 / n, all.k3 / n, all.ratio / n};
  float* out = pointer<float>(stats);
  out[0] = static_cast<float>(all.count);
  for (int i = 0; i < 6; ++i) out[i + 1] = static_cast<float>(means[i]);
  // comparisons left a NaN out
  out[7] = out[6] == out[6] ? all.largest : out[6];
  if (!each) {
    const float divisor = divisor_of(reduction, num_items, all.count, call.sequences);
    *pointer<float>(loss) = divisor == 0.0f ? 0.0f : static_cast<float>(sum / divisor);
  }
  return {loss, stats};
}

Tensor bwd(Tensor dloss, Tensor stats, Tensor logp, Tensor advantages, OptionalTensor old_logp, OptionalTensor ref_logp,
           OptionalTensor mask, OptionalTensor token_weight, OptionalTensor cu_seqlens, OptionalTensor num_items,
           std::string kind, std::string level, double clip_low, double clip_high, double dual_clip, std::string kl,
           double kl_beta, bool kl_weighted, double log_ratio_limit, std::string reduction) {
  const PolicyLossCall call =
      policy_call({logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens},
                  {kind, level, clip_low, clip_high, dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit});
  Tensor dlogp = torch::stable::new_zeros(logp, logp.sizes());
  const float divisor = divisor_of(reduction, num_items, *pointer<const float>(stats), call.sequences);
  run_parallel(policy_bwd, call.sequences, policy_grain(call), call, pointer<const float>(dloss), reduction == "none",
               divisor, reduction == "sequence", pointer<float>(dlogp));
  return dlogp;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&fwd));
  m.impl("policy_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
