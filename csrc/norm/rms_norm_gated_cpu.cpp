// build-flags: -Wno-psabi -ffp-contract=fast
// RMSNorm of rows with a silu gate in front of it or behind it, on the CPU; forward and backward.
#include "common/floats_math_cpu.h"
#include "norm/rms_norm_cpu.h"

namespace tilefuse {

struct RmsNormGatedCall {
  Dtype dtype;
  int64_t rows, dim;
  NormRows x, gate;
  // [D]
  const float* weight;
  float eps;
  bool norm_first, stream;
  // contiguous: [T, D] and [T]
  void* y;
  float* rstd;
  // backward; contiguous, and [spans, D] where the weight's gradient is wanted
  NormRows dout;
  void *dx, *dgate;
  float* partial;
};

namespace TILEFUSE_ISA {

namespace {

template <typename T>
void forward(const RmsNormGatedCall& call, float* scratch, int64_t begin, int64_t end) {
  const int64_t dim = call.dim, bytes = dim * static_cast<int64_t>(sizeof(T));
  const float* weight = call.weight;
  const bool norm_first = call.norm_first;
  float *values = scratch, *activated = scratch + dim;
  T* buffer = reinterpret_cast<T*>(scratch + 2 * dim);
  for (int64_t row = begin; row < end; ++row) {
    const T *x = norm_row<T>(call.x, row), *gate = norm_row<T>(call.gate, row);
    over_floats(dim, [=](int64_t i, auto lanes) {
      const auto g = get(gate, i, lanes), active = g * sigmoid_of(g), value = get(x, i, lanes);
      put(activated, i, active);
      put(values, i, norm_first ? value : value * active);
    });
    const Rstd rstd = rstd_of(dim, call.eps, [=](int64_t i, auto lanes) { return get(values, i, lanes); });
    call.rstd[row] = rstd.value * rstd.factor;
    T* to = static_cast<T*>(call.y) + row * dim;
    T* y = call.stream ? buffer : to;
    const auto scaled = [=](int64_t i, auto lanes) {
      return get(values, i, lanes) * rstd.factor * rstd.value * get(weight, i, lanes);
    };
    if (norm_first) {
      over_floats(dim, [=](int64_t i, auto lanes) { put(y, i, scaled(i, lanes) * get(activated, i, lanes)); });
    } else {
      over_floats(dim, [=](int64_t i, auto lanes) { put(y, i, scaled(i, lanes)); });
    }
    if (call.stream) stream_copy(to, y, bytes);
  }
  if (call.stream) stream_done();
}

template <typename T>
void backward_row(const RmsNormGatedCall& call, int64_t row, float* partial, float* scratch, T* dx, T* dgate) {
  const int64_t dim = call.dim;
  const T *x = norm_row<T>(call.x, row), *gate = norm_row<T>(call.gate, row), *dout = norm_row<T>(call.dout, row);
  const float* weight = call.weight;
  const float rstd = call.rstd[row];
  const bool norm_first = call.norm_first;
  float *activated = scratch, *slope = activated + dim, *normed = slope + dim, *dscaled = normed + dim;
  const float sum = sum_lanes(dim, [=](int64_t i, auto lanes) {
    const auto g = get(gate, i, lanes), share = sigmoid_of(g), active = g * share;
    const auto upstream = get(dout, i, lanes), value = get(x, i, lanes);
    const auto norm = norm_first ? value * rstd : value * active * rstd;
    const auto scaled = norm_first ? upstream * active : upstream;
    put(activated, i, active);
    put(slope, i, share + active * (1.0f - share));
    put(normed, i, norm);
    put(dscaled, i, scaled);
    return scaled * get(weight, i, lanes) * norm;
  });
  const float mean = sum / static_cast<float>(dim);
  if (partial != nullptr) {
    over_floats(dim, [=](int64_t i, auto lanes) {
      put(partial, i, get(partial, i, lanes) + get(dscaled, i, lanes) * get(normed, i, lanes));
    });
  }
  over_floats(dim, [=](int64_t i, auto lanes) {
    const auto scale = get(weight, i, lanes), norm = get(normed, i, lanes);
    const auto dvalue = rstd * (get(dscaled, i, lanes) * scale - norm * mean);
    const auto dactivated = norm_first ? get(dout, i, lanes) * norm * scale : dvalue * get(x, i, lanes);
    put(dx, i, norm_first ? dvalue : dvalue * get(activated, i, lanes));
    put(dgate, i, dactivated * get(slope, i, lanes));
  });
}

template <typename T>
void backward(const RmsNormGatedCall& call, float* scratch, int64_t begin, int64_t end) {
  const int64_t dim = call.dim, bytes = dim * static_cast<int64_t>(sizeof(T));
  T *dx_buffer = reinterpret_cast<T*>(scratch + 4 * dim), *dgate_buffer = dx_buffer + dim;
  for (int64_t span = begin; span < end; ++span) {
    float* partial = call.partial == nullptr ? nullptr : call.partial + span * dim;
    if (partial != nullptr) {
      for (int64_t i = 0; i < dim; ++i) partial[i] = 0.0f;
    }
    const int64_t next = (span + 1) * kNormSpan, last = next < call.rows ? next : call.rows;
    for (int64_t row = span * kNormSpan; row < last; ++row) {
      T *dx = static_cast<T*>(call.dx) + row * dim, *dgate = static_cast<T*>(call.dgate) + row * dim;
      if (call.stream) {
        backward_row(call, row, partial, scratch, dx_buffer, dgate_buffer);
        stream_copy(dx, dx_buffer, bytes);
        stream_copy(dgate, dgate_buffer, bytes);
      } else {
        backward_row(call, row, partial, scratch, dx, dgate);
      }
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

// scratch: three rows
void rms_norm_gated_rows(const RmsNormGatedCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, forward<T>(call, scratch, begin, end);)
}

// scratch: six rows
void rms_norm_gated_spans(const RmsNormGatedCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, backward<T>(call, scratch, begin, end);)
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(rms_norm_gated_rows)
TILEFUSE_DISPATCH(rms_norm_gated_spans)

namespace {

RmsNormGatedCall call_of(const Tensor& x, const Tensor& gate, bool norm_first) {
  RmsNormGatedCall call{};
  call.dtype = dtype_of(x);
  call.rows = x.size(0);
  call.dim = x.size(1);
  call.x = norm_rows(x);
  call.gate = norm_rows(gate);
  call.norm_first = norm_first;
  call.stream = x.numel() * static_cast<int64_t>(x.element_size()) >= kStreamBytes;
  return call;
}

std::tuple<Tensor, Tensor> rms_norm_gated_fwd(Tensor x, Tensor gate, OptionalTensor weight, double eps,
                                              bool norm_first) {
  RmsNormGatedCall call = call_of(x, gate, norm_first);
  Tensor y = empty_contiguous(x), rstd = torch::stable::new_empty(x, {call.rows}, ScalarType::Float);
  const auto scale = norm_weight(weight, 0.0, call.dim);
  call.weight = scale.get();
  call.eps = static_cast<float>(eps);
  call.y = y.mutable_data_ptr();
  call.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  run_parallel(rms_norm_gated_rows, call.rows, 1 + 16384 / call.dim, call, RangeScratch<float>{3 * call.dim});
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_bwd(Tensor dout, Tensor x, Tensor gate, OptionalTensor weight,
                                                      Tensor rstd, bool norm_first, bool with_dweight) {
  RmsNormGatedCall call = call_of(x, gate, norm_first);
  Tensor dx = empty_contiguous(x), dgate = empty_contiguous(gate);
  const auto scale = norm_weight(weight, 0.0, call.dim);
  const NormWeightGradient dweight(call.rows, call.dim, with_dweight);
  call.weight = scale.get();
  call.rstd = static_cast<float*>(rstd.data_ptr());
  call.dout = norm_rows(dout);
  call.dx = dx.mutable_data_ptr();
  call.dgate = dgate.mutable_data_ptr();
  call.partial = dweight.partial.get();
  run_parallel(rms_norm_gated_spans, dweight.spans, 1 + 16384 / (kNormSpan * call.dim), call,
               RangeScratch<float>{6 * call.dim});
  return {dx, dgate, dweight.sum(weight, x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("rms_norm_gated_fwd", TORCH_BOX(&rms_norm_gated_fwd));
  m.impl("rms_norm_gated_bwd", TORCH_BOX(&rms_norm_gated_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
