// Two attention results made into one, on the CPU: weights of a few rows at a time, then the rows themselves.
#include "common/cpu_math.h"
#include "common/stream_cpu.h"

namespace tilefuse {

// a [.., S, H, D] tensor, and a [.., H, S] one, in elements
struct MergeRows {
  const void* data;
  int64_t batch, token, head;
};
struct MergeStatistics {
  const float* data;
  int64_t batch, head, token;
};

struct MergeAttentionCall {
  Dtype dtype;
  int64_t tokens, heads, dim;
  MergeRows a, b, dout;
  MergeStatistics lse_a, lse_b, dlse;
  // contiguous: the result and its lse, or the gradients of both sides
  void *out, *out_b;
  float *lse, *lse_out_b;
  bool stream;
};

namespace TILEFUSE_ISA {

namespace {

// rows whose weights are found together
constexpr int64_t kChunk = 64;

template <typename T>
inline const T* row_of(const MergeAttentionCall& call, const MergeRows& x, int64_t row) {
  const int64_t place = row / call.heads;
  return static_cast<const T*>(x.data) + place / call.tokens * x.batch + place % call.tokens * x.token +
         row % call.heads * x.head;
}

inline int64_t statistic(const MergeAttentionCall& call, const MergeStatistics& x, int64_t row) {
  const int64_t place = row / call.heads;
  return place / call.tokens * x.batch + place % call.tokens * x.token + row % call.heads * x.head;
}

// where a contiguous [.., H, S] tensor holds a row
inline int64_t packed_statistic(const MergeAttentionCall& call, int64_t row) {
  const int64_t place = row / call.heads;
  return (place / call.tokens * call.heads + row % call.heads) * call.tokens + place % call.tokens;
}

struct Weights {
  float a[kChunk], b[kChunk], lse[kChunk];
};

inline void find_weights(const MergeAttentionCall& call, int64_t begin, int64_t count, Weights& w) {
  for (int64_t i = 0; i < count; ++i) {
    w.a[i] = call.lse_a.data[statistic(call, call.lse_a, begin + i)];
    w.b[i] = call.lse_b.data[statistic(call, call.lse_b, begin + i)];
  }
  for (int64_t i = count; i < kChunk; ++i) w.a[i] = w.b[i] = 0.0f;
  for (int64_t i = 0; i < kChunk; ++i) {
    // +inf is another mark for no keys
    const float a = w.a[i] == INFINITY ? -INFINITY : w.a[i], b = w.b[i] == INFINITY ? -INFINITY : w.b[i];
    const float top = a > b ? a : b, bottom = a > b ? b : a;
    const float sum = top + log1p_unit_f32(exp_f32(bottom - top));
    w.lse[i] = top == -INFINITY ? top : sum;
    const float base = top == -INFINITY ? 0.0f : w.lse[i];
    w.a[i] = exp_f32(a - base);
    w.b[i] = exp_f32(b - base);
  }
}

// a row goes to where it belongs, or to a buffer from which it is streamed
template <typename T>
struct Target {
  T *to, *buffer;
  bool stream;
  T* row() const { return stream ? buffer : to; }
  void done(int64_t dim) const {
    if (stream) stream_copy(to, buffer, dim * static_cast<int64_t>(sizeof(T)));
  }
};

template <typename T>
inline void scaled(T* out, float weight, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(weight * to_float(x[i]));
}

template <typename T>
inline void zeros(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(0.0f);
}

template <typename T>
void merge(const MergeAttentionCall& call, T* buffer, int64_t begin, int64_t end) {
  Weights w;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    find_weights(call, first, count, w);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const T *a = row_of<T>(call, call.a, row), *b = row_of<T>(call, call.b, row);
      const Target<T> target{static_cast<T*>(call.out) + row * call.dim, buffer, call.stream};
      T* out = target.row();
      const float x = w.a[i], y = w.b[i];
      // an empty side may hold anything: it is not read
      if (x != 0.0f && y != 0.0f) {
        for (int64_t d = 0; d < call.dim; ++d) out[d] = from_float<T>(x * to_float(a[d]) + y * to_float(b[d]));
      } else if (x != 0.0f) {
        scaled(out, x, a, call.dim);
      } else if (y != 0.0f) {
        scaled(out, y, b, call.dim);
      } else {
        zeros(out, call.dim);
      }
      target.done(call.dim);
      call.lse[packed_statistic(call, row)] = w.lse[i];
    }
  }
  if (call.stream) stream_done();
}

template <typename T>
void merge_gradient(const MergeAttentionCall& call, T* buffer, int64_t begin, int64_t end) {
  Weights w;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    find_weights(call, first, count, w);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const T *a = row_of<T>(call, call.a, row), *b = row_of<T>(call, call.b, row),
              *g = row_of<T>(call, call.dout, row);
      const float x = w.a[i], y = w.b[i];
      // d out / d lse_a = w_a (a - out) = w_a w_b (a - b), which is 0 where a side is empty
      float inner = 0.0f;
      if (x != 0.0f && y != 0.0f) {
        constexpr int64_t kSums = 32;
        float sums[kSums] = {};
        int64_t d = 0;
        for (; d + kSums <= call.dim; d += kSums) {
          for (int64_t j = 0; j < kSums; ++j) sums[j] += (to_float(a[d + j]) - to_float(b[d + j])) * to_float(g[d + j]);
        }
        for (int64_t j = 0; j < kSums; ++j) inner += sums[j];
        for (; d < call.dim; ++d) inner += (to_float(a[d]) - to_float(b[d])) * to_float(g[d]);
        inner *= x * y;
      }
      const float of_lse = call.dlse.data[statistic(call, call.dlse, row)];
      const int64_t place = packed_statistic(call, row);
      call.lse[place] = x * of_lse + inner;
      call.lse_out_b[place] = y * of_lse - inner;
      for (int side = 0; side < 2; ++side) {
        T* out = static_cast<T*>(side == 0 ? call.out : call.out_b) + row * call.dim;
        const Target<T> target{out, buffer, call.stream};
        scaled(target.row(), side == 0 ? x : y, g, call.dim);
        target.done(call.dim);
      }
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

// buffer: D elements
void merge_attention_rows(const MergeAttentionCall& call, bool backward, void* buffer, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (backward) {
      merge_gradient<T>(call, static_cast<T*>(buffer), begin, end);
    } else {
      merge<T>(call, static_cast<T*>(buffer), begin, end);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(merge_attention_rows)

namespace {

MergeRows merge_rows(const Tensor& t) {
  const int64_t rank = t.dim();
  return {t.const_data_ptr(), rank == 4 ? stride_or_zero(t, 0) : 0, stride_or_zero(t, rank - 3),
          stride_or_zero(t, rank - 2)};
}

MergeStatistics merge_statistics(const Tensor& t) {
  const int64_t rank = t.dim();
  return {static_cast<const float*>(t.const_data_ptr()), rank == 3 ? stride_or_zero(t, 0) : 0,
          stride_or_zero(t, rank - 2), stride_or_zero(t, rank - 1)};
}

MergeAttentionCall merge_call(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                              int64_t outputs) {
  MergeAttentionCall call{};
  const int64_t rank = out_a.dim();
  call.dtype = dtype_of(out_a);
  call.tokens = out_a.size(rank - 3);
  call.heads = out_a.size(rank - 2);
  call.dim = out_a.size(rank - 1);
  call.a = merge_rows(out_a);
  call.b = merge_rows(out_b);
  call.lse_a = merge_statistics(lse_a);
  call.lse_b = merge_statistics(lse_b);
  const int64_t row_bytes = call.dim * static_cast<int64_t>(out_a.element_size());
  call.stream = row_bytes % 64 == 0 && outputs * out_a.numel() / call.dim * row_bytes >= kStreamBytes;
  return call;
}

void run(const MergeAttentionCall& call, bool backward, int64_t rows) {
  run_parallel(merge_attention_rows, rows, 64, call, backward, RangeScratch<float>{call.dim});
}

std::tuple<Tensor, Tensor> merge_attention_fwd(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  Tensor out = empty_contiguous(out_a), lse = empty_contiguous(lse_a);
  if (out_a.numel() == 0 && lse_a.numel() == 0) return {out, lse};
  MergeAttentionCall call = merge_call(out_a, lse_a, out_b, lse_b, 1);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(call, false, lse_a.numel());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_bwd(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a,
                                                               Tensor out_b, Tensor lse_b) {
  Tensor dout_a = empty_contiguous(out_a), dlse_a = empty_contiguous(lse_a);
  Tensor dout_b = empty_contiguous(out_b), dlse_b = empty_contiguous(lse_b);
  if (out_a.numel() == 0 && lse_a.numel() == 0) return {dout_a, dlse_a, dout_b, dlse_b};
  MergeAttentionCall call = merge_call(out_a, lse_a, out_b, lse_b, 2);
  call.dout = merge_rows(dout);
  call.dlse = merge_statistics(dlse);
  call.out = dout_a.mutable_data_ptr();
  call.out_b = dout_b.mutable_data_ptr();
  call.lse = static_cast<float*>(dlse_a.mutable_data_ptr());
  call.lse_out_b = static_cast<float*>(dlse_b.mutable_data_ptr());
  run(call, true, lse_a.numel());
  return {dout_a, dlse_a, dout_b, dlse_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("merge_attention_fwd", TORCH_BOX(&merge_attention_fwd));
  m.impl("merge_attention_bwd", TORCH_BOX(&merge_attention_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
