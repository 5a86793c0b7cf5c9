// logprobs on the CPU: rows of logits, a block of the vocabulary at a time, widened and transformed in the L1 cache.
// The forward reads a row once; the backward reads it once more and writes its gradient past the caches. build-flags:
// -ffp-contract=fast
#include "common/floats_cpu.h"
#include "common/stream_cpu.h"
#include "loss/statistics_cpu.h"

namespace tilefuse {

// logits [A, B, V], whose rows [a][b] are the tokens in their order
struct TargetLogits {
  Dtype dtype;
  const void* data;
  int64_t outer_stride, inner_stride, inner, vocabulary;
  int64_t blocks;  // of the vocabulary
  Index target;
  // [blocks][4096], 0 past the vocabulary, and the sum of every 64; or nullptr: without
  const float *classes, *class_sums;
  float scale, softcap, cooling;  // cooling: 1 / temperature
};

struct LogitStats {
  TargetLogits rows;
  const int64_t* kept;
  int64_t columns;
  float* stats;  // [T, blocks, columns]
};

struct LogitGradient {
  TargetLogits rows;
  int64_t tokens, ignore_index;
  const float *norm, *entropy, *coefficients;  // [2, T], [T], [4, T]
  void* dlogits;                               // [T, V]
  bool stream;
};

namespace TILEFUSE_ISA {

namespace {

// `count` logits of a token from `first` on, before the temperature, and whatever up to the next multiple of 64
template <typename T>
inline void read_block(const TargetLogits& rows, int64_t token, int64_t first, int64_t count, float* out) {
  const T* from = static_cast<const T*>(rows.data) + token / rows.inner * rows.outer_stride +
                  token % rows.inner * rows.inner_stride + first;
  over_floats(count, [&](int64_t i, auto lanes) { put(out, i, get(from, i, lanes)); });
  const int64_t stop = (count + kPanelIds - 1) / kPanelIds * kPanelIds;
  for (int64_t i = count; i < stop; ++i) out[i] = 0.0f;
  if (rows.scale == 1.0f && rows.softcap == 0.0f) return;
  const float uncapped = rows.softcap > 0.0f ? 1.0f / rows.softcap : 1.0f;
  for (int64_t i = 0; i < stop; i += kWidth) {
    store(out + i, capped_logits(load(out + i), rows.scale, rows.softcap, uncapped));
  }
}

inline int64_t ids_of(const TargetLogits& rows, int64_t block) {
  const int64_t left = rows.vocabulary - block * kStatsBlock;
  return left < kStatsBlock ? left : kStatsBlock;
}

template <typename T>
void stats_of(const LogitStats& call, int64_t begin, int64_t end) {
  const TargetLogits& rows = call.rows;
  alignas(64) float z[kStatsBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t token = call.kept[task / rows.blocks], block = task % rows.blocks, first = block * kStatsBlock;
    const int64_t count = ids_of(rows, block);
    read_block<T>(rows, token, first, count, z);
    if (rows.cooling != 1.0f) {
      for (int64_t i = 0; i < count; ++i) z[i] *= rows.cooling;
    }
    for (int64_t i = count; i % kPanelIds != 0; ++i) z[i] = -kInfinity;
    RunningStats s;
    start(s);
    for (int64_t i = 0; i < count; i += kPanelIds) {
      const int64_t ids = count - i < kPanelIds ? count - i : kPanelIds;
      const bool smooth = rows.classes != nullptr;
      add_panel(z + i, ids, first + i, smooth ? rows.classes + first + i : nullptr,
                smooth ? rows.class_sums[(first + i) / kPanelIds] : 0.0f, s);
    }
    const int64_t at = rows.target[token] - first;
    if (at >= 0 && at < count) s.logit = z[at];
    finish(s, call.columns, call.stats + (token * rows.blocks + block) * call.columns);
  }
}

template <typename T>
void gradients_of(const LogitGradient& call, int64_t begin, int64_t end) {
  const TargetLogits& rows = call.rows;
  alignas(64) float z[kStatsBlock];
  alignas(64) T finished[kStatsBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t token = task / rows.blocks, block = task % rows.blocks, first = block * kStatsBlock;
    const int64_t count = ids_of(rows, block), target = rows.target[token];
    T* to = static_cast<T*>(call.dlogits) + token * rows.vocabulary + first;
    T* out = call.stream ? finished : to;
    if (target == call.ignore_index) {
      std::memset(static_cast<void*>(out), 0, count * sizeof(T));
    } else {
      read_block<T>(rows, token, first, count, z);
      const TokenGradient g = token_gradient(call.norm, call.entropy, call.coefficients, call.tokens, token);
      for (int64_t i = 0; i < count; i += kPanelIds) {
        gradient_row(g, rows.cooling, rows.softcap, target - first - i,
                     g.of_class != 0.0f ? rows.classes + first + i : nullptr, z + i);
      }
      over_floats(count, [&](int64_t i, auto lanes) { put(out, i, get(z, i, lanes)); });
    }
    if (call.stream) stream_copy(to, out, count * static_cast<int64_t>(sizeof(T)));
  }
  if (call.stream) stream_done();
}

}  // namespace

void logit_stats(const LogitStats& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.rows.dtype, T, { stats_of<T>(call, begin, end); })
}

void logit_gradients(const LogitGradient& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.rows.dtype, T, { gradients_of<T>(call, begin, end); })
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(logit_stats)
TILEFUSE_DISPATCH(logit_gradients)

namespace {

// class weights in float32, 1 each without a tensor, and the sum of every 64
struct Classes {
  std::vector<float> values, sums;
};

Classes classes_of(const OptionalTensor& class_weight, int64_t vocabulary, int64_t blocks) {
  Classes out;
  out.values.resize(static_cast<size_t>(blocks * kStatsBlock), 0.0f);
  std::fill_n(out.values.begin(), vocabulary, 1.0f);
  if (class_weight) {
    TILEFUSE_BY_DTYPE(dtype_of(*class_weight), T, {
      const T* from = pointer<const T>(*class_weight);
      for (int64_t i = 0; i < vocabulary; ++i) out.values[static_cast<size_t>(i)] = to_float(from[i]);
    })
  }
  out.sums.resize(out.values.size() / kPanelIds, 0.0f);
  for (size_t i = 0; i < out.values.size(); ++i) out.sums[i / kPanelIds] += out.values[i];
  return out;
}

TargetLogits logit_rows(const Tensor& logits, const Tensor& target, double scale, double softcap, double temperature) {
  const int64_t vocabulary = logits.size(2);
  return {dtype_of(logits),
          logits.const_data_ptr(),
          stride_or_zero(logits, 0),
          stride_or_zero(logits, 1),
          logits.size(1),
          vocabulary,
          (vocabulary + kStatsBlock - 1) / kStatsBlock,
          index_of(target),
          nullptr,
          nullptr,
          static_cast<float>(scale),
          static_cast<float>(softcap),
          static_cast<float>(1.0 / temperature)};
}

// of the tasks of one token and one block
int64_t grain_of(int64_t vocabulary) { return 1 + 32768 / (vocabulary < kStatsBlock ? vocabulary : kStatsBlock); }

Result fwd(Tensor logits, Tensor target, OptionalTensor class_weight, double scale, double softcap, double temperature,
           int64_t ignore_index, bool smooth) {
  LogitStats call{};
  call.rows = logit_rows(logits, target, scale, softcap, temperature);
  const TargetLogits& rows = call.rows;
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  check_targets("logprobs", target, kept, rows.vocabulary, ignore_index);
  Classes classes;
  if (smooth) {
    classes = classes_of(class_weight, rows.vocabulary, rows.blocks);
    call.rows.classes = classes.values.data();
    call.rows.class_sums = classes.sums.data();
  }
  const Tensor stats = ignored_stats(target, rows.blocks, smooth);
  call.kept = kept.data();
  call.columns = stats.size(2);
  call.stats = pointer<float>(stats);
  run_parallel(logit_stats, static_cast<int64_t>(kept.size()) * rows.blocks, grain_of(rows.vocabulary), call);
  return merge_stats(stats);
}

Tensor bwd(Tensor logits, Tensor target, OptionalTensor class_weight, Tensor norm, Tensor entropy, Tensor coefficients,
           double scale, double softcap, double temperature, int64_t ignore_index) {
  const int64_t tokens = target.size(0);
  Tensor dlogits = empty_contiguous(logits);
  LogitGradient call{};
  call.rows = logit_rows(logits, target, scale, softcap, temperature);
  call.tokens = tokens;
  call.ignore_index = ignore_index;
  call.norm = pointer<const float>(norm);
  call.entropy = pointer<const float>(entropy);
  call.coefficients = pointer<const float>(coefficients);
  call.dlogits = dlogits.mutable_data_ptr();
  call.stream = dlogits.numel() * static_cast<int64_t>(dlogits.element_size()) >= kStreamBytes;
  Classes classes;
  bool smooth = false;
  for (int64_t t = 0; t < tokens; ++t) smooth = smooth || call.coefficients[3 * tokens + t] != 0.0f;
  if (smooth) {
    classes = classes_of(class_weight, call.rows.vocabulary, call.rows.blocks);
    call.rows.classes = classes.values.data();
  }
  run_parallel(logit_gradients, tokens * call.rows.blocks, grain_of(call.rows.vocabulary), call);
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("logprobs_fwd", TORCH_BOX(&fwd));
  m.impl("logprobs_bwd", TORCH_BOX(&bwd));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
