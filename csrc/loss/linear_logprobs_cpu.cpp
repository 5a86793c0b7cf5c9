// linear_logprobs on the CPU. Logits of a part of the tokens and 64 ids at a time feed running statistics; the backward
// makes them again for a block of ids, whose gradients then meet x and the weight. The products are those of
// attention/tiles_cpu.h: pairs of bfloat16 on AVX512-BF16, float32 elsewhere.
// build-flags: -ffp-contract=fast
#include "loss/statistics_cpu.h"
#include "mla/product_cpu.h"

namespace tilefuse {

namespace TILEFUSE_ISA {

namespace {

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// values [first, first + count) of `all`, then `rest`
inline void load_values(const VocabularyValues& all, int64_t first, int64_t count, float rest, float* out) {
  TILEFUSE_BY_DTYPE(all.dtype, T, {
    const T* from = static_cast<const T*>(all.data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  })
  for (int64_t i = count; i < kPanelIds; ++i) out[i] = rest;
}

// tokens [first, first + count) of those that are kept, as rows of words
template <typename T, typename W>
void pack_tokens(const LinearHead& head, int64_t first, int64_t count, W* out) {
  const int64_t depth = words(head.hidden, Operand<T>::per_word);
  if (depth == 0) return;
  for (int64_t t = 0; t < count; ++t) {
    const T* row = static_cast<const T*>(head.x) + head.kept[first + t] * head.x_stride;
    pack_rows(&row, 1, head.hidden, out + t * depth);
  }
}

// 64 ids of the head against rows of tokens
template <typename T>
class HeadPanel {
  using W = typename Operand<T>::type;

 public:
  static size_t bytes(const LinearHead& head) {
    return (words(head.hidden, Operand<T>::per_word) + 2) * kPanelIds * 4 + 192;
  }

  HeadPanel(Scratch& scratch, const LinearHead& head)
      : head_(head),
        depth_(words(head.hidden, Operand<T>::per_word)),
        columns_(scratch.take<W>(depth_ * kPanelIds)),
        bias_(scratch.take<float>(kPanelIds)) {}

  // those from `first` on
  void pack(int64_t first) {
    ids_ = at_most(head_.vocabulary - first, kPanelIds);
    const T* lanes[kPanelIds];
    for (int64_t i = 0; i < kPanelIds; ++i) {
      lanes[i] = i < ids_ ? static_cast<const T*>(head_.weight) + (first + i) * head_.weight_stride : nullptr;
    }
    pack_lanes<kPanelIds>(lanes, head_.hidden, columns_);
    if (head_.bias.data != nullptr) load_values(head_.bias, first, ids_, 0.0f, bias_);
  }

  int64_t ids() const { return ids_; }

  // c [count][64]: logits before the temperature, those past the vocabulary of no meaning
  void multiply_rows(const W* rows, int64_t count, float* c) const {
    if (depth_ == 0) std::memset(c, 0, count * kPanelIds * sizeof(float));
    multiply(columns_, rows, depth_, 1, depth_, count, c);
    if (head_.bias.data == nullptr && head_.scale == 1.0f && head_.softcap == 0.0f) return;
    const float uncapped = head_.softcap > 0.0f ? 1.0f / head_.softcap : 1.0f;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t v = 0; v < kVectorsOfPanel; ++v) {
        float* at = c + r * kPanelIds + v * kWidth;
        vec z = load(at);
        if (head_.bias.data != nullptr) z += load(bias_ + v * kWidth);
        store(at, capped_logits(z, head_.scale, head_.softcap, uncapped));
      }
    }
  }

 private:
  const LinearHead& head_;
  int64_t depth_, ids_ = 0;
  W* columns_;
  float* bias_;
};

// z of the ids past the vocabulary
inline void hide_tail(float* c, int64_t count, int64_t ids, float value) {
  if (ids == kPanelIds) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = ids; i < kPanelIds; ++i) c[r * kPanelIds + i] = value;
}

// logits z [64] of ids from `first` on: what a token lists of them is written out and leaves
inline void take_listed(const LinearStats& call, int64_t token, int64_t first, int64_t ids, int64_t& next, float* z) {
  const int64_t count = call.listed.count, row = token * count;
  for (; next < count && call.listed.ids[row + next] < first + ids; ++next) {
    float& at = z[call.listed.ids[row + next] - first];
    call.listed_logits[row + next] = at;
    at = -kInfinity;
  }
}

template <typename T>
void stats_of(const LinearStats& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const LinearHead& head = call.head;
  const int64_t depth = words(head.hidden, Operand<T>::per_word);
  const int64_t most = at_most(head.count, kPartTokens);
  Scratch scratch(HeadPanel<T>::bytes(head) + most * (4 * depth + sizeof(RunningStats) + 8) +
                  4 * (kResultRows + 1) * kPanelIds + 576);
  HeadPanel<T> panel(scratch, head);
  W* rows = scratch.take<W>(most * depth);
  RunningStats* running = scratch.take<RunningStats>(most);
  int64_t* next_listed = scratch.take<int64_t>(most);
  float* tile = scratch.take<float>(kResultRows * kPanelIds);
  float* classes = scratch.take<float>(kPanelIds);
  const bool smooth = call.columns == kSmoothedColumns;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / call.blocks, block = task % call.blocks, t0 = part * kPartTokens;
    const int64_t tokens = at_most(head.count - t0, kPartTokens);
    if (part != packed) pack_tokens<T>(head, t0, tokens, rows);
    packed = part;
    for (int64_t t = 0; t < tokens; ++t) {
      start(running[t]);
      next_listed[t] = first_listed(call.listed, head.kept[t0 + t], block * kStatsBlock);
    }
    const int64_t stop = at_most((block + 1) * kStatsBlock, head.vocabulary);
    for (int64_t first = block * kStatsBlock; first < stop; first += kPanelIds) {
      panel.pack(first);
      float sum = 0.0f;
      if (smooth) {
        for (int64_t i = 0; i < kPanelIds; ++i) classes[i] = i < panel.ids() ? 1.0f : 0.0f;
        if (head.class_weight.data != nullptr) load_values(head.class_weight, first, panel.ids(), 0.0f, classes);
        for (int64_t i = 0; i < kPanelIds; ++i) sum += classes[i];
      }
      for (int64_t r = 0; r < tokens; r += kResultRows) {
        const int64_t count = at_most(tokens - r, kResultRows);
        float* c =
            call.logits == nullptr ? tile : call.logits + (first / kPanelIds * even_count(head) + t0 + r) * kPanelIds;
        panel.multiply_rows(rows + r * depth, count, c);
        if (head.cooling != 1.0f) {
          for (int64_t i = 0; i < count * kPanelIds; ++i) c[i] *= head.cooling;
        }
        hide_tail(c, count, panel.ids(), -kInfinity);
        for (int64_t t = 0; t < count; ++t) {
          float* z = c + t * kPanelIds;
          take_listed(call, head.kept[t0 + r + t], first, panel.ids(), next_listed[r + t], z);
          const int64_t id = head.vocab_start + first, at = head.target[head.kept[t0 + r + t]] - id;
          add_panel(z, panel.ids(), id, smooth ? classes : nullptr, sum, running[r + t]);
          if (at >= 0 && at < panel.ids()) running[r + t].logit = z[at];
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      finish(running[t], call.columns, call.stats + (head.kept[t0 + t] * call.blocks + block) * call.columns);
    }
  }
}

// panels [begin, end) from the id `first` on, of tokens that are packed already
template <typename T>
void logits_of(const LinearHead& head, const void* rows, int64_t first, int64_t ids, float* logits, int64_t begin,
               int64_t end) {
  using W = typename Operand<T>::type;
  const int64_t depth = words(head.hidden, Operand<T>::per_word);
  Scratch scratch(HeadPanel<T>::bytes(head));
  HeadPanel<T> panel(scratch, head);
  for (int64_t task = begin; task < end; ++task) {
    panel.pack(first + task * kPanelIds);
    for (int64_t t0 = 0; t0 < head.count; t0 += kResultRows) {
      const int64_t count = at_most(head.count - t0, kResultRows);
      float* c = logits + (task * even_count(head) + t0) * kPanelIds;
      panel.multiply_rows(static_cast<const W*>(rows) + t0 * depth, count, c);
      hide_tail(c, count, at_most(ids - task * kPanelIds, kPanelIds), -kInfinity);
    }
  }
}

// the operands of count rows of gradients of logits: rounded once
template <typename W>
inline void store_gradients(float* c, int64_t count, W* by_token, int64_t width, W* by_id);

template <>
inline void store_gradients<float>(float* c, int64_t count, float* by_token, int64_t width, float* by_id) {
  for (int64_t r = 0; r < count; ++r) std::memcpy(by_token + r * width, c + r * kPanelIds, kPanelIds * sizeof(float));
  std::memcpy(by_id, c, count * kPanelIds * sizeof(float));
}

#if defined(__AVX512BF16__)
template <>
inline void store_gradients<uint32_t>(float* c, int64_t count, uint32_t* by_token, int64_t width, uint32_t* by_id) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < kPanelIds; i += 32) {
      const float* from = c + r * kPanelIds + i;
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
      _mm512_storeu_si512(by_token + r * width + i / 2, both);
    }
  }
  pack_weights<kPanelIds>(c, count, by_id);
}
#endif

// c [64]: the gradients of logits of ids from `first` on that a token lists
inline void put_listed(const LinearGradient& call, int64_t token, int64_t first, int64_t ids, float* c) {
  const int64_t count = call.listed.count, row = token * count;
  for (int64_t i = first_listed(call.listed, token, first); i < count && call.listed.ids[row + i] < first + ids; ++i) {
    c[call.listed.ids[row + i] - first] = call.listed_gradients[row + token + i];
  }
}

template <typename T>
void gradients_of(const LinearGradient& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  constexpr int64_t per = Operand<T>::per_word;
  const LinearHead& head = call.head;
  const int64_t depth = words(head.hidden, per), pairs = words(head.count, per);
  Scratch scratch(HeadPanel<T>::bytes(head) + 4 * (kResultRows + 2) * kPanelIds + 256);
  HeadPanel<T> panel(scratch, head);
  // one row more, for the partner of an odd one
  float* tile = scratch.take<float>((kResultRows + 1) * kPanelIds);
  float* classes = scratch.take<float>(kPanelIds);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = call.first + task * kPanelIds, ids = at_most(head.vocabulary - first, kPanelIds);
    if (call.logits == nullptr) panel.pack(first);
    for (int64_t i = 0; i < kPanelIds; ++i) classes[i] = i < ids ? 1.0f : 0.0f;
    if (head.class_weight.data != nullptr) load_values(head.class_weight, first, ids, 0.0f, classes);
    vec total[kVectorsOfPanel] = {};
    for (int64_t t0 = 0; t0 < head.count; t0 += kResultRows) {
      const int64_t count = at_most(head.count - t0, kResultRows);
      float* c = tile;
      if (call.logits == nullptr) {
        panel.multiply_rows(static_cast<const W*>(call.rows) + t0 * depth, count, c);
      } else {
        c = call.logits + ((first - call.logits_first) / kPanelIds * even_count(head) + t0) * kPanelIds;
      }
      for (int64_t t = 0; t < count && !call.made; ++t) {
        const int64_t token = head.kept[t0 + t];
        const TokenGradient g = token_gradient(call.norm, call.entropy, call.coefficients, call.tokens, token);
        gradient_row(g, head.cooling, head.softcap, head.target[token] - head.vocab_start - first,
                     g.of_class != 0.0f ? classes : nullptr, c + t * kPanelIds);
        if (call.listed.count > 0) put_listed(call, token, first, ids, c + t * kPanelIds);
      }
      hide_tail(c, count, ids, 0.0f);
      if (call.dbias != nullptr) {
        // sums of sums: one of all tokens would round too often
        vec sum[kVectorsOfPanel] = {};
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t v = 0; v < kVectorsOfPanel; ++v) sum[v] += load(c + t * kPanelIds + v * kWidth);
        }
        for (int64_t v = 0; v < kVectorsOfPanel; ++v) total[v] += sum[v];
      }
      store_gradients(c, count, static_cast<W*>(call.by_token) + t0 * call.width + task * kPanelIds / per, call.width,
                      static_cast<W*>(call.by_id) + (task * pairs + t0 / per) * kPanelIds);
    }
    for (int64_t i = 0; i < ids && call.dbias != nullptr; ++i) {
      call.dbias[first + i] = call.factor * total[i / kWidth][i % kWidth];
    }
  }
}

// 64 ids and 64 columns of the weight's gradient
template <typename T>
void weight_gradient_of(const LinearGradient& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const LinearHead& head = call.head;
  const int64_t pairs = words(head.count, Operand<T>::per_word), groups = words(call.ids, kPanelIds);
  alignas(64) float c[kPanelIds * kPanelIds];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / groups, group = task % groups, column = panel * kPanelIds;
    const int64_t ids = at_most(call.ids - group * kPanelIds, kPanelIds), n = at_most(head.hidden - column, kPanelIds);
    if (pairs == 0) std::memset(c, 0, sizeof(c));
    multiply(static_cast<const W*>(call.x) + panel * pairs * kPanelIds,
             static_cast<const W*>(call.by_id) + group * pairs * kPanelIds, 1, kPanelIds, pairs, ids, c);
    T* out = static_cast<T*>(call.dweight) + (call.first + group * kPanelIds) * head.hidden + column;
    for (int64_t i = 0; i < ids; ++i) {
      for (int64_t h = 0; h < n; ++h) out[i * head.hidden + h] = from_float<T>(c[i * kPanelIds + h] * call.factor);
    }
  }
}

// 64 columns of a part of the tokens' gradients
template <typename T>
void token_gradient_of(const LinearGradient& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const LinearHead& head = call.head;
  const int64_t depth = words(call.ids, Operand<T>::per_word), parts = words(head.count, kPartTokens);
  Scratch scratch(4 * depth * kPanelIds + 64);
  W* columns = scratch.take<W>(depth * kPanelIds);
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / parts, t0 = task % parts * kPartTokens, column = panel * kPanelIds;
    if (panel != packed) {
      const T* weight = static_cast<const T*>(head.weight) + call.first * head.weight_stride + column;
      pack_panel(weight, head.weight_stride, call.ids, at_most(head.hidden - column, kPanelIds), columns);
    }
    packed = panel;
    const int64_t stop = at_most(t0 + kPartTokens, head.count);
    for (int64_t t = t0; t < stop; t += kResultRows) {
      multiply(columns, static_cast<const W*>(call.by_token) + t * call.width, call.width, 1, depth,
               at_most(stop - t, kResultRows), call.dx + (panel * head.count + t) * kPanelIds, call.first > 0);
    }
  }
}

// words [begin, end) of tokens: as rows, and as columns for the weight's gradient
template <typename T>
void pack_all_of(const LinearHead& head, void* rows, void* columns, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  constexpr int64_t per = Operand<T>::per_word;
  const int64_t pairs = words(head.count, per), depth = words(head.hidden, per);
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t there = at_most(head.count - pair * per, per);
    if (rows != nullptr) pack_tokens<T>(head, pair * per, there, static_cast<W*>(rows) + pair * per * depth);
    for (int64_t column = 0; column < head.hidden && columns != nullptr; column += kPanelIds) {
      const T* from[per];
      T tail[per * kPanelIds];
      const int64_t n = at_most(head.hidden - column, kPanelIds);
      for (int64_t i = 0; i < there; ++i) {
        from[i] = static_cast<const T*>(head.x) + head.kept[pair * per + i] * head.x_stride + column;
        if (n == kPanelIds) continue;
        std::memset(static_cast<void*>(tail + i * kPanelIds), 0, kPanelIds * sizeof(T));
        std::memcpy(static_cast<void*>(tail + i * kPanelIds), static_cast<const void*>(from[i]), n * sizeof(T));
        from[i] = tail + i * kPanelIds;
      }
      pack_values(from, there, kPanelIds, static_cast<W*>(columns) + column * pairs + pair * kPanelIds);
    }
  }
}

// tokens [begin, end) of those that are kept: finished sums, rounded once
template <typename T>
void store_tokens_of(const LinearGradient& call, void* dx, int64_t begin, int64_t end) {
  const LinearHead& head = call.head;
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(dx) + head.kept[t] * head.hidden;
    for (int64_t column = 0; column < head.hidden; column += kPanelIds) {
      const float* from = call.dx + column * head.count + t * kPanelIds;
      const int64_t n = at_most(head.hidden - column, kPanelIds);
      for (int64_t h = 0; h < n; ++h) out[column + h] = from_float<T>(from[h] * call.factor);
    }
  }
}

// statistics of blocks in ascending order, as one token's
struct MergedStats {
  float peak, total, weighted, logit, argmax, costs, classes;
};

inline MergedStats merge(const float* stats, int64_t blocks, int64_t columns) {
  MergedStats m{-kInfinity, 0.0f, 0.0f, __builtin_nanf(""), -1.0f, 0.0f, 0.0f};
  for (int64_t b = 0; b < blocks; ++b, stats += columns) {
    // NaN stays
    const float peak = stats[0] > m.peak || stats[0] != stats[0] ? stats[0] : m.peak;
    const float old = m.peak == -kInfinity ? 0.0f : m.peak - peak;
    const float added = stats[0] == -kInfinity ? 0.0f : stats[0] - peak;
    const float shrunk = std::exp(old), share = std::exp(added);
    m.weighted = (m.weighted + m.total * old) * shrunk + (stats[2] + stats[1] * added) * share;
    m.total = m.total * shrunk + stats[1] * share;
    if (stats[3] == stats[3]) m.logit = stats[3];
    if (m.argmax < 0.0f || stats[0] > m.peak) m.argmax = stats[4];
    if (columns == kSmoothedColumns) {
      m.costs += m.classes * old + stats[5] + stats[6] * added;
      m.classes += stats[6];
    }
    m.peak = peak;
  }
  return m;
}

}  // namespace

void linear_merge(const float* stats, int64_t blocks, int64_t columns, const LinearResult& out, int64_t begin,
                  int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const MergedStats m = merge(stats + t * blocks * columns, blocks, columns);
    const bool kept = m.argmax >= 0.0f;
    const float log_total = std::log(m.total);
    out.logp[t] = kept ? (m.logit - m.peak) - log_total : 0.0f;
    out.lse[t] = kept ? m.peak + log_total : 0.0f;
    out.entropy[t] = kept ? log_total - m.weighted / m.total : 0.0f;
    out.argmax[t] = static_cast<int32_t>(m.argmax);
    if (columns == kSmoothedColumns) out.smoothed[t] = kept ? m.classes * log_total - m.costs : 0.0f;
    out.norm[t] = kept ? m.peak : 0.0f;
    // without the target's logit the token's gradient is NaN too
    out.norm[out.tokens + t] = !kept ? 0.0f : m.logit == m.logit ? log_total : m.logit;
  }
}

void linear_per_word(Dtype dtype, int64_t* per_word) {
  TILEFUSE_BY_DTYPE(dtype, T, { *per_word = Operand<T>::per_word; })
}

void linear_stats(const LinearStats& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.head.dtype, T, { stats_of<T>(call, begin, end); })
}

void linear_logits(const LinearHead& head, const void* rows, int64_t first, int64_t ids, float* logits, int64_t begin,
                   int64_t end) {
  TILEFUSE_BY_DTYPE(head.dtype, T, { logits_of<T>(head, rows, first, ids, logits, begin, end); })
}

void linear_pack(const LinearHead& head, void* rows, void* columns, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(head.dtype, T, { pack_all_of<T>(head, rows, columns, begin, end); })
}

void linear_gradients(const LinearGradient& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.head.dtype, T, { gradients_of<T>(call, begin, end); })
}

void linear_weight_gradient(const LinearGradient& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.head.dtype, T, { weight_gradient_of<T>(call, begin, end); })
}

void linear_token_gradient(const LinearGradient& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.head.dtype, T, { token_gradient_of<T>(call, begin, end); })
}

void linear_store_tokens(const LinearGradient& call, void* dx, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.head.dtype, T, { store_tokens_of<T>(call, dx, begin, end); })
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(linear_per_word)
TILEFUSE_DISPATCH(linear_stats)
TILEFUSE_DISPATCH(linear_merge)
TILEFUSE_DISPATCH(linear_logits)
TILEFUSE_DISPATCH(linear_pack)
TILEFUSE_DISPATCH(linear_gradients)
TILEFUSE_DISPATCH(linear_weight_gradient)
TILEFUSE_DISPATCH(linear_token_gradient)
TILEFUSE_DISPATCH(linear_store_tokens)

LinearHead linear_head(const Tensor& x, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                       const OptionalTensor& class_weight, int64_t vocab_start, double scale, double softcap,
                       double temperature) {
  const auto values = [](const OptionalTensor& tensor) -> VocabularyValues {
    if (!tensor) return {nullptr, Dtype::f32};
    return {tensor->const_data_ptr(), dtype_of(*tensor)};
  };
  return {dtype_of(x),
          x.const_data_ptr(),
          weight.const_data_ptr(),
          stride_or_zero(x, 0),
          stride_or_zero(weight, 0),
          x.size(1),
          weight.size(0),
          nullptr,
          0,
          index_of(target),
          vocab_start,
          values(bias),
          values(class_weight),
          static_cast<float>(scale),
          static_cast<float>(softcap),
          static_cast<float>(1.0 / temperature)};
}

std::vector<int64_t> kept_tokens(const Tensor& target, int64_t ignore_index) {
  const Index targets = index_of(target);
  std::vector<int64_t> kept;
  for (int64_t t = 0; t < target.size(0); ++t) {
    if (targets[t] != ignore_index) kept.push_back(t);
  }
  return kept;
}

void check_targets(const char* op, const Tensor& target, const std::vector<int64_t>& kept, int64_t vocabulary,
                   int64_t ignore_index) {
  const Index targets = index_of(target);
  for (const int64_t t : kept) {
    const int64_t id = targets[t];
    if (id < 0 || id >= vocabulary) {
      throw std::runtime_error("tilefuse." + std::string(op) + ": target must be in [0, " + std::to_string(vocabulary) +
                               ") or ignore_index = " + std::to_string(ignore_index) + ", got " + std::to_string(id));
    }
  }
}

LinearResult linear_result(Result& tensors) {
  return {pointer<float>(std::get<0>(tensors)), pointer<float>(std::get<1>(tensors)),
          pointer<float>(std::get<2>(tensors)), pointer<int32_t>(std::get<3>(tensors)),
          pointer<float>(std::get<4>(tensors)), pointer<float>(std::get<5>(tensors)),
          std::get<0>(tensors).size(0)};
}

Result merge_stats(const Tensor& stats) {
  const int64_t tokens = stats.size(0), blocks = stats.size(1), columns = stats.size(2);
  const auto vector = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(stats, {size}, type); };
  Result out{vector(tokens, ScalarType::Float),
             vector(tokens, ScalarType::Float),
             vector(tokens, ScalarType::Float),
             vector(tokens, ScalarType::Int),
             vector(columns == kSmoothedColumns ? tokens : 0, ScalarType::Float),
             torch::stable::new_empty(stats, {2, tokens}, ScalarType::Float)};
  run_parallel(linear_merge, tokens, 1 + 4096 / (blocks + 1), pointer<const float>(stats), blocks, columns,
               linear_result(out));
  return out;
}

Tensor ignored_stats(const Tensor& target, int64_t blocks, bool smooth) {
  const int64_t columns = smooth ? kSmoothedColumns : kStatsColumns;
  Tensor stats = torch::stable::new_empty(target, {target.size(0), blocks, columns}, ScalarType::Float);
  float* to = pointer<float>(stats);
  constexpr float kIgnored[kSmoothedColumns] = {-__builtin_inff(), 0.0f, 0.0f, __builtin_nanf(""), -1.0f, 0.0f, 0.0f};
  const int64_t values = stats.numel();
  for (int64_t i = 0; i < values; ++i) to[i] = kIgnored[i % columns];
  return stats;
}

Tensor make_stats(const LinearHead& head, const Tensor& target, bool smooth, float* logits, const ListedIds& listed,
                  float* listed_logits) {
  const int64_t blocks = (head.vocabulary + kStatsBlock - 1) / kStatsBlock;
  Tensor stats = ignored_stats(target, blocks, smooth);
  const int64_t parts = (head.count + kPartTokens - 1) / kPartTokens;
  run_parallel(linear_stats, parts * blocks, 1,
               LinearStats{head, blocks, stats.size(2), pointer<float>(stats), logits, listed, listed_logits});
  return stats;
}

namespace {

std::unique_ptr<float[]> room(int64_t count) { return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]); }

int64_t pack_grain(const LinearHead& head) { return 1 + 32768 / (head.hidden + 1); }

}  // namespace

std::unique_ptr<float[]> packed_rows(const LinearHead& head) {
  int64_t per = 1;
  linear_per_word(head.dtype, &per);
  const int64_t pairs = (head.count + per - 1) / per;
  std::unique_ptr<float[]> rows = room(pairs * per * ((head.hidden + per - 1) / per));
  void *to_rows = rows.get(), *to_columns = nullptr;
  run_parallel(linear_pack, pairs, pack_grain(head), head, to_rows, to_columns);
  return rows;
}

void make_logits(const LinearHead& head, const float* rows, int64_t first, int64_t ids, float* logits) {
  const int64_t panels = (ids + kPanelIds - 1) / kPanelIds;
  run_parallel(linear_logits, panels, 1, head, rows, first, ids, logits);
}

std::tuple<Tensor, Tensor, Tensor> head_gradients(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                  bool need_x, bool need_weight, bool need_bias) {
  const auto like = [](const Tensor& argument, bool needed) {
    return needed ? torch::stable::new_empty(argument, {argument.size(0), argument.size(1)})
                  : torch::stable::new_empty(argument, {0});
  };
  return {like(x, need_x), like(weight, need_weight),
          torch::stable::new_empty(bias ? *bias : x, {need_bias ? weight.size(0) : 0})};
}

void linear_backward(LinearGradient call, Tensor& dx_out, Tensor& dweight, Tensor& dbias, const MakeGradients& make) {
  const LinearHead& head = call.head;
  const bool need_x = dx_out.dim() == 2;
  void* dx = need_x ? dx_out.mutable_data_ptr() : nullptr;
  call.dweight = dweight.dim() == 2 ? dweight.mutable_data_ptr() : nullptr;
  prefer_huge_pages(dweight);
  const std::unique_ptr<float[]> bias_sums(new float[static_cast<size_t>(dbias.numel() + 1)]);
  call.dbias = dbias.numel() > 0 ? bias_sums.get() : nullptr;
  int64_t per = 1;
  linear_per_word(head.dtype, &per);
  const auto words_of = [&](int64_t n) { return (n + per - 1) / per; };
  const int64_t pairs = words_of(head.count), panels = (head.hidden + kPanelIds - 1) / kPanelIds;
  // a block's gradients, by token and by id, fill kBlockBytes at most
  const int64_t fit = kBlockBytes / (8 * pairs + 1) / kPanelIds * kPanelIds;
  const int64_t most = fit < kPanelIds ? kPanelIds : fit > kBlockIds ? kBlockIds : fit;
  const int64_t rounded = (head.vocabulary + kPanelIds - 1) / kPanelIds * kPanelIds;
  const int64_t block = most < rounded ? most : rounded;
  call.made = static_cast<bool>(make);
  const auto made = room(call.made ? block * even_count(head) : 0);
  if (call.made) call.logits = made.get();
  // one word more each, as the last of an odd number holds two
  const auto by_token = room((head.count + 1) * block / per), by_id = room(pairs * block);
  const auto rows = room(call.logits == nullptr ? pairs * per * words_of(head.hidden) : 0);
  const auto columns = room(call.dweight == nullptr ? 0 : panels * pairs * kPanelIds);
  const auto sums = room(dx == nullptr ? 0 : panels * head.count * kPanelIds);
  call.by_token = by_token.get();
  call.by_id = by_id.get();
  call.rows = rows.get();
  call.x = columns.get();
  call.dx = sums.get();
  void *to_rows = call.logits == nullptr ? rows.get() : nullptr,
       *to_columns = call.dweight == nullptr ? nullptr : columns.get();
  run_parallel(linear_pack, pairs, pack_grain(head), head, to_rows, to_columns);
  for (call.first = 0; call.first < head.vocabulary; call.first += block) {
    call.ids = head.vocabulary - call.first < block ? head.vocabulary - call.first : block;
    const int64_t id_panels = (call.ids + kPanelIds - 1) / kPanelIds;
    call.width = id_panels * kPanelIds / per;
    if (call.made) {
      call.logits_first = call.first;
      make(call.first, call.ids, made.get());
    }
    run_parallel(linear_gradients, id_panels, 1, call);
    if (call.dweight != nullptr) run_parallel(linear_weight_gradient, panels * id_panels, 1, call);
    const int64_t parts = (head.count + kPartTokens - 1) / kPartTokens;
    if (dx != nullptr) run_parallel(linear_token_gradient, panels * parts, 1, call);
  }
  if (dx != nullptr) {
    const int64_t row = head.hidden * static_cast<int64_t>(dx_out.element_size());
    // those of ignored tokens
    for (int64_t t = 0, i = 0; t < call.tokens; ++t) {
      if (i < head.count && head.kept[i] == t) {
        ++i;
      } else {
        std::memset(static_cast<char*>(dx) + t * row, 0, row);
      }
    }
    run_parallel(linear_store_tokens, head.count, 1 + 32768 / (head.hidden + 1), call, dx);
  }
  if (dbias.numel() > 0) {
    using namespace baseline;
    TILEFUSE_BY_DTYPE(dtype_of(dbias), T, {
      T* out = static_cast<T*>(dbias.mutable_data_ptr());
      for (int64_t i = 0; i < head.vocabulary; ++i) out[i] = from_float<T>(bias_sums[i]);
    })
  }
}

namespace {

Tensor stats_fwd(Tensor x, Tensor weight, Tensor target, OptionalTensor bias, OptionalTensor class_weight,
                 int64_t vocab_start, double scale, double softcap, double temperature, int64_t ignore_index,
                 bool smooth) {
  LinearHead head = linear_head(x, weight, target, bias, class_weight, vocab_start, scale, softcap, temperature);
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  head.kept = kept.data();
  head.count = static_cast<int64_t>(kept.size());
  return make_stats(head, target, smooth, nullptr);
}

Result fwd(Tensor x, Tensor weight, Tensor target, OptionalTensor bias, OptionalTensor class_weight, double scale,
           double softcap, double temperature, int64_t ignore_index, bool smooth) {
  LinearHead head = linear_head(x, weight, target, bias, class_weight, 0, scale, softcap, temperature);
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  head.kept = kept.data();
  head.count = static_cast<int64_t>(kept.size());
  check_targets("linear_logprobs", target, kept, head.vocabulary, ignore_index);
  return merge_stats(make_stats(head, target, smooth, nullptr));
}

std::tuple<Tensor, Tensor, Tensor> bwd(Tensor x, Tensor weight, Tensor target, OptionalTensor bias,
                                       OptionalTensor class_weight, Tensor norm, Tensor entropy, Tensor coefficients,
                                       Tensor factor, int64_t vocab_start, double scale, double softcap,
                                       double temperature, int64_t ignore_index, bool need_x, bool need_weight,
                                       bool need_bias) {
  auto [dx, dweight, dbias] = head_gradients(x, weight, bias, need_x, need_weight, need_bias);
  LinearGradient call{};
  call.head = linear_head(x, weight, target, bias, class_weight, vocab_start, scale, softcap, temperature);
  const std::vector<int64_t> kept = kept_tokens(target, ignore_index);
  call.head.kept = kept.data();
  call.head.count = static_cast<int64_t>(kept.size());
  call.norm = pointer<const float>(norm);
  call.entropy = pointer<const float>(entropy);
  call.coefficients = pointer<const float>(coefficients);
  call.factor = *pointer<const float>(factor);
  call.tokens = x.size(0);
  linear_backward(call, dx, dweight, dbias);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("linear_logprobs_fwd", TORCH_BOX(&fwd));
  m.impl("linear_logprobs_bwd", TORCH_BOX(&bwd));
  m.impl("linear_logprob_stats_fwd", TORCH_BOX(&stats_fwd));
  m.impl("merge_logprobs_fwd", TORCH_BOX(&merge_stats));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
