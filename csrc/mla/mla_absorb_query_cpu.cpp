// Queries into the latent space, on the CPU: one head's product and rotation at a time.
// build-flags: -ffp-contract=fast
#include "mla/product_cpu.h"

#include "common/stream_cpu.h"

namespace tilefuse {

struct MlaAbsorbQueryCall {
  const void *q, *weight;
  int64_t q_token, q_head, weight_head, weight_row;
  Dtype dtype;
  int64_t tokens, heads, nope, rank, half;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
  // without data: the token's own number
  Index positions;
  bool interleaved, stream;
  void* out;
};

struct MlaAbsorbQueryBwdCall {
  MlaAbsorbQueryCall query;
  const void* dout;
  int64_t dout_token, dout_head;
  void *dq, *dweight;
};

namespace TILEFUSE_ISA {

namespace {

// the rotated part of one row, or its gradient, which turns the other way; scratch: 5 * half floats
template <typename T>
inline void turn_row(const MlaAbsorbQueryCall& call, int64_t token, const T* in, T* out, float* scratch, bool back) {
  const int64_t position = call.positions.data == nullptr ? token : call.positions[token];
  const float* cos = call.cos + position * call.cos_stride;
  const float* sin = call.sin + position * call.sin_stride;
  float *pairs = scratch, *turned = pairs + 2 * call.half, *sine = turned + 2 * call.half;
  for (int64_t i = 0; i < call.half; ++i) sine[i] = back ? -sin[i] : sin[i];
  for (int64_t i = 0; i < 2 * call.half; ++i) pairs[i] = to_float(in[i]);
  if (call.interleaved) {
    rotate_interleaved(pairs, turned, cos, sine, call.half);
  } else {
    rotate_half(pairs, turned, call.half, cos, sine, call.half);
  }
  for (int64_t i = 0; i < 2 * call.half; ++i) out[i] = from_float<T>(turned[i]);
}

template <typename T>
void absorb(const MlaAbsorbQueryCall& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const int64_t depth = words(call.nope, Operand<T>::per_word), width = call.rank + 2 * call.half;
  const int64_t blocks = (call.tokens + kItemTokens - 1) / kItemTokens;
  const int64_t panels = (call.rank + kColumns - 1) / kColumns;
  Scratch scratch(4 * (depth * (kItemTokens + panels * kColumns) + kColumns * kResultRows + 5 * call.half) + 1024);
  W* rows = scratch.take<W>(depth * kItemTokens);
  // [panels, words of P, kColumns]
  W* columns = scratch.take<W>(panels * depth * kColumns);
  float* c = scratch.take<float>(kResultRows * kColumns);
  float* pairs = scratch.take<float>(5 * call.half);
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
        pack_columns(weight + p * call.weight_row + r0, call.weight_row, call.nope - p < per ? call.nope - p : per, n,
                     columns + (panel * depth + p / per) * kColumns);
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
        multiply(panel, rows + t0 * depth, depth, 1, depth, count, c);
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
      turn_row(call, first + t, q + t * call.q_token + call.nope, out + t * call.heads * width + call.rank, pairs,
               false);
    }
  }
  if (call.stream) stream_done();
}

// one head's queries of a block of tokens
template <typename T>
void absorb_query_gradient(const MlaAbsorbQueryBwdCall& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const MlaAbsorbQueryCall& query = call.query;
  const int64_t depth = words(query.rank, Operand<T>::per_word), width = query.nope + 2 * query.half;
  const int64_t blocks = (query.tokens + kItemTokens - 1) / kItemTokens;
  Scratch scratch(4 * (depth * (kColumns + kResultRows) + kColumns * kResultRows + 5 * query.half) + 512);
  W* columns = scratch.take<W>(depth * kColumns);
  W* rows = scratch.take<W>(depth * kResultRows);
  float* c = scratch.take<float>(kColumns * kResultRows);
  float* pairs = scratch.take<float>(5 * query.half);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, first = task % blocks * kItemTokens;
    const int64_t tokens = query.tokens - first < kItemTokens ? query.tokens - first : kItemTokens;
    const T* dout = static_cast<const T*>(call.dout) + first * call.dout_token + head * call.dout_head;
    const T* weight = static_cast<const T*>(query.weight) + head * query.weight_head;
    T* out = static_cast<T*>(call.dq) + (first * query.heads + head) * width;
    for (int64_t p0 = 0; p0 < query.nope; p0 += kColumns) {
      const int64_t n = query.nope - p0 < kColumns ? query.nope - p0 : kColumns;
      const T* lanes[kColumns];
      for (int64_t i = 0; i < kColumns; ++i) lanes[i] = i < n ? weight + (p0 + i) * query.weight_row : nullptr;
      pack_lanes<kColumns>(lanes, query.rank, columns);
      for (int64_t t = 0; t < tokens; t += kResultRows) {
        const int64_t count = tokens - t < kResultRows ? tokens - t : kResultRows;
        if (depth == 0) {
          std::memset(c, 0, count * kColumns * sizeof(float));
        } else {
          int64_t step;
          const W* at = word_rows(dout + t * call.dout_token, call.dout_token, query.rank, count, rows, &step);
          multiply(columns, at, step, 1, depth, count, c);
        }
        store_panel(c, count, n, out + t * query.heads * width + p0, query.heads * width);
      }
    }
    for (int64_t t = 0; t < tokens && query.half > 0; ++t) {
      turn_row(query, first + t, dout + t * call.dout_token + query.rank, out + t * query.heads * width + query.nope,
               pairs, true);
    }
  }
}

// one head's gradient of the weight, in kPanels panels of columns
template <typename T>
void absorb_weight_gradient(const MlaAbsorbQueryBwdCall& call, int64_t begin, int64_t end) {
  const MlaAbsorbQueryCall& query = call.query;
  constexpr int64_t wide = kPanels * kColumns;
  const int64_t groups = (query.rank + wide - 1) / wide;
  Scratch scratch(TokenSums<T>::bytes(query.nope));
  TokenSums<T> sums(scratch, query.nope);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / groups, r0 = task % groups * wide;
    const int64_t n = query.rank - r0 < wide ? query.rank - r0 : wide;
    const TokenRows<T> x{static_cast<const T*>(query.q) + head * query.q_head, query.q_token, query.nope};
    const TokenRows<T> y{static_cast<const T*>(call.dout) + head * call.dout_head + r0, call.dout_token, n};
    sums.run(x, y, query.tokens, static_cast<T*>(call.dweight) + head * query.nope * query.rank + r0, query.rank);
  }
}

}  // namespace

void mla_absorb_heads(const MlaAbsorbQueryCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { absorb<T>(call, begin, end); })
}

void mla_absorb_query_gradient(const MlaAbsorbQueryBwdCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.query.dtype, T, { absorb_query_gradient<T>(call, begin, end); })
}

void mla_absorb_weight_gradient(const MlaAbsorbQueryBwdCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.query.dtype, T, { absorb_weight_gradient<T>(call, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_absorb_heads)
TILEFUSE_DISPATCH(mla_absorb_query_gradient)
TILEFUSE_DISPATCH(mla_absorb_weight_gradient)

namespace {

// the call without its output; raises on a position outside of the tables
MlaAbsorbQueryCall absorb_call(const Tensor& q, const Tensor& w_uk, const Tensor& cos, const Tensor& sin,
                               const OptionalTensor& positions, bool interleaved) {
  MlaAbsorbQueryCall call{};
  call.dtype = dtype_of(q);
  call.tokens = q.size(0);
  call.heads = q.size(1);
  call.nope = w_uk.size(1);
  call.rank = w_uk.size(2);
  call.half = (q.size(2) - call.nope) / 2;
  call.q = q.const_data_ptr();
  call.q_token = stride_or_zero(q, 0);
  call.q_head = stride_or_zero(q, 1);
  call.weight = w_uk.const_data_ptr();
  call.weight_head = stride_or_zero(w_uk, 0);
  call.weight_row = stride_or_zero(w_uk, 1);
  call.cos = pointer<const float>(cos);
  call.sin = pointer<const float>(sin);
  call.cos_stride = stride_or_zero(cos, 0);
  call.sin_stride = stride_or_zero(sin, 0);
  call.interleaved = interleaved;
  call.positions = index_of(positions);
  for (int64_t i = 0; positions && call.heads > 0 && call.half > 0 && i < call.tokens; ++i) {
    const int64_t position = call.positions[i];
    if (position < 0 || position >= cos.size(0)) {
      throw std::runtime_error("tilefuse.mla_absorb_query: positions must be in [0, " + std::to_string(cos.size(0)) +
                               "), got " + std::to_string(position));
    }
  }
  return call;
}

Tensor mla_absorb_query_fwd(Tensor q, Tensor w_uk, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved) {
  MlaAbsorbQueryCall call = absorb_call(q, w_uk, cos, sin, positions, interleaved);
  Tensor out = empty_of(q, {call.tokens, call.heads, call.rank + 2 * call.half});
  if (call.tokens == 0 || call.heads == 0) return out;
  call.out = out.mutable_data_ptr();
  const int64_t itemsize = static_cast<int64_t>(out.element_size());
  call.stream = out.size(2) * itemsize % 64 == 0 && out.numel() * itemsize >= kStreamBytes;
  const int64_t blocks = (call.tokens + kItemTokens - 1) / kItemTokens;
  run_parallel(mla_absorb_heads, call.heads * blocks, 1, call);
  return out;
}

std::tuple<Tensor, Tensor> mla_absorb_query_bwd(Tensor dout, Tensor q, Tensor w_uk, Tensor cos, Tensor sin,
                                                OptionalTensor positions, bool interleaved) {
  MlaAbsorbQueryBwdCall call{};
  call.query = absorb_call(q, w_uk, cos, sin, positions, interleaved);
  call.dout = dout.const_data_ptr();
  call.dout_token = stride_or_zero(dout, 0);
  call.dout_head = stride_or_zero(dout, 1);
  Tensor dq = empty_contiguous(q), dweight = empty_contiguous(w_uk);
  call.dq = dq.mutable_data_ptr();
  call.dweight = dweight.mutable_data_ptr();
  const int64_t blocks = (call.query.tokens + kItemTokens - 1) / kItemTokens;
  constexpr int64_t kGroup = baseline::kPanels * baseline::kColumns;
  const int64_t groups = (call.query.rank + kGroup - 1) / kGroup;
  run_parallel(mla_absorb_query_gradient, call.query.heads * blocks, 1, call);
  run_parallel(mla_absorb_weight_gradient, call.query.heads * groups, 1, call);
  return {dq, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_absorb_query_fwd", TORCH_BOX(&mla_absorb_query_fwd));
  m.impl("mla_absorb_query_bwd", TORCH_BOX(&mla_absorb_query_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
