// linear_cross_entropy with its gradients made in the forward: the logits are kept until their gradients are made.
#include "loss/linear_cpu.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

namespace {

// class weights as float32; empty without
std::vector<float> class_weights(const VocabularyValues& values, int64_t vocabulary) {
  std::vector<float> out;
  if (values.data == nullptr) return out;
  using namespace baseline;
  TILEFUSE_BY_DTYPE(values.dtype, T, {
    for (int64_t i = 0; i < vocabulary; ++i) out.push_back(to_float(static_cast<const T*>(values.data)[i]));
  })
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(Tensor x, Tensor weight, Tensor target, OptionalTensor bias,
                                               OptionalTensor class_weight, Tensor token_factor, Tensor factor,
                                               double scale, double softcap, int64_t ignore_index,
                                               double label_smoothing, double z_loss, bool need_x, bool need_weight,
                                               bool need_bias) {
  const int64_t tokens = x.size(0), vocabulary = weight.size(0);
  LinearGradient call{};
  LinearHead& head = call.head;
  head = linear_head(x, weight, target, bias, class_weight, 0, scale, softcap, 1.0);
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  head.kept = kept.data();
  head.count = static_cast<int64_t>(kept.size());
  check_targets("linear_cross_entropy", target, kept, vocabulary, ignore_index);
  const bool smooth = label_smoothing > 0.0;
  const int64_t panels = (vocabulary + kPanelIds - 1) / kPanelIds;
  const int64_t room = panels * even_count(head) * kPanelIds;
  const std::unique_ptr<float[]> logits(new float[static_cast<size_t>(room)]);
  prefer_huge_pages(logits.get(), 4 * room);
  const Result statistics = merge_stats(make_stats(head, target, smooth, logits.get()));
  const float* logp = pointer<const float>(std::get<0>(statistics));
  const float* lse = pointer<const float>(std::get<1>(statistics));
  const float* smoothed = pointer<const float>(std::get<4>(statistics));
  const float* factors = pointer<const float>(token_factor);

  const std::vector<float> classes = class_weights(head.class_weight, vocabulary);
  double total = classes.empty() ? static_cast<double>(vocabulary) : 0.0;
  for (const float c : classes) total += c;
  const float spread = static_cast<float>(label_smoothing / static_cast<double>(vocabulary));
  const float everywhere = static_cast<float>(label_smoothing * total / static_cast<double>(vocabulary));
  const float z = static_cast<float>(z_loss);
  Tensor losses = torch::stable::new_zeros(x, {tokens}, ScalarType::Float);
  float* loss = pointer<float>(losses);
  std::vector<float> coefficients(static_cast<size_t>(4 * tokens), 0.0f);
  for (const int64_t t : kept) {
    const float c = classes.empty() ? 1.0f : classes[static_cast<size_t>(head.target[t])];
    const float own = static_cast<float>(1.0 - label_smoothing) * c;
    loss[t] = -logp[t] * own + z * lse[t] * lse[t] + (smooth ? spread * smoothed[t] : 0.0f);
    coefficients[t] = factors[t] * (own + everywhere + 2.0f * z * lse[t]);
    coefficients[2 * tokens + t] = -factors[t] * own;
    coefficients[3 * tokens + t] = factors[t] * spread;
  }

  auto [dx, dweight, dbias] = head_gradients(x, weight, bias, need_x, need_weight, need_bias);
  call.norm = pointer<const float>(std::get<5>(statistics));
  call.entropy = pointer<const float>(std::get<2>(statistics));
  call.coefficients = coefficients.data();
  call.factor = *pointer<const float>(factor) * head.scale;
  call.tokens = tokens;
  call.logits = logits.get();
  linear_backward(call, dx, dweight, dbias);
  return {losses, dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fwd)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
