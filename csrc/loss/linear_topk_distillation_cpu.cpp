// linear_topk_distillation on the CPU: the pass over the vocabulary of linear_logprobs, in which listed ids leave the
// sums and have their logits written out, and the divergence of k + 1 categories in float64.
#include "loss/linear_cpu.h"

namespace tilefuse {

enum class DistillationTail { bucket, renormalize, none };

struct TopkDivergenceCall {
  LinearHead head;
  ListedIds listed;
  int64_t tokens, blocks;
  const float *stats, *logits, *teacher_logp;  // [T, blocks, 5], [T, k], [T, k]
  double beta;
  DistillationTail tail;
  float *losses, *gradient, *norm;  // [T], [T, k + 1], [2, T]
};

namespace TILEFUSE_ISA {

namespace {

constexpr double kInfinite = __builtin_inf();

// what a category adds to KL(a || b) of sides with the same sum: b - a - a log(b / a), which is not negative
inline double excess(double a, double log_a, double b, double log_b) {
  if (a == 0.0) return b;
  const double x = b - a - a * (log_b - log_a);
  return x < 0.0 ? 0.0 : x;
}

inline double or_zero(double x) { return x == -kInfinite ? 0.0 : x; }

// sums over the categories of one token
struct Divergence {
  double beta;
  double terms, student, teacher, slopes;
};

// adds a category; its slope is p times the derivative of the loss in p
inline double add_category(Divergence& d, double log_s, double log_t) {
  const double s = std::exp(log_s), t = std::exp(log_t);
  double slope;
  if (d.beta == 0.0) {
    d.terms += excess(t, log_t, s, log_s);
    slope = -t;
  } else if (d.beta == 1.0) {
    d.terms += excess(s, log_s, t, log_t);
    slope = s == 0.0 ? 0.0 : s * (log_s - log_t + 1.0);
  } else {
    const double m = (1.0 - d.beta) * s + d.beta * t, log_m = std::log(m);
    d.terms += d.beta * excess(t, log_t, m, log_m) + (1.0 - d.beta) * excess(s, log_s, m, log_m);
    slope = s == 0.0 ? 0.0 : (1.0 - d.beta) * s * (log_s - log_m);
  }
  d.student += s;
  d.teacher += t;
  d.slopes += slope;
  return slope;
}

// log_s, log_t, slopes [k]: room
inline void diverge(const TopkDivergenceCall& call, int64_t token, double* log_s, double* log_t, double* slopes) {
  const int64_t k = call.listed.count;
  // of the rest, as of logprobs' blocks
  double peak = -kInfinite, total = 0.0;
  for (int64_t b = 0; b < call.blocks; ++b) {
    const float* stats = call.stats + (token * call.blocks + b) * kStatsColumns;
    const double largest = stats[0], top = largest > peak ? largest : peak;
    total = total * std::exp(peak == -kInfinite ? 0.0 : peak - top) +
            stats[1] * std::exp(largest == -kInfinite ? 0.0 : largest - top);
    peak = top;
  }
  const int64_t first = first_listed(call.listed, token, 0);
  double top_s = call.tail == DistillationTail::renormalize ? -kInfinite : peak, top_t = -kInfinite;
  for (int64_t i = first; i < k; ++i) {
    log_s[i] = call.logits[token * k + i];
    log_t[i] = call.teacher_logp[token * k + i];
    if (log_s[i] > top_s) top_s = log_s[i];
    if (log_t[i] > top_t) top_t = log_t[i];
  }
  top_s = or_zero(top_s);
  top_t = or_zero(top_t);
  double sum_s = 0.0, sum_t = 0.0;
  for (int64_t i = first; i < k; ++i) {
    sum_s += std::exp(log_s[i] - top_s);
    sum_t += std::exp(log_t[i] - top_t);
  }
  const bool renormalize = call.tail == DistillationTail::renormalize, bucket = call.tail == DistillationTail::bucket;
  const bool others = k - first < call.head.vocabulary;
  const double rest = renormalize ? 0.0 : total * std::exp(or_zero(peak) - top_s);
  // of the student's masses relative to top_s
  const double log_sum = or_zero(std::log(sum_s + rest)), lse = top_s + log_sum;
  const double shift = renormalize ? top_t + or_zero(std::log(sum_t)) : 0.0;
  const double tail_t = 1.0 - sum_t * std::exp(top_t);
  const bool used = bucket && others && tail_t > 0.0 && rest != 0.0;

  Divergence d{call.beta, 0.0, 0.0, 0.0, 0.0};
  for (int64_t i = first; i < k; ++i) {
    log_s[i] -= lse;
    log_t[i] -= shift;
    slopes[i] = add_category(d, log_s[i], log_t[i]);
  }
  const double tail_log_s = std::log(rest) - log_sum;
  const double tail_slope = used ? add_category(d, tail_log_s, std::log(tail_t)) : 0.0;
  double loss = d.terms;
  // the sum that was asked for, where the sides' sums over it differ
  if (!renormalize && !used && !(bucket && !others)) {
    if (call.beta == 0.0) loss += d.teacher - d.student;
    if (call.beta == 1.0) loss += d.student - d.teacher;
  }
  call.losses[token] = static_cast<float>(loss);
  float* gradient = call.gradient + token * (k + 1);
  for (int64_t i = 0; i < first; ++i) gradient[i] = 0.0f;
  for (int64_t i = first; i < k; ++i) gradient[i] = static_cast<float>(slopes[i] - std::exp(log_s[i]) * d.slopes);
  gradient[k] = static_cast<float>(tail_slope - std::exp(tail_log_s) * d.slopes);
  call.norm[token] = total == 0.0 ? 0.0f : static_cast<float>(peak);
  call.norm[call.tokens + token] = total == 0.0 ? __builtin_inff() : static_cast<float>(std::log(total));
}

}  // namespace

// tokens [begin, end) of those that are kept; room: [3 k]
void topk_divergence(const TopkDivergenceCall& call, double* room, int64_t begin, int64_t end) {
  const int64_t k = call.listed.count;
  for (int64_t i = begin; i < end; ++i) diverge(call, call.head.kept[i], room, room + k, room + 2 * k);
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(topk_divergence)

namespace {

DistillationTail tail_of(const std::string& tail) {
  if (tail == "bucket") return DistillationTail::bucket;
  return tail == "renormalize" ? DistillationTail::renormalize : DistillationTail::none;
}

// of the tokens that are kept
void check_listed(const LinearHead& head, const ListedIds& listed) {
  const std::string name = "tilefuse.linear_topk_distillation: teacher_ids must be ";
  for (int64_t i = 0; i < head.count; ++i) {
    const int64_t row = head.kept[i] * listed.count;
    for (int64_t at = 0; at < listed.count; ++at) {
      const int64_t id = listed.ids[row + at];
      if (id < -1 || id >= head.vocabulary) {
        throw std::runtime_error(name + "in [0, " + std::to_string(head.vocabulary) + ") or -1, got " +
                                 std::to_string(id));
      }
      if (id >= 0 && at > 0 && listed.ids[row + at - 1] == id) {
        throw std::runtime_error(name + "distinct in each row, got " + std::to_string(id) + " twice");
      }
    }
  }
}

ListedIds listed_ids(const Tensor& teacher_ids) { return {index_of(teacher_ids), teacher_ids.size(1)}; }

std::tuple<Tensor, Tensor, Tensor> fwd(Tensor x, Tensor weight, Tensor target, OptionalTensor bias, Tensor teacher_logp,
                                       Tensor teacher_ids, double beta, std::string tail, double temperature,
                                       int64_t ignore_index) {
  const int64_t tokens = x.size(0), k = teacher_ids.size(1);
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  TopkDivergenceCall call{};
  call.head = linear_head(x, weight, target, bias, OptionalTensor(), 0, 1.0, 0.0, temperature);
  call.head.kept = kept.data();
  call.head.count = static_cast<int64_t>(kept.size());
  call.listed = listed_ids(teacher_ids);
  check_listed(call.head, call.listed);
  const std::unique_ptr<float[]> logits(new float[static_cast<size_t>(tokens * k + 1)]);
  const Tensor stats = make_stats(call.head, target, false, nullptr, call.listed, logits.get());
  Tensor losses = torch::stable::new_zeros(x, {tokens}, ScalarType::Float);
  Tensor gradient = torch::stable::new_zeros(x, {tokens, k + 1}, ScalarType::Float);
  Tensor norm = torch::stable::new_zeros(x, {2, tokens}, ScalarType::Float);
  call.tokens = tokens;
  call.blocks = stats.size(1);
  call.stats = pointer<const float>(stats);
  call.logits = logits.get();
  call.teacher_logp = pointer<const float>(teacher_logp);
  call.beta = beta;
  call.tail = tail_of(tail);
  call.losses = pointer<float>(losses);
  call.gradient = pointer<float>(gradient);
  call.norm = pointer<float>(norm);
  run_parallel(topk_divergence, call.head.count, 1 + 1024 / (k + 1), call, RangeScratch<double>{3 * k});
  return {losses, gradient, norm};
}

std::tuple<Tensor, Tensor, Tensor> bwd(Tensor x, Tensor weight, Tensor target, OptionalTensor bias, Tensor teacher_ids,
                                       Tensor norm, Tensor coefficients, Tensor factor, double temperature,
                                       int64_t ignore_index, bool need_x, bool need_weight, bool need_bias) {
  const int64_t tokens = x.size(0), k = teacher_ids.size(1);
  auto [dx, dweight, dbias] = head_gradients(x, weight, bias, need_x, need_weight, need_bias);
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  LinearGradient call{};
  call.head = linear_head(x, weight, target, bias, OptionalTensor(), 0, 1.0, 0.0, temperature);
  call.head.kept = kept.data();
  call.head.count = static_cast<int64_t>(kept.size());
  // what is not listed has the gradients of a softmax; what is, its own
  std::vector<float> of_rest(static_cast<size_t>(5 * tokens), 0.0f);
  for (int64_t t = 0; t < tokens; ++t) of_rest[t] = pointer<const float>(coefficients)[t * (k + 1) + k];
  call.listed = listed_ids(teacher_ids);
  call.listed_gradients = pointer<const float>(coefficients);
  call.norm = pointer<const float>(norm);
  call.coefficients = of_rest.data();
  call.entropy = of_rest.data() + 4 * tokens;
  call.factor = *pointer<const float>(factor);
  call.tokens = tokens;
  linear_backward(call, dx, dweight, dbias);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("linear_topk_distillation_fwd", TORCH_BOX(&fwd));
  m.impl("linear_topk_distillation_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
