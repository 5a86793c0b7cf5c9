// build-flags: -Wno-psabi
// Quantised and dequantised at once on the CPU, and the gradients: rows in pieces that stay in L1.
#include "common/stream_cpu.h"
#include "lowbit/codes_cpu.h"

namespace tilefuse {

struct FakeQuantizeCall {
  Dtype dtype;
  CodeRule rule;
  const void* x;
  int64_t x_stride;
  // given scales and, of asymmetric codes, zeros
  const float* scale;
  int64_t scale_stride;
  const uint8_t* zero;
  int64_t zero_stride;
  // forward: values, and a bit for each that was not clamped, if that is wanted
  void* out;
  uint8_t* inside;
  int64_t inside_stride;
  // backward
  const void* dout;
  int64_t dout_stride;
  void* dx;
  float* dscale;
  bool stream;
};

namespace TILEFUSE_ISA {

namespace {

// one bit for each byte of 0 or 0xff, the first one lowest
TILEFUSE_INLINE uint8_t bits_of_bytes(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return static_cast<uint8_t>(((word & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
}

template <bool Symmetric, bool Keep, typename T>
TILEFUSE_INLINE void fake_run(const T* x, int64_t n, const Coding& coding, T* out, uint8_t* inside) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    const Floats y = quotient_of(get(x, i, ManyFloats{}), coding);
    put(out, i, level_of<Symmetric>(y, coding) * coding.scale);
    if constexpr (Keep) {
      const FloatInts kept = ~(FloatInts)is_clamped<Symmetric>(y, coding);
      *reinterpret_cast<Bytes*>(inside + i) = low_bytes(kept);
    }
  }
  for (; i < n; ++i) {
    const float y = quotient_of(to_float(x[i]), coding);
    put(out, i, level_of<Symmetric>(y, coding) * coding.scale);
    if constexpr (Keep) inside[i] = is_clamped<Symmetric>(y, coding) ? 0 : 0xff;
  }
}

// how many values a group has
TILEFUSE_INLINE int64_t group_length(const CodeRule& rule, int64_t group) {
  const int64_t left = rule.columns - group * rule.group;
  return left < rule.group ? left : rule.group;
}

template <typename T>
TILEFUSE_INLINE GroupScale scale_of(const FakeQuantizeCall& call, int64_t row, int64_t group, const T* x) {
  if (call.scale == nullptr) {
    const int64_t first = group * call.rule.group;
    return group_scale(call.rule, extremes_of(call.rule, x + first, group_length(call.rule, group)));
  }
  const int32_t zero = call.zero == nullptr ? 0 : call.zero[row * call.zero_stride + group];
  return {call.scale[row * call.scale_stride + group], zero};
}

template <bool Symmetric, bool Keep, typename T>
void forward_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  const CodeRule rule = call.rule;
  alignas(64) uint8_t inside[kCodePiece];
  alignas(64) T values[kCodePiece];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    T* out = static_cast<T*>(call.out) + row * rule.columns;
    Coding coding{};
    for (int64_t start = 0; start < rule.columns; start += kCodePiece) {
      const int64_t stop = rule.columns - start < kCodePiece ? rule.columns : start + kCodePiece;
      T* to = call.stream ? values : out + start;
      over_groups(rule, start, stop, [&](int64_t group, int64_t i, int64_t n) {
        if (i == group * rule.group) coding = coding_of<Symmetric>(rule, scale_of(call, row, group, x));
        fake_run<Symmetric, Keep>(x + i, n, coding, to + (i - start), inside + (i - start));
      });
      if (call.stream) stream_copy(out + start, values, (stop - start) * static_cast<int64_t>(sizeof(T)));
      if constexpr (Keep) {
        for (int64_t i = stop - start; i % 8 != 0; ++i) inside[i] = 0;
        uint8_t* kept = call.inside + row * call.inside_stride + start / 8;
        for (int64_t i = 0; i < stop - start; i += 8) kept[i / 8] = bits_of_bytes(inside + i);
      }
    }
  }
  if (call.stream) stream_done();
}

constexpr FloatInts kLaneBits = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};

template <typename T>
void mask_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(call.dout) + row * call.dout_stride;
    const uint8_t* inside = call.inside + row * call.inside_stride;
    T* dx = static_cast<T*>(call.dx) + row * call.rule.columns;
    int64_t i = 0;
    for (; i + kFloats <= call.rule.columns; i += kFloats) {
      uint16_t word;
      std::memcpy(&word, inside + i / 8, 2);
      const Floats upstream = get(dout, i, ManyFloats{}), none{};
      put(dx, i, ((FloatInts{} + word) & kLaneBits) != 0 ? upstream : none);
    }
    for (; i < call.rule.columns; ++i) dx[i] = inside[i / 8] >> (i % 8) & 1 ? dout[i] : T{};
  }
}

// sums whose number of terms stays small, for their last places
constexpr int64_t kSumRun = 2048;

// sum of value(i, lanes) over [0, n), in an order that is the same on every instruction set
template <typename F>
TILEFUSE_INLINE float sum_of(int64_t n, const F& value) {
  Floats total{};
  float rest = 0.0f;
  int64_t i = 0;
  while (i + kFloats <= n) {
    Floats run{};
    const int64_t stop = n - i < kSumRun ? n : i + kSumRun;
    for (; i + kFloats <= stop; i += kFloats) run += value(i, ManyFloats{});
    total += run;
  }
  for (; i < n; ++i) rest += value(i, OneFloat{});
  return over_lanes(total, [](float a, float b) { return a + b; }) + rest;
}

template <typename V>
TILEFUSE_INLINE V zero_like(V) {
  return V{};
}

// how many of n values are this one
template <typename T>
TILEFUSE_INLINE float count_of(const T* x, int64_t n, float wanted) {
  return sum_of(n, [=](int64_t i, auto lanes) {
    const auto value = get(x, i, lanes);
    const auto none = zero_like(value);
    return value == wanted ? none + 1.0f : none;
  });
}

// what a value adds to the gradient of its group's scale
template <bool Symmetric, typename V, typename C>
TILEFUSE_INLINE V scale_term(V upstream, V y, C clamped, const Coding& coding) {
  const V level = level_of<Symmetric>(y, coding);
  return upstream * (clamped ? level : level - y);
}

template <bool Symmetric, typename T>
void scale_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  const CodeRule rule = call.rule;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    const T* dout = static_cast<const T*>(call.dout) + row * call.dout_stride;
    T* dx = static_cast<T*>(call.dx) + row * rule.columns;
    for (int64_t group = 0; group < rule.groups; ++group) {
      const int64_t first = group * rule.group;
      const Coding coding = coding_of<Symmetric>(rule, scale_of(call, row, group, x));
      const T *from = x + first, *upstream = dout + first;
      T* to = dx + first;
      call.dscale[row * rule.groups + group] = sum_of(group_length(rule, group), [=](int64_t i, auto lanes) {
        const auto y = quotient_of(get(from, i, lanes), coding), g = get(upstream, i, lanes);
        const auto clamped = is_clamped<Symmetric>(y, coding);
        put(to, i, clamped ? zero_like(g) : g);
        return scale_term<Symmetric>(g, y, clamped, coding);
      });
    }
  }
}

// gradients through the extremes that dynamic scales are made of, as torch.amax: ties share
template <bool Symmetric, typename T>
void extremes_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  const CodeRule rule = call.rule;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    const T* dout = static_cast<const T*>(call.dout) + row * call.dout_stride;
    T* dx = static_cast<T*>(call.dx) + row * rule.columns;
    for (int64_t group = 0; group < rule.groups; ++group) {
      const int64_t first = group * rule.group, n = group_length(rule, group);
      const T *from = x + first, *upstream = dout + first;
      const Extremes ends = extremes_of(rule, from, n);
      const Coding coding = coding_of<Symmetric>(rule, group_scale(rule, ends));
      const auto clamped_at = [=](auto value, auto y) {
        // a symmetric scale of its own clamps infinities alone, though the largest quotient may lie an ulp past the end
        if constexpr (Symmetric) {
          return magnitude_of(value) == kInfiniteBits;
        } else {
          return is_clamped<false>(y, coding);
        }
      };
      const float dscale = sum_of(n, [=](int64_t i, auto lanes) {
        const auto value = get(from, i, lanes), y = quotient_of(value, coding);
        return scale_term<Symmetric>(get(upstream, i, lanes), y, clamped_at(value, y), coding);
      });
      const float spread = spread_of(rule, ends);
      float high = 0.0f, low = 0.0f;
      if (spread >= rule.eps && spread <= kLargestFloat) {
        const float highs = count_of(from, n, ends.high), lows = count_of(from, n, ends.low);
        const float dspread = dscale / (Symmetric ? rule.qmax() : static_cast<float>(rule.top()));
        high = dspread / (Symmetric ? highs + lows : highs);
        low = dspread / (Symmetric ? highs + lows : lows);
      }
      T* to = dx + first;
      over_floats(n, [=](int64_t i, auto lanes) {
        const auto value = get(from, i, lanes), y = quotient_of(value, coding), g = get(upstream, i, lanes);
        const auto none = zero_like(g);
        auto passed = Symmetric ? g : clamped_at(value, y) ? none : g;
        passed += value == ends.high ? none + high : none;
        passed -= value == ends.low ? none + low : none;
        put(to, i, passed);
      });
    }
  }
}

}  // namespace

void fake_quantize_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (call.rule.symmetric) {
      if (call.inside != nullptr) return forward_rows<true, true, T>(call, begin, end);
      return forward_rows<true, false, T>(call, begin, end);
    }
    if (call.inside != nullptr) return forward_rows<false, true, T>(call, begin, end);
    return forward_rows<false, false, T>(call, begin, end);
  })
}

void fake_quantize_mask_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, mask_rows<T>(call, begin, end));
}

// gradients of given scales or, without any, through the extremes
void fake_quantize_scale_rows(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (call.scale == nullptr) {
      if (call.rule.symmetric) return extremes_rows<true, T>(call, begin, end);
      return extremes_rows<false, T>(call, begin, end);
    }
    if (call.rule.symmetric) return scale_rows<true, T>(call, begin, end);
    return scale_rows<false, T>(call, begin, end);
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(fake_quantize_rows)
TILEFUSE_DISPATCH(fake_quantize_mask_rows)
TILEFUSE_DISPATCH(fake_quantize_scale_rows)

namespace {

// the default of int_quantize
constexpr double kEps = 1e-12;

FakeQuantizeCall call_of(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& zero, int64_t bits,
                         int64_t group_size, bool symmetric) {
  FakeQuantizeCall call{};
  call.dtype = dtype_of(x);
  call.rule = code_rule(x.size(1), bits, group_size, symmetric, kEps);
  call.x = x.const_data_ptr();
  call.x_stride = stride_or_zero(x, 0);
  if (scale) {
    call.scale = pointer<const float>(*scale);
    call.scale_stride = stride_or_zero(*scale, 0);
  }
  if (zero) {
    call.zero = pointer<const uint8_t>(*zero);
    call.zero_stride = stride_or_zero(*zero, 0);
  }
  call.stream = x.numel() * static_cast<int64_t>(x.element_size()) >= kStreamBytes;
  return call;
}

std::tuple<Tensor, Tensor> fake_quantize_fwd(Tensor x, OptionalTensor scale, OptionalTensor zero, int64_t bits,
                                             int64_t group_size, bool symmetric, [[maybe_unused]] bool scale_gradient,
                                             bool keep) {
  FakeQuantizeCall call = call_of(x, scale, zero, bits, group_size, symmetric);
  const int64_t rows = x.size(0), bytes = (x.size(1) + 7) / 8;
  Tensor out = empty_contiguous(x);
  Tensor inside = empty_of(x, {keep ? rows : 0, keep ? bytes : 0}, ScalarType::Byte);
  call.out = out.mutable_data_ptr();
  if (keep) {
    call.inside = pointer<uint8_t>(inside);
    call.inside_stride = bytes;
  }
  run_parallel(fake_quantize_rows, x.numel() > 0 ? rows : 0, rows_of_task(x.size(1)), call);
  return {out, inside};
}

Tensor fake_quantize_bwd(Tensor dout, Tensor inside) {
  Tensor dx = empty_contiguous(dout);
  FakeQuantizeCall call{};
  call.dtype = dtype_of(dout);
  call.rule.columns = dout.size(1);
  call.dout = dout.const_data_ptr();
  call.dout_stride = stride_or_zero(dout, 0);
  call.inside = static_cast<uint8_t*>(inside.mutable_data_ptr());
  call.inside_stride = stride_or_zero(inside, 0);
  call.dx = dx.mutable_data_ptr();
  run_parallel(fake_quantize_mask_rows, dx.numel() > 0 ? dx.size(0) : 0, rows_of_task(dx.size(1)), call);
  return dx;
}

std::tuple<Tensor, Tensor> fake_quantize_bwd_scale(Tensor dout, Tensor x, Tensor scale, OptionalTensor zero,
                                                   int64_t bits, int64_t group_size, bool symmetric) {
  FakeQuantizeCall call = call_of(x, scale, zero, bits, group_size, symmetric);
  Tensor dx = empty_contiguous(x), dscale = empty_contiguous(scale);
  call.dout = dout.const_data_ptr();
  call.dout_stride = stride_or_zero(dout, 0);
  call.dx = dx.mutable_data_ptr();
  call.dscale = pointer<float>(dscale);
  run_parallel(fake_quantize_scale_rows, x.size(0), rows_of_task(x.size(1)), call);
  return {dx, dscale};
}

Tensor fake_quantize_bwd_amax(Tensor dout, Tensor x, int64_t bits, int64_t group_size, bool symmetric) {
  FakeQuantizeCall call = call_of(x, std::nullopt, std::nullopt, bits, group_size, symmetric);
  Tensor dx = empty_contiguous(x);
  call.dout = dout.const_data_ptr();
  call.dout_stride = stride_or_zero(dout, 0);
  call.dx = dx.mutable_data_ptr();
  run_parallel(fake_quantize_scale_rows, dx.numel() > 0 ? x.size(0) : 0, rows_of_task(x.size(1)), call);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("fake_quantize_fwd", TORCH_BOX(&fake_quantize_fwd));
  m.impl("fake_quantize_bwd", TORCH_BOX(&fake_quantize_bwd));
  m.impl("fake_quantize_bwd_scale", TORCH_BOX(&fake_quantize_bwd_scale));
  m.impl("fake_quantize_bwd_amax", TORCH_BOX(&fake_quantize_bwd_amax));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
