// build-flags: -Wno-psabi
// Groups of integer codes on the CPU, and back: rows in pieces that stay in L1.
#include "common/stream_cpu.h"
#include "lowbit/codes_cpu.h"

namespace tilefuse {

struct IntQuantizeCall {
  Dtype dtype;
  CodeRule rule;
  const void* x;
  int64_t x_stride;
  // [rows, bytes], [rows, groups], [rows, groups]
  uint8_t* q;
  float* scale;
  uint8_t* zero;
  bool stream;
};

struct IntDequantizeCall {
  Dtype dtype;
  CodeRule rule;
  // codes of 8 bits with a sign
  bool is_signed;
  const uint8_t* q;
  int64_t q_stride;
  const float* scale;
  int64_t scale_stride;
  // one of these at most
  const uint8_t* zero;
  const float* float_zero;
  int64_t zero_stride;
  void* out;
  bool stream;
};

namespace TILEFUSE_ISA {

namespace {

template <bool Symmetric, typename T>
TILEFUSE_INLINE void encode(const T* x, int64_t n, const Coding& coding, uint8_t* codes) {
  // the sum's low byte is the code
  const float shift = kToInteger + coding.zero;
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    const Floats level = level_of<Symmetric>(quotient_of(get(x, i, ManyFloats{}), coding), coding);
    *reinterpret_cast<Bytes*>(codes + i) = low_bytes((FloatInts)(level + shift));
  }
  for (; i < n; ++i) {
    const float level = level_of<Symmetric>(quotient_of(to_float(x[i]), coding), coding);
    codes[i] = static_cast<uint8_t>(float_to_bits(level + shift));
  }
}

template <bool Symmetric, typename T>
void quantize_row(const IntQuantizeCall& call, int64_t row) {
  const CodeRule rule = call.rule;
  const int32_t bits = rule.bits;
  const int64_t columns = rule.columns, size = bytes_of_codes(filled(columns, bits), bits);
  const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
  uint8_t* q = call.q + row * size;
  float* scale = call.scale + row * rule.groups;
  uint8_t* zero = call.zero + row * rule.groups;
  alignas(64) uint8_t codes[kCodePiece], packed[kCodePiece];
  Coding coding{};
  for (int64_t start = 0; start < columns; start += kCodePiece) {
    const int64_t stop = columns - start < kCodePiece ? columns : start + kCodePiece;
    // where the codes of this piece go at last
    uint8_t* to = q + bytes_of_codes(start, bits);
    uint8_t* made = bits == 8 && !call.stream ? to : codes;
    over_groups(rule, start, stop, [&](int64_t group, int64_t i, int64_t n) {
      const int64_t first = group * rule.group;
      if (i == first) {
        const int64_t whole = columns - first < rule.group ? columns - first : rule.group;
        const GroupScale found = group_scale(rule, extremes_of(rule, x + first, whole));
        scale[group] = found.scale;
        zero[group] = static_cast<uint8_t>(found.zero);
        coding = coding_of<Symmetric>(rule, found);
      }
      encode<Symmetric>(x + i, n, coding, made + (i - start));
    });
    const int64_t count = filled(stop - start, bits), bytes = bytes_of_codes(count, bits);
    for (int64_t i = stop - start; i < count; ++i) codes[i] = zero[rule.groups - 1];
    uint8_t* stored = call.stream ? packed : to;
    if (bits != 8) pack_codes(codes, count, bits, stored);
    if (call.stream) stream_copy(to, bits == 8 ? codes : packed, bytes);
  }
  if (columns == 0 && rule.groups > 0) {
    scale[0] = 1.0f;
    zero[0] = static_cast<uint8_t>(Symmetric ? rule.middle() : 0);
  }
}

template <typename T>
void quantize(const IntQuantizeCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (call.rule.symmetric) {
      quantize_row<true, T>(call, row);
    } else {
      quantize_row<false, T>(call, row);
    }
  }
  if (call.stream) stream_done();
}

TILEFUSE_INLINE Floats floats_of(const uint8_t* codes) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(codes), FloatInts), Floats);
}

TILEFUSE_INLINE Floats floats_of(const int8_t* codes) {
  const SignedBytes bytes = *reinterpret_cast<const SignedBytes*>(codes);
  return __builtin_convertvector(__builtin_convertvector(bytes, FloatInts), Floats);
}

template <typename C, typename T>
TILEFUSE_INLINE void decode(const C* codes, int64_t n, float scale, float zero, T* out) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) put(out, i, (floats_of(codes + i) - zero) * scale);
  for (; i < n; ++i) put(out, i, (static_cast<float>(codes[i]) - zero) * scale);
}

template <typename C, typename T>
void dequantize(const IntDequantizeCall& call, int64_t begin, int64_t end) {
  const CodeRule rule = call.rule;
  const int32_t bits = rule.bits;
  const int64_t columns = rule.columns, last = rule.groups - 1;
  alignas(64) uint8_t codes[kCodePiece];
  alignas(64) T values[kCodePiece];
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* q = call.q + row * call.q_stride;
    const float* scale = call.scale + row * call.scale_stride;
    T* out = static_cast<T*>(call.out) + row * columns;
    for (int64_t start = 0; start < columns; start += kCodePiece) {
      const int64_t stop = columns - start < kCodePiece ? columns : start + kCodePiece;
      const uint8_t* from = q + bytes_of_codes(start, bits);
      if (bits != 8) {
        unpack_codes(from, stop - start, bits, codes);
        from = codes;
      }
      T* to = call.stream ? values : out + start;
      over_groups(rule, start, stop, [&](int64_t group, int64_t i, int64_t n) {
        // filling may begin a group that is not there
        const int64_t g = group < last ? group : last;
        float zero = static_cast<float>(rule.middle());
        if (call.zero != nullptr) zero = static_cast<float>(call.zero[row * call.zero_stride + g]);
        if (call.float_zero != nullptr) zero = call.float_zero[row * call.zero_stride + g];
        decode(reinterpret_cast<const C*>(from) + (i - start), n, scale[g], zero, to + (i - start));
      });
      if (call.stream) stream_copy(out + start, values, (stop - start) * static_cast<int64_t>(sizeof(T)));
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

void int_quantize_rows(const IntQuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, quantize<T>(call, begin, end));
}

void int_dequantize_rows(const IntDequantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (call.is_signed) {
      dequantize<int8_t, T>(call, begin, end);
    } else {
      dequantize<uint8_t, T>(call, begin, end);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(int_quantize_rows)
TILEFUSE_DISPATCH(int_dequantize_rows)

namespace {

std::tuple<Tensor, Tensor, Tensor> int_quantize_fwd(Tensor x, int64_t bits, int64_t group_size, bool symmetric,
                                                    double eps) {
  const int64_t rows = x.size(0), columns = x.size(1);
  IntQuantizeCall call{};
  call.dtype = dtype_of(x);
  call.rule = code_rule(columns, bits, group_size, symmetric, eps);
  const int64_t bytes = baseline::bytes_of_codes(baseline::filled(columns, call.rule.bits), call.rule.bits);
  Tensor q = empty_of(x, {rows, bytes}, bits == 8 && symmetric ? ScalarType::Char : ScalarType::Byte);
  Tensor scale = empty_of(x, {rows, call.rule.groups}, ScalarType::Float);
  Tensor zero = empty_of(x, {rows, call.rule.groups}, ScalarType::Byte);
  prefer_huge_pages(q);
  call.x = x.const_data_ptr();
  call.x_stride = stride_or_zero(x, 0);
  call.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  call.scale = pointer<float>(scale);
  call.zero = static_cast<uint8_t*>(zero.mutable_data_ptr());
  call.stream = rows * bytes >= kStreamBytes;
  run_parallel(int_quantize_rows, rows, rows_of_task(columns), call);
  return {q, scale, zero};
}

Tensor int_dequantize_fwd(Tensor q, Tensor scale, OptionalTensor zero, int64_t bits, int64_t group_size,
                          ScalarType out_dtype) {
  const int64_t rows = q.size(0), size = q.size(1);
  const int64_t columns = bits == 8 ? size : bits == 4 ? 2 * size : size / 3 * 4;
  Tensor out = empty_of(q, {rows, columns}, out_dtype);
  prefer_huge_pages(out);
  IntDequantizeCall call{};
  call.dtype = dtype_of(out);
  call.rule = code_rule(columns, bits, group_size, true, 0.0);
  // less than the columns give where filling begins another
  call.rule.groups = scale.size(1);
  call.is_signed = q.scalar_type() == ScalarType::Char;
  call.q = static_cast<const uint8_t*>(q.const_data_ptr());
  call.q_stride = stride_or_zero(q, 0);
  call.scale = pointer<const float>(scale);
  call.scale_stride = stride_or_zero(scale, 0);
  if (zero) {
    if (zero->scalar_type() == ScalarType::Float) {
      call.float_zero = pointer<const float>(*zero);
    } else {
      call.zero = static_cast<const uint8_t*>(zero->const_data_ptr());
    }
    call.zero_stride = stride_or_zero(*zero, 0);
  }
  call.out = out.mutable_data_ptr();
  call.stream = out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes;
  run_parallel(int_dequantize_rows, out.numel() > 0 ? rows : 0, rows_of_task(columns), call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("int_quantize_fwd", TORCH_BOX(&int_quantize_fwd));
  m.impl("int_dequantize_fwd", TORCH_BOX(&int_dequantize_fwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
