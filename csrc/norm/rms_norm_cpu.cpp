// build-flags: -Wno-psabi
// RMSNorm of rows on the CPU, alone or of a sum; forward and backward.
#include "norm/rms_norm_cpu.h"

namespace tilefuse {

struct RmsNormCall {
  Dtype dtype;
  int64_t dim;
  // what is normed, or its sum with the residual
  NormRows x, residual;
  // weight + weight_offset, [D]
  const float* weight;
  float eps;
  bool llama, stream;
  // contiguous: [T, D], [T, D] with a residual, [T]
  void *y, *h;
  float* rstd;
};

struct RmsNormBwdCall {
  Dtype dtype;
  int64_t rows, dim;
  NormRows dout, dh, x;
  const float *weight, *rstd;
  bool stream;
  // contiguous: [T, D], and [spans, D] where the weight's gradient is wanted
  void* dx;
  float* partial;
};

namespace TILEFUSE_ISA {

namespace {

template <typename T>
void scale_row(const T* x, const float* weight, Rstd rstd, bool llama, T* y, int64_t dim) {
  const float value = rstd.value, factor = rstd.factor;
  const auto scale = [=](int64_t i, auto normed, auto lanes) { put(y, i, normed * get(weight, i, lanes)); };
  if (llama) {
    over_floats(dim, [=](int64_t i, auto lanes) { put(y, i, get(x, i, lanes) * factor * value); });
    over_floats(dim, [=](int64_t i, auto lanes) { scale(i, get(y, i, lanes), lanes); });
  } else if (factor != 1.0f) {
    over_floats(dim, [=](int64_t i, auto lanes) { scale(i, get(x, i, lanes) * factor * value, lanes); });
  } else {
    over_floats(dim, [=](int64_t i, auto lanes) { scale(i, get(x, i, lanes) * value, lanes); });
  }
}

template <typename T>
void forward(const RmsNormCall& call, T* buffer, int64_t begin, int64_t end) {
  const int64_t dim = call.dim, bytes = dim * static_cast<int64_t>(sizeof(T));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = norm_row<T>(call.x, row);
    if (const T* residual = norm_row<T>(call.residual, row)) {
      T* to = static_cast<T*>(call.h) + row * dim;
      T* h = call.stream ? buffer + dim : to;
      over_floats(dim, [=](int64_t i, auto lanes) { put(h, i, get(x, i, lanes) + get(residual, i, lanes)); });
      if (call.stream) stream_copy(to, h, bytes);
      x = h;
    }
    const Rstd rstd = rstd_of(dim, call.eps, [x](int64_t i, auto lanes) { return get(x, i, lanes); });
    call.rstd[row] = rstd.value * rstd.factor;
    T* to = static_cast<T*>(call.y) + row * dim;
    T* y = call.stream ? buffer : to;
    scale_row(x, call.weight, rstd, call.llama, y, dim);
    if (call.stream) stream_copy(to, y, bytes);
  }
  if (call.stream) stream_done();
}

// dx from rstd and mean(dnormed * normed)
template <typename T>
void gradient_row(const T* dout, const T* dh, const T* x, const float* weight, float rstd, float mean, T* dx,
                  float* partial, int64_t dim) {
  const auto add_partial = [=](int64_t i, auto lanes) {
    put(partial, i, get(partial, i, lanes) + get(dout, i, lanes) * (get(x, i, lanes) * rstd));
  };
  const auto gradient = [=](int64_t i, auto lanes) {
    return rstd * (get(dout, i, lanes) * get(weight, i, lanes) - get(x, i, lanes) * rstd * mean);
  };
  if (partial != nullptr) over_floats(dim, add_partial);
  if (dh != nullptr) {
    over_floats(dim, [=](int64_t i, auto lanes) { put(dx, i, gradient(i, lanes) + get(dh, i, lanes)); });
  } else {
    over_floats(dim, [=](int64_t i, auto lanes) { put(dx, i, gradient(i, lanes)); });
  }
}

template <typename T>
void backward(const RmsNormBwdCall& call, T* buffer, int64_t begin, int64_t end) {
  const int64_t dim = call.dim;
  const float* weight = call.weight;
  for (int64_t span = begin; span < end; ++span) {
    float* partial = call.partial == nullptr ? nullptr : call.partial + span * dim;
    if (partial != nullptr) {
      for (int64_t i = 0; i < dim; ++i) partial[i] = 0.0f;
    }
    const int64_t next = (span + 1) * kNormSpan, last = next < call.rows ? next : call.rows;
    for (int64_t row = span * kNormSpan; row < last; ++row) {
      const T *dout = norm_row<T>(call.dout, row), *x = norm_row<T>(call.x, row);
      const float rstd = call.rstd[row];
      const float sum = sum_lanes(dim, [=](int64_t i, auto lanes) {
        return get(dout, i, lanes) * get(weight, i, lanes) * (get(x, i, lanes) * rstd);
      });
      T* to = static_cast<T*>(call.dx) + row * dim;
      T* dx = call.stream ? buffer : to;
      gradient_row(dout, norm_row<T>(call.dh, row), x, weight, rstd, sum / static_cast<float>(dim), dx, partial, dim);
      if (call.stream) stream_copy(to, dx, dim * static_cast<int64_t>(sizeof(T)));
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

// scratch: two rows of at most float32
void rms_norm_rows(const RmsNormCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, forward<T>(call, reinterpret_cast<T*>(scratch), begin, end);)
}

// scratch: a row of at most float32
void rms_norm_spans(const RmsNormBwdCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, backward<T>(call, reinterpret_cast<T*>(scratch), begin, end);)
}

void sum_spans(const float* partial, int64_t spans, int64_t dim, Dtype dtype, void* out, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kNormColumns;
    const int64_t width = dim - first < kNormColumns ? dim - first : kNormColumns;
    double total[kNormColumns] = {};
    for (int64_t span = 0; span < spans; ++span) {
      const float* from = partial + span * dim + first;
      for (int64_t i = 0; i < width; ++i) total[i] += from[i];
    }
    TILEFUSE_BY_DTYPE(dtype, T, {
      T* to = static_cast<T*>(out) + first;
      for (int64_t i = 0; i < width; ++i) to[i] = from_float<T>(static_cast<float>(total[i]));
    })
  }
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(rms_norm_rows)
TILEFUSE_DISPATCH(rms_norm_spans)

namespace {

struct RmsNormOut {
  Tensor y;
  OptionalTensor h;
  Tensor rstd;
};

RmsNormOut forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, double eps,
                   double weight_offset, bool llama) {
  const int64_t rows = x.size(0), dim = x.size(1);
  RmsNormOut out{empty_contiguous(x), {}, empty_of(x, {rows}, ScalarType::Float)};
  if (residual) out.h = empty_contiguous(x);
  const auto scale = norm_weight(weight, weight_offset, dim);
  RmsNormCall call{};
  call.dtype = dtype_of(x);
  call.dim = dim;
  call.x = norm_rows(x);
  call.residual = norm_rows(residual);
  call.weight = scale.get();
  call.eps = static_cast<float>(eps);
  call.llama = llama;
  call.stream = rows * dim * static_cast<int64_t>(x.element_size()) >= kStreamBytes;
  call.y = out.y.mutable_data_ptr();
  call.h = pointer<void>(out.h);
  call.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  run_parallel(rms_norm_rows, rows, 1 + 32768 / dim, call, RangeScratch<float>{2 * dim});
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_fwd(Tensor x, OptionalTensor weight, double eps, double weight_offset, bool llama) {
  RmsNormOut out = forward(x, {}, weight, eps, weight_offset, llama);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(Tensor x, Tensor residual, OptionalTensor weight, double eps,
                                                    double weight_offset, bool llama) {
  RmsNormOut out = forward(x, residual, weight, eps, weight_offset, llama);
  return {out.y, *out.h, out.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor dout, OptionalTensor dh, Tensor x, OptionalTensor weight, Tensor rstd,
                                        double weight_offset, bool with_dweight) {
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor dx = empty_contiguous(x);
  const auto scale = norm_weight(weight, weight_offset, dim);
  const NormWeightGradient dweight(rows, dim, with_dweight);
  RmsNormBwdCall call{};
  call.dtype = dtype_of(x);
  call.rows = rows;
  call.dim = dim;
  call.dout = norm_rows(dout);
  call.dh = norm_rows(dh);
  call.x = norm_rows(x);
  call.weight = scale.get();
  call.rstd = pointer<const float>(rstd);
  call.stream = rows * dim * static_cast<int64_t>(x.element_size()) >= kStreamBytes;
  call.dx = dx.mutable_data_ptr();
  call.partial = dweight.partial.get();
  run_parallel(rms_norm_spans, dweight.spans, 1 + 32768 / (kNormSpan * dim), call, RangeScratch<float>{dim});
  return {dx, dweight.sum(weight, x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
