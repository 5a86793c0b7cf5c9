// Queries into the latent space, on the CPU: one head's product and rotation at a time.
// build-flags: -ffp-contract=fast
#include "mla/product.h"

#include "common/stream_cpu.h"

namespace tilefuse {

struct AbsorbCall {
  const void *q, *weight;
  int64_t q_token, q_head, weight_head, weight_row;
  Dtype dtype;
  int64_t tokens, heads, nope, rank, half;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
  // positions, or null: the token's own number
  const void* positions;
  bool positions_wide, interleaved, stream;
  void* out;
};

// queries of one item of work
constexpr int64_t kItemTokens = 240;

namespace TILEFUSE_ISA {

// into the second-level cache
template <typename T>
static inline void fetch(const T* row, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(row + i, 0, 2);
}

template <typename T>
static void absorb(const AbsorbCall& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const int64_t depth = words(call.nope, Operand<T>::per_word), width = call.rank + 2 * call.half;
  const int64_t blocks = (call.tokens + kItemTokens - 1) / kItemTokens;
  const int64_t panels = (call.rank + kColumns - 1) / kColumns;
  Scratch scratch(4 * (depth * (kItemTokens + panels * kColumns) + 2 * kColumns * kResultRows + 4 * call.half) + 1024);
  W* rows = scratch.take<W>(depth * kItemTokens);
  // [panels, words of P, kColumns]
  W* columns = scratch.take<W>(panels * depth * kColumns);
  float* c = scratch.take<float>(kResultRows * kColumns);
  float* part = scratch.take<float>(kResultRows * kColumns);
  float* pairs = scratch.take<float>(2 * call.half);
  float* turned = scratch.take<float>(2 * call.half);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, first = task % blocks * kItemTokens;
    const int64_t tokens = call.tokens - first < kItemTokens ? call.tokens - first : kItemTokens;
    const T* q = static_cast<const T*>(call.q) + first * call.q_token + head * call.q_head;
    const T* weight = static_cast<const T*>(call.weight) + head * call.weight_head;
    T* out = static_cast<T*>(call.out) + (first * call.heads + head) * width;
    for (int64_t t = 0; t < tokens && depth > 0; ++t) {
      const T* row = q + t * call.q_token;
      pack_rows(&row, 1, call.nope, rows + t * depth);
    }
    constexpr int64_t per = Operand<T>::per_word;
    for (int64_t p = 0; p < call.nope; p += per) {
      // whole rows of the weight, in the order in which they lie
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t r0 = panel * kColumns, n = call.rank - r0 < kColumns ? call.rank - r0 : kColumns;
        const T* from[per];
        T tail[per * kColumns];
        const int64_t there = call.nope - p < per ? call.nope - p : per;
        for (int64_t i = 0; i < there; ++i) {
          from[i] = weight + (p + i) * call.weight_row + r0;
          if (n == kColumns) continue;
          std::memset(static_cast<void*>(tail + i * kColumns), 0, kColumns * sizeof(T));
          std::memcpy(static_cast<void*>(tail + i * kColumns), static_cast<const void*>(from[i]), n * sizeof(T));
          from[i] = tail + i * kColumns;
        }
        pack_values(from, there, kColumns, columns + (panel * depth + p / per) * kColumns);
      }
    }
    for (int64_t r0 = 0; r0 < call.rank; r0 += kColumns) {
      const int64_t n = call.rank - r0 < kColumns ? call.rank - r0 : kColumns;
      const W* panel = columns + r0 * depth;
      if (head + 1 < call.heads) {
        // a panel's share of what the next head reads, whose rows lie too far apart for the hardware to foresee
        const int64_t turn = r0 / kColumns;
        for (int64_t p = turn * call.nope / panels; p < (turn + 1) * call.nope / panels; ++p) {
          fetch(weight + call.weight_head + p * call.weight_row, call.rank);
        }
        for (int64_t t = turn * tokens / panels; t < (turn + 1) * tokens / panels; ++t) {
          fetch(q + call.q_head + t * call.q_token, call.nope + 2 * call.half);
        }
      }
      for (int64_t t0 = 0; t0 < tokens; t0 += kResultRows) {
        const int64_t count = tokens - t0 < kResultRows ? tokens - t0 : kResultRows;
        if (depth == 0) std::memset(c, 0, count * kColumns * sizeof(float));
        multiply(panel, rows + t0 * depth, depth, depth, count, c, part);
        for (int64_t t = 0; t < count; ++t) {
          T* to = out + (t0 + t) * call.heads * width + r0;
          T line[kColumns];
          T* target = call.stream ? line : to;
          for (int64_t i = 0; i < n; ++i) target[i] = from_float<T>(c[t * kColumns + i]);
          if (call.stream) stream_copy(to, line, n * static_cast<int64_t>(sizeof(T)));
        }
      }
    }
    for (int64_t t = 0; t < tokens && call.half > 0; ++t) {
      const int64_t token = first + t;
      int64_t position = token;
      if (call.positions != nullptr) {
        position = call.positions_wide ? static_cast<const int64_t*>(call.positions)[token]
                                       : static_cast<const int32_t*>(call.positions)[token];
      }
      const float* cos = call.cos + position * call.cos_stride;
      const float* sin = call.sin + position * call.sin_stride;
      const T* in = q + t * call.q_token + call.nope;
      T* to = out + t * call.heads * width + call.rank;
      for (int64_t i = 0; i < 2 * call.half; ++i) pairs[i] = to_float(in[i]);
      if (call.interleaved) {
        rotate_interleaved(pairs, turned, cos, sin, call.half);
      } else {
        rotate_half(pairs, turned, call.half, cos, sin, call.half);
      }
      for (int64_t i = 0; i < 2 * call.half; ++i) to[i] = from_float<T>(turned[i]);
    }
  }
  if (call.stream) stream_done();
}

void mla_absorb_heads(const AbsorbCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { absorb<T>(call, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_absorb_heads, (const AbsorbCall&, int64_t, int64_t))

static Tensor mla_absorb_query_fwd(Tensor q, Tensor w_uk, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                                   bool interleaved) {
  AbsorbCall call{};
  call.dtype = dtype_of(q);
  call.tokens = q.size(0);
  call.heads = q.size(1);
  call.nope = w_uk.size(1);
  call.rank = w_uk.size(2);
  call.half = (q.size(2) - call.nope) / 2;
  Tensor out = torch::stable::new_empty(q, {call.tokens, call.heads, call.rank + 2 * call.half});
  if (call.tokens == 0 || call.heads == 0) return out;
  call.q = q.const_data_ptr();
  call.q_token = stride_or_zero(q, 0);
  call.q_head = stride_or_zero(q, 1);
  call.weight = w_uk.const_data_ptr();
  call.weight_head = stride_or_zero(w_uk, 0);
  call.weight_row = stride_or_zero(w_uk, 1);
  call.cos = static_cast<const float*>(cos.const_data_ptr());
  call.sin = static_cast<const float*>(sin.const_data_ptr());
  call.cos_stride = stride_or_zero(cos, 0);
  call.sin_stride = stride_or_zero(sin, 0);
  call.interleaved = interleaved;
  if (positions) {
    const IndexData data = index_data(*positions);
    call.positions = data.data;
    call.positions_wide = data.wide;
    for (int64_t i = 0; call.half > 0 && i < call.tokens; ++i) {
      if (data[i] < 0 || data[i] >= cos.size(0)) {
        throw std::runtime_error("tilefuse.mla_absorb_query: positions must be in [0, " + std::to_string(cos.size(0)) +
                                 "), got " + std::to_string(data[i]));
      }
    }
  }
  call.out = out.mutable_data_ptr();
  const int64_t itemsize = static_cast<int64_t>(out.element_size());
  call.stream = out.size(2) * itemsize % 64 == 0 && out.numel() * itemsize >= kStreamBytes;
  const int64_t blocks = (call.tokens + kItemTokens - 1) / kItemTokens;
  const auto kernel = mla_absorb_heads_dispatch();
  parallel_for(0, call.heads * blocks, 1, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tilefuse_cpu, m) {
  m.def(
      "mla_absorb_query_fwd(Tensor q, Tensor w_uk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("mla_absorb_query_fwd", TORCH_BOX(&mla_absorb_query_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
