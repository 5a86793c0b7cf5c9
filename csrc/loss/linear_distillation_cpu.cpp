// linear_distillation on the CPU: the logits of both heads, of some tokens at a time in the forward and of a block of
// the vocabulary in the backward, meet in distillation_cpu.cpp; the products are those of linear_logprobs_cpu.cpp.
#include "loss/distillation_cpu.h"
#include "loss/linear_cpu.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

namespace {

// of the logits of both heads, in the forward
constexpr int64_t kLogitsBytes = 64 << 20;

int64_t panels_of(int64_t ids) { return (ids + kPanelIds - 1) / kPanelIds; }

struct Heads {
  LinearHead student, teacher;

  Heads(const Tensor& x, const Tensor& weight, const Tensor& teacher_x, const Tensor& teacher_weight,
        const OptionalTensor& bias, const OptionalTensor& teacher_bias)
      : student(untargeted(x, weight, bias)), teacher(untargeted(teacher_x, teacher_weight, teacher_bias)) {
    const int64_t common = student.vocabulary < teacher.vocabulary ? student.vocabulary : teacher.vocabulary;
    student.vocabulary = teacher.vocabulary = common;
  }

  void keep(const int64_t* tokens, int64_t count) {
    student.kept = teacher.kept = tokens;
    student.count = teacher.count = count;
  }

 private:
  static LinearHead untargeted(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    LinearHead head = linear_head(x, weight, x, bias, std::nullopt, 0, 1.0, 0.0, 1.0);
    head.target = {};
    return head;
  }
};

// rows of both heads' logits, as make_logits leaves them
void set_rows(const Heads& heads, const float* student, const float* teacher, int64_t ids, DistillationCall& call) {
  const int64_t panel = even_count(heads.student) * kPanelIds;
  call.student = {student, Dtype::f32, kPanelIds, panel};
  call.teacher = {teacher, Dtype::f32, kPanelIds, panel};
  call.vocabulary = ids;
  call.kept = heads.student.kept;
  call.packed = true;
}

std::unique_ptr<float[]> room(int64_t count) {
  std::unique_ptr<float[]> memory(new float[static_cast<size_t>(count)]);
  prefer_huge_pages(memory.get(), 4 * count);
  return memory;
}

std::tuple<Tensor, Tensor> fwd(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, OptionalTensor bias,
                               OptionalTensor teacher_bias, Tensor keep, double beta, double temperature) {
  const int64_t tokens = x.size(0);
  Tensor losses = torch::stable::new_zeros(x, {tokens}, ScalarType::Float);
  Tensor statistics = torch::stable::new_zeros(x, {5, tokens}, ScalarType::Float);
  Heads heads(x, weight, teacher_x, teacher_weight, bias, teacher_bias);
  const std::vector<int64_t> kept = set_tokens(keep);
  const int64_t count = static_cast<int64_t>(kept.size()), vocabulary = heads.student.vocabulary;
  const int64_t width = panels_of(vocabulary) * kPanelIds, fit = kLogitsBytes / (8 * width) / 2 * 2;
  const int64_t most = fit < 2 ? 2 : fit > kPartTokens ? kPartTokens : fit;
  const int64_t chunk = most < count + 1 ? most : count + count % 2;
  const auto student = room(chunk * width), teacher = room(chunk * width);
  DistillationCall call = distillation_call(beta, temperature, statistics);
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t there = count - first < chunk ? count - first : chunk;
    heads.keep(kept.data() + first, there);
    make_logits(heads.student, packed_rows(heads.student).get(), 0, vocabulary, student.get());
    make_logits(heads.teacher, packed_rows(heads.teacher).get(), 0, vocabulary, teacher.get());
    set_rows(heads, student.get(), teacher.get(), vocabulary, call);
    make_losses(call, there, pointer<float>(losses));
  }
  return {losses, statistics};
}

std::tuple<Tensor, Tensor, Tensor> bwd(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight,
                                       OptionalTensor bias, OptionalTensor teacher_bias, Tensor statistics,
                                       Tensor coefficients, Tensor factor, double beta, double temperature, bool need_x,
                                       bool need_weight, bool need_bias) {
  const int64_t tokens = x.size(0), hidden = x.size(1), vocabulary = weight.size(0);
  auto [dx, dweight, dbias] = head_gradients(x, weight, bias, need_x, need_weight, need_bias);
  Heads heads(x, weight, teacher_x, teacher_weight, bias, teacher_bias);
  const int64_t common = heads.student.vocabulary;
  // what pads the head
  for (Tensor* gradient : {&dweight, &dbias}) {
    if (gradient->numel() == 0) continue;
    const int64_t row = static_cast<int64_t>(gradient->element_size()) * (gradient == &dweight ? hidden : 1);
    char* from = static_cast<char*>(gradient->mutable_data_ptr()) + common * row;
    std::memset(from, 0, static_cast<size_t>((vocabulary - common) * row));
  }
  const std::vector<int64_t> kept = set_tokens(coefficients);
  heads.keep(kept.data(), static_cast<int64_t>(kept.size()));
  const auto rows = packed_rows(heads.student), teacher_rows = packed_rows(heads.teacher);
  std::unique_ptr<float[]> teacher;
  DistillationCall part = distillation_call(beta, temperature, statistics);
  LinearGradient call{};
  call.head = heads.student;
  call.factor = *pointer<const float>(factor);
  call.tokens = tokens;
  linear_backward(call, dx, dweight, dbias, [&](int64_t first, int64_t ids, float* dz) {
    if (teacher == nullptr) teacher = room(panels_of(ids) * kPanelIds * even_count(heads.teacher));
    make_logits(heads.student, rows.get(), first, ids, dz);
    make_logits(heads.teacher, teacher_rows.get(), first, ids, teacher.get());
    set_rows(heads, dz, teacher.get(), ids, part);
    make_gradients(part, heads.student.count, pointer<const float>(coefficients), part.student);
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("linear_distillation_fwd", TORCH_BOX(&fwd));
  m.impl("linear_distillation_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
