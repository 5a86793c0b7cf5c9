// Divergences of rows of logits on the CPU: what distillation and linear_distillation share.
#pragma once

#include "common/cpu.h"

namespace tilefuse {

// the logit of an id: data[row * step + id / 64 * panel + id % 64]
struct LogitRows {
  const void* data;
  Dtype dtype;
  int64_t step, panel;
};

// whose divergence it is: KL(t || s) for beta = 0, from the mixture, KL(s || t) for beta = 1
enum class Divergence { of_teacher, of_mixture, of_student };

struct DistillationCall {
  LogitRows student, teacher;
  int64_t vocabulary;  // ids that both have
  const int64_t* kept;
  bool packed;  // rows are those of the tokens that are kept, not of all
  int64_t tokens;
  Divergence divergence;
  float beta, rest, cooling;  // rest: 1 - beta, cooling: 1 / temperature
  float* statistics;          // [5, T]
};

#ifdef TILEFUSE_REGISTER

// tokens whose value, bool or float32, is not 0
std::vector<int64_t> set_tokens(const Tensor& values);

// a call without its rows
DistillationCall distillation_call(double beta, double temperature, const Tensor& statistics);

// losses [T] and statistics of `count` kept tokens
void make_losses(const DistillationCall& call, int64_t count, float* losses);

// gradients of the student's logits of `count` kept tokens; rows of `out` may be those of the student
void make_gradients(const DistillationCall& call, int64_t count, const float* coefficients, const LogitRows& out);

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
