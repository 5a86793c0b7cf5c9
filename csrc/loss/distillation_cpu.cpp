// distillation on the CPU: a token is one task. Both rows of logits are read in blocks that stay in L1, once for the
// sums of their softmaxes and once for the divergence; the backward reads them once.
// build-flags: -ffp-contract=fast
#include "loss/distillation_cpu.h"

#include "common/floats_math_cpu.h"

namespace tilefuse {

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kBlock = 4096, kPanel = 64;
constexpr float kInfinity = __builtin_inff();

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

inline float sum_of(Floats x) {
  float sum = 0.0f;
  for (int64_t i = 0; i < kFloats; ++i) sum += x[i];
  return sum;
}

TILEFUSE_INLINE Floats absolute(Floats x) { return (Floats)((FloatInts)x & 0x7fffffff); }

// log x for 0 < x: 2 atanh((y - 1) / (y + 1)) with y within sqrt(2) of 1
TILEFUSE_INLINE Floats log_of(Floats x) {
  const FloatInts k = ((FloatInts)x - 0x3f3504f3) >> 23;
  const Floats y = (Floats)((FloatInts)x - (k << 23)), n = __builtin_convertvector(k, Floats);
  const Floats z = (y - 1.0f) / (y + 1.0f), q = z * z;
  Floats p = q * (1.0f / 9.0f) + 1.0f / 7.0f;
  p = p * q + 0.2f;
  p = p * q + 1.0f / 3.0f;
  return n * 0.693359375f + (n * -2.12194440e-4f + 2.0f * (z + z * q * p));
}

// (expm1(q) - q) / q^2 for -1/2 <= q <= 0
TILEFUSE_INLINE Floats excess_series(Floats q) {
  Floats p = q * (1.0f / 362880.0f) + 1.0f / 40320.0f;
  p = p * q + 1.0f / 5040.0f;
  p = p * q + 1.0f / 720.0f;
  p = p * q + 1.0f / 120.0f;
  p = p * q + 1.0f / 24.0f;
  p = p * q + 1.0f / 6.0f;
  return p * q + 0.5f;
}

// (u - log1p(u)) / u^2 for |u| <= 1/8
TILEFUSE_INLINE Floats shortfall_series(Floats u) {
  Floats p = u * (-1.0f / 9.0f) + 1.0f / 8.0f;
  p = p * u - 1.0f / 7.0f;
  p = p * u + 1.0f / 6.0f;
  p = p * u - 0.2f;
  p = p * u + 0.25f;
  p = p * u - 1.0f / 3.0f;
  return p * u + 0.5f;
}

// of one token: largest logits, and logarithms of the sums relative to them
struct Norm {
  float peak, log_total, teacher_peak, teacher_log_total, cooling, beta, rest;
};

// both probabilities of each id by the larger one, p, and the logarithm q <= 0 of their quotient
struct Pair {
  FloatInts of_teacher;  // which is the larger
  Floats p, q, near;     // near: q where e^q is not 0
  Floats e, m, excess;   // e^q, e^q - 1 and that less q
};

TILEFUSE_INLINE Pair pair_of(Floats student, Floats teacher, const Norm& n) {
  const Floats below = student - n.peak, teacher_below = teacher - n.teacher_peak;
  const Floats apart = teacher - student, gap = Floats{} + (n.teacher_peak - n.peak);
  // log t - log s, from the differences that lose less: those of neighbours are exact
  const FloatInts near_both = absolute(apart) + absolute(gap) < absolute(below) + absolute(teacher_below);
  const Floats difference = near_both ? apart - gap : teacher_below - below;
  const Floats d = difference * n.cooling - (n.teacher_log_total - n.log_total);
  const Floats log_s = below * n.cooling - n.log_total, log_t = teacher_below * n.cooling - n.teacher_log_total;
  Pair a;
  a.of_teacher = d >= 0.0f;
  a.p = exp_f32(a.of_teacher ? log_t : log_s);
  a.q = a.of_teacher ? -d : d;
  a.near = a.q < -200.0f ? Floats{} - 200.0f : a.q;
  a.e = exp_f32(a.near);
  const Floats series = a.near * a.near * excess_series(a.near);
  a.m = a.near > -0.5f ? a.near + series : a.e - 1.0f;
  a.excess = a.near > -0.5f ? series : a.m - a.near;
  return a;
}

// M by the larger probability: the shares of both in it, log(M / p), and log(M / (p e^q)); what KL(p || M) and
// KL(p e^q || M) add, of p
struct Mixture {
  Floats share, rest, log_larger, log_smaller, of_larger, of_smaller;
};

TILEFUSE_INLINE Mixture mixture_of(const Pair& a, const Norm& n) {
  Mixture x;
  x.share = a.of_teacher ? Floats{} + n.beta : Floats{} + n.rest;
  x.rest = a.of_teacher ? Floats{} + n.rest : Floats{} + n.beta;
  const Floats u = x.rest * a.m, v = -x.share * a.m / a.e;
  const FloatInts near_larger = u > -0.125f, near_smaller = v < 0.125f;
  const Floats direct = log_of(x.share + x.rest * a.e);
  const Floats small_u = u * u * shortfall_series(u), small_v = v * v * shortfall_series(v);
  x.of_larger = near_larger ? small_u : u - direct;
  x.log_larger = near_larger ? u - small_u : direct;
  x.log_smaller = near_smaller ? v - small_v : x.log_larger - a.near;
  x.of_smaller = near_smaller ? a.e * small_v : -x.share * a.m - a.e * (x.log_larger - a.near);
  return x;
}

// terms of the loss, and of the sum that the gradient subtracts where it has another
template <Divergence kOf>
TILEFUSE_INLINE void add_terms(Floats student, Floats teacher, const Norm& n, Floats& loss, Floats& shift) {
  const Pair a = pair_of(student, teacher, n);
  const FloatInts nothing = a.p == 0.0f;
  if constexpr (kOf == Divergence::of_mixture) {
    const Mixture x = mixture_of(a, n);
    loss += nothing ? Floats{} : a.p * (x.share * x.of_larger + x.rest * x.of_smaller);
    shift += nothing ? Floats{} : a.p * (a.of_teacher ? x.of_smaller : x.of_larger);
  } else {
    const FloatInts larger = kOf == Divergence::of_teacher ? a.of_teacher : ~a.of_teacher;
    const Floats of_larger = a.q < -200.0f ? -1.0f - a.q : a.excess;
    loss += nothing ? Floats{} : a.p * (larger ? of_larger : a.near * a.m - a.excess);
  }
}

template <Divergence kOf>
TILEFUSE_INLINE Floats gradient_of(Floats student, Floats teacher, const Norm& n, float shift) {
  const Pair a = pair_of(student, teacher, n);
  if constexpr (kOf == Divergence::of_teacher) {
    return a.p == 0.0f ? Floats{} : a.p * (a.of_teacher ? a.m : -a.m);
  } else {
    const Floats s = a.of_teacher ? a.p * a.e : a.p;
    Floats log_ratio;
    if constexpr (kOf == Divergence::of_student) {
      log_ratio = a.of_teacher ? a.near : -a.q;
    } else {
      const Mixture x = mixture_of(a, n);
      log_ratio = a.of_teacher ? -x.log_smaller : -x.log_larger;
    }
    return s == 0.0f ? Floats{} : s * (log_ratio - shift);
  }
}

// f(where the ids [first + i, first + i + n) of a row are, i, n) for runs of ids that lie side by side
template <typename T, typename Data, typename F>
void over_runs(Data* data, const LogitRows& rows, int64_t row, int64_t first, int64_t count, const F& f) {
  T* at = static_cast<T*>(data) + row * rows.step + first / kPanel * rows.panel;
  const int64_t run = rows.panel == kPanel ? count : kPanel;
  for (int64_t i = 0; i < count; i += run, at += rows.panel) f(at, i, at_most(count - i, run));
}

// logits [first, first + count) of a row, -inf up to whole vectors
void stage(const LogitRows& rows, int64_t row, int64_t first, int64_t count, float* out) {
  TILEFUSE_BY_DTYPE(rows.dtype, T, {
    over_runs<const T>(rows.data, rows, row, first, count, [&](const T* from, int64_t i, int64_t n) {
      over_floats(n, [&](int64_t j, auto lanes) { put(out + i, j, get(from, j, lanes)); });
    });
  })
  for (int64_t i = count; i % kFloats != 0; ++i) out[i] = -kInfinity;
}

void store_row(const float* values, const LogitRows& rows, int64_t row, int64_t first, int64_t count) {
  TILEFUSE_BY_DTYPE(rows.dtype, T, {
    over_runs<T>(const_cast<void*>(rows.data), rows, row, first, count, [&](T* to, int64_t i, int64_t n) {
      over_floats(n, [&](int64_t j, auto lanes) { put(to, j, get(values + i, j, lanes)); });
    });
  })
}

// the largest logit so far, and the sum relative to it
struct Total {
  float peak, sum;
};

void add_block(const float* z, int64_t count, float cooling, Total& total) {
  Floats top = Floats{} - kInfinity, sum{};
  for (int64_t i = 0; i < count; i += kFloats) {
    const Floats x = get(z, i, ManyFloats{});
    top = x > top ? x : top;
  }
  float peak = total.peak;
  for (int64_t i = 0; i < kFloats; ++i) peak = top[i] > peak ? top[i] : peak;
  // a row of -inf alone has a sum of 0
  const float base = peak > -kInfinity ? peak : 0.0f;
  for (int64_t i = 0; i < count; i += kFloats) sum += exp_f32((get(z, i, ManyFloats{}) - base) * cooling);
  const float shrunk = total.peak > -kInfinity ? std::exp((total.peak - base) * cooling) : 0.0f;
  total = {peak, total.sum * shrunk + sum_of(sum)};
}

template <Divergence kOf>
void add_divergence(const float* student, const float* teacher, int64_t count, const Norm& n, float& loss,
                    float& shift) {
  Floats losses{}, shifts{};
  for (int64_t i = 0; i < count; i += kFloats) {
    add_terms<kOf>(get(student, i, ManyFloats{}), get(teacher, i, ManyFloats{}), n, losses, shifts);
  }
  loss += sum_of(losses);
  shift += sum_of(shifts);
}

template <Divergence kOf>
void gradients_of(float* student, const float* teacher, int64_t count, const Norm& n, float coefficient, float shift) {
  for (int64_t i = 0; i < count; i += kFloats) {
    const Floats z = get(student, i, ManyFloats{});
    put(student, i, gradient_of<kOf>(z, get(teacher, i, ManyFloats{}), n, shift) * coefficient);
  }
}

#define TILEFUSE_BY_DIVERGENCE(divergence, kOf, ...)     \
  switch (divergence) {                                  \
    case Divergence::of_teacher: {                       \
      constexpr Divergence kOf = Divergence::of_teacher; \
      __VA_ARGS__;                                       \
      break;                                             \
    }                                                    \
    case Divergence::of_mixture: {                       \
      constexpr Divergence kOf = Divergence::of_mixture; \
      __VA_ARGS__;                                       \
      break;                                             \
    }                                                    \
    case Divergence::of_student: {                       \
      constexpr Divergence kOf = Divergence::of_student; \
      __VA_ARGS__;                                       \
      break;                                             \
    }                                                    \
  }

// both rows of logits
struct Block {
  float student[kBlock], teacher[kBlock];
  int64_t count = 0;

  void load(const DistillationCall& call, int64_t row, int64_t first) {
    count = at_most(call.vocabulary - first, kBlock);
    stage(call.student, row, first, count, student);
    stage(call.teacher, row, first, count, teacher);
  }
};

}  // namespace

void distillation_losses(const DistillationCall& call, float* losses, int64_t begin, int64_t end) {
  Block block;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t token = call.kept[r], row = call.packed ? r : token;
    Total student{-kInfinity, 0.0f}, teacher = student;
    for (int64_t first = 0; first < call.vocabulary; first += kBlock) {
      block.load(call, row, first);
      add_block(block.student, block.count, call.cooling, student);
      add_block(block.teacher, block.count, call.cooling, teacher);
    }
    const Norm n{student.peak, std::log(student.sum), teacher.peak, std::log(teacher.sum), call.cooling, call.beta,
                 call.rest};
    float loss = 0.0f, shift = 0.0f;
    for (int64_t first = 0; first < call.vocabulary; first += kBlock) {
      // one block alone is still there
      if (call.vocabulary > kBlock) block.load(call, row, first);
      TILEFUSE_BY_DIVERGENCE(call.divergence, kOf,
                             { add_divergence<kOf>(block.student, block.teacher, block.count, n, loss, shift); })
    }
    losses[token] = loss;
    float* statistics = call.statistics + token;
    statistics[0] = n.peak;
    statistics[call.tokens] = n.log_total;
    statistics[2 * call.tokens] = n.teacher_peak;
    statistics[3 * call.tokens] = n.teacher_log_total;
    statistics[4 * call.tokens] = call.divergence == Divergence::of_student ? loss : shift;
  }
}

void distillation_gradients(const DistillationCall& call, const float* coefficients, const LogitRows& out,
                            int64_t begin, int64_t end) {
  Block block;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t token = call.kept[r], row = call.packed ? r : token;
    const float* statistics = call.statistics + token;
    const Norm n{statistics[0],
                 statistics[call.tokens],
                 statistics[2 * call.tokens],
                 statistics[3 * call.tokens],
                 call.cooling,
                 call.beta,
                 call.rest};
    const float shift = statistics[4 * call.tokens];
    for (int64_t first = 0; first < call.vocabulary; first += kBlock) {
      block.load(call, row, first);
      TILEFUSE_BY_DIVERGENCE(call.divergence, kOf, {
        gradients_of<kOf>(block.student, block.teacher, block.count, n, coefficients[token], shift);
      })
      store_row(block.student, out, row, first, block.count);
    }
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(distillation_losses)
TILEFUSE_DISPATCH(distillation_gradients)

std::vector<int64_t> set_tokens(const Tensor& values) {
  const bool flags = values.scalar_type() == ScalarType::Bool;
  const void* data = values.const_data_ptr();
  std::vector<int64_t> set;
  for (int64_t t = 0; t < values.size(0); ++t) {
    if (flags ? static_cast<const bool*>(data)[t] : static_cast<const float*>(data)[t] != 0.0f) set.push_back(t);
  }
  return set;
}

DistillationCall distillation_call(double beta, double temperature, const Tensor& statistics) {
  DistillationCall call{};
  call.tokens = statistics.size(1);
  call.divergence = beta == 0.0   ? Divergence::of_teacher
                    : beta == 1.0 ? Divergence::of_student
                                  : Divergence::of_mixture;
  call.beta = static_cast<float>(beta);
  call.rest = static_cast<float>(1.0 - beta);
  call.cooling = static_cast<float>(1.0 / temperature);
  call.statistics = pointer<float>(statistics);
  return call;
}

void make_losses(const DistillationCall& call, int64_t count, float* losses) {
  run_parallel(distillation_losses, count, 1 + 8192 / (call.vocabulary + 1), call, losses);
}

void make_gradients(const DistillationCall& call, int64_t count, const float* coefficients, const LogitRows& out) {
  run_parallel(distillation_gradients, count, 1 + 8192 / (call.vocabulary + 1), call, coefficients, out);
}

namespace {

LogitRows rows_of(const Tensor& logits) {
  return {logits.const_data_ptr(), dtype_of(logits), stride_or_zero(logits, 0), 64};
}

int64_t common(const Tensor& logits, const Tensor& teacher_logits) {
  return logits.size(1) < teacher_logits.size(1) ? logits.size(1) : teacher_logits.size(1);
}

std::tuple<Tensor, Tensor> fwd(Tensor logits, Tensor teacher_logits, Tensor keep, double beta, double temperature) {
  const int64_t tokens = logits.size(0);
  Tensor losses = torch::stable::new_zeros(logits, {tokens}, ScalarType::Float);
  Tensor statistics = torch::stable::new_zeros(logits, {5, tokens}, ScalarType::Float);
  const std::vector<int64_t> kept = set_tokens(keep);
  DistillationCall call = distillation_call(beta, temperature, statistics);
  call.student = rows_of(logits);
  call.teacher = rows_of(teacher_logits);
  call.vocabulary = common(logits, teacher_logits);
  call.kept = kept.data();
  make_losses(call, static_cast<int64_t>(kept.size()), pointer<float>(losses));
  return {losses, statistics};
}

Tensor bwd(Tensor logits, Tensor teacher_logits, Tensor statistics, Tensor coefficients, double beta,
           double temperature) {
  const int64_t tokens = logits.size(0), width = logits.size(1);
  const int64_t size = static_cast<int64_t>(logits.element_size());
  Tensor dlogits = empty_of(logits, {tokens, width});
  prefer_huge_pages(dlogits);
  DistillationCall call = distillation_call(beta, temperature, statistics);
  call.student = rows_of(logits);
  call.teacher = rows_of(teacher_logits);
  call.vocabulary = common(logits, teacher_logits);
  const float* of = pointer<const float>(coefficients);
  char* out = static_cast<char*>(dlogits.mutable_data_ptr());
  const std::vector<int64_t> kept = set_tokens(coefficients);
  for (int64_t t = 0; t < tokens; ++t) {
    // what pads the vocabulary, and tokens without a share in the loss
    const int64_t first = of[t] != 0.0f ? call.vocabulary : 0;
    std::memset(out + (t * width + first) * size, 0, static_cast<size_t>((width - first) * size));
  }
  call.kept = kept.data();
  const LogitRows to{out, dtype_of(logits), width, 64};
  make_gradients(call, static_cast<int64_t>(kept.size()), of, to);
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("distillation_fwd", TORCH_BOX(&fwd));
  m.impl("distillation_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
