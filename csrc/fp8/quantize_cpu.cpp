// Block quantisation to e4m3 on the CPU: 1 x 128, 128 x 128, both directions of one read, and back.
#include "fp8/quantize_cpu.h"

namespace tilefuse {

struct DequantizeCall {
  Dtype dtype;
  // [G, M, K] codes and [G, ceil(M / block_rows), ceil(K / 128)] scales
  const uint8_t* codes;
  const float* scales;
  int64_t group_stride, row_stride, scale_group, scale_row, scale_block, m, k, block_rows;
  void* out;
};

namespace TILEFUSE_ISA {

namespace {

// rows [begin, end) of x [M, K]; scales of one row are `pitch` apart
template <typename T>
void quantize_rows(const QuantizeCall& call, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(call.x);
  const int64_t row_stride = call.row_stride, k = call.k, pitch = call.pitch;
  const bool pow2 = call.pow2, stream = call.stream;
  const float eps = call.eps;
  uint8_t* q = call.codes;
  float* scale = call.scales;
  // scales of some rows and columns are gathered, since a row's lie whole pages apart
  constexpr int64_t kRows = 16, kBlocks = 64;
  float scales[kRows][kBlocks];
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    for (int64_t start = 0; start < k; start += kBlocks * kBlock) {
      const int64_t count = k - start < kBlocks * kBlock ? k - start : kBlocks * kBlock;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        const T* source = x + row * row_stride + start;
        quantize_run(source, count, pow2, eps, q + row * k + start, scales[r],
                     row + 1 < end ? source + row_stride : nullptr, stream);
      }
      float* target = scale + start / kBlock * pitch + first;
      for (int64_t block = 0; block < (count + kBlock - 1) / kBlock; ++block, target += pitch) {
        for (int64_t r = 0; r < rows; ++r) target[r] = scales[r][block];
      }
    }
  }
  if (stream) finish_streams();
}

// block rows [begin, end) of x [G, M, K], counted over all g; scale [G, MB, KB] contiguous
template <typename T>
void quantize_tiles(const QuantizeCall& call, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(call.x);
  const int64_t g_stride = call.group_stride, row_stride = call.row_stride, m = call.m, k = call.k;
  const bool pow2 = call.pow2;
  const float eps = call.eps;
  uint8_t* q = call.codes;
  float* scale = call.scales;
  constexpr int64_t kWide = 8;
  const int64_t row_blocks = (m + kBlock - 1) / kBlock, blocks = (k + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / row_blocks, first = i % row_blocks * kBlock;
    const int64_t rows = m - first < kBlock ? m - first : kBlock;
    const T* source = x + g * g_stride + first * row_stride;
    uint8_t* target = q + (g * m + first) * k;
    // some tiles side by side: longer pieces of each row
    for (int64_t panel = 0; panel < blocks; panel += kWide) {
      const int64_t wide = blocks - panel < kWide ? blocks - panel : kWide;
      uint32_t amax[kWide] = {};
      bool finite[kWide];
      float s[kWide];
      for (int64_t b = 0; b < wide; ++b) finite[b] = true;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t b = 0; b < wide; ++b) {
          const int64_t start = (panel + b) * kBlock, count = k - start < kBlock ? k - start : kBlock;
          const T* values = source + row * row_stride + start;
          uint32_t largest = largest_magnitude(values, count);
          if (largest >= 0x7f800000u) {
            finite[b] = false;
            largest = finite_amax(values, count);
          }
          amax[b] = largest > amax[b] ? largest : amax[b];
        }
      }
      for (int64_t b = 0; b < wide; ++b) {
        s[b] = fp8::block_scale(amax[b], eps, pow2);
        scale[i * blocks + panel + b] = s[b];
      }
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t b = 0; b < wide; ++b) {
          const int64_t start = (panel + b) * kBlock, count = k - start < kBlock ? k - start : kBlock;
          encode_block(source + row * row_stride + start, s[b], finite[b], count, target + row * k + start);
        }
      }
    }
  }
}

// column blocks [begin, end) of x [M, K]: every 128 x 128 tile is read once and quantised along both directions
template <typename T>
void quantize_dual(const QuantizeCall& call, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(call.x);
  const int64_t row_stride = call.row_stride, m = call.m, k = call.k, pitch = call.pitch, pitch_t = call.pitch_t;
  const bool pow2 = call.pow2;
  const float eps = call.eps;
  uint8_t *q = call.codes, *q_t = call.codes_t;
  float *scale = call.scales, *scale_t = call.scales_t;
  alignas(64) static thread_local float values[kBlock * kBlock];
  alignas(64) static thread_local uint8_t codes[kBlock * kBlock], codes_t[kBlock * kBlock];
  alignas(64) uint32_t amax[kBlock];
  alignas(64) float column_scale[kBlock], inverse[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlock, count = k - start < kBlock ? k - start : kBlock;
    for (int64_t first = 0, row_block = 0; first < m; first += kBlock, ++row_block) {
      const int64_t rows = m - first < kBlock ? m - first : kBlock;
      bool all_finite = true;
      for (int64_t c = 0; c < kBlock; ++c) amax[c] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        float* row = values + r * kBlock;
        load_block(x + (first + r) * row_stride + start, count, row);
        const uint32_t largest = largest_magnitude(row, kBlock);
        const bool finite = largest < 0x7f800000u;
        all_finite &= finite;
        const float s = fp8::block_scale(finite ? largest : finite_amax(row, kBlock), eps, pow2);
        scale[block * pitch + first + r] = s;
        encode_block(row, s, finite, count, q + (first + r) * k + start);
        for (int64_t c = 0; c < kBlock; ++c) {
          const uint32_t magnitude = finite ? fp8::bits_of(row[c]) & 0x7fffffffu : fp8::finite_magnitude(row[c]);
          amax[c] = magnitude > amax[c] ? magnitude : amax[c];
        }
      }
      float smallest = 1.0f;
      for (int64_t c = 0; c < kBlock; ++c) {
        column_scale[c] = fp8::block_scale(amax[c], eps, pow2);
        inverse[c] = 1.0f / column_scale[c];
        smallest = column_scale[c] < smallest ? column_scale[c] : smallest;
      }
      const bool fast = all_finite && smallest >= kSmallestFastScale;
      for (int64_t c = 0; c < count; ++c) scale_t[row_block * pitch_t + start + c] = column_scale[c];
      for (int64_t r = 0; r < rows; ++r) {
        encode_columns(values + r * kBlock, column_scale, inverse, fast, codes + r * kBlock);
      }
      transpose_codes(codes, codes_t);
      for (int64_t c = 0; c < count; ++c) {
        std::memcpy(q_t + (start + c) * m + first, codes_t + c * kBlock, static_cast<size_t>(rows));
      }
    }
  }
}

// rows [begin, end) of q [G, M, K], counted over all g
template <typename T>
void dequantize(const DequantizeCall& call, int64_t begin, int64_t end) {
  const int64_t m = call.m, k = call.k;
  T* out = static_cast<T*>(call.out);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / m, row = i % m;
    const uint8_t* source = call.codes + g * call.group_stride + row * call.row_stride;
    const float* scales = call.scales + g * call.scale_group + row / call.block_rows * call.scale_row;
    for (int64_t start = 0, block = 0; start < k; start += kBlock, ++block) {
      const int64_t stop = k - start < kBlock ? k : start + kBlock;
      const float s = scales[block * call.scale_block];
      for (int64_t c = start; c < stop; ++c) out[i * k + c] = from_float<T>(fp8::decode(source[c]) * s);
    }
  }
}

}  // namespace

void fp8_quantize_rows(const QuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, quantize_rows<T>(call, begin, end));
}

void fp8_quantize_tiles(const QuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, quantize_tiles<T>(call, begin, end));
}

void fp8_quantize_dual(const QuantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, quantize_dual<T>(call, begin, end));
}

void fp8_dequantize(const DequantizeCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, dequantize<T>(call, begin, end));
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(fp8_quantize_rows)
TILEFUSE_DISPATCH(fp8_quantize_tiles)
TILEFUSE_DISPATCH(fp8_quantize_dual)
TILEFUSE_DISPATCH(fp8_dequantize)

namespace {

using fp8::blocks_of;
using fp8::empty_codes;
using fp8::empty_row_scale;

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, bool pow2, double eps) {
  const int64_t m = x.size(0), k = x.size(1);
  Tensor codes = empty_codes(x, {m, k}), scales = empty_row_scale(x, m, blocks_of(k));
  QuantizeCall call = quantize_call(x, k, codes, scales, pow2, eps);
  call.stream = fp8::past_caches(m * k);
  run_parallel(fp8_quantize_rows, m, fp8::grain(k), call);
  return {codes, scales};
}

std::tuple<Tensor, Tensor> quantize_tiles(const Tensor& x, bool pow2, double eps) {
  const int64_t g = x.size(0), m = x.size(1), k = x.size(2);
  Tensor codes = empty_codes(x, {g, m, k});
  Tensor scales = empty_of(x, {g, blocks_of(m), blocks_of(k)}, ScalarType::Float);
  QuantizeCall call = quantize_call(x, k, codes, scales, pow2, eps);
  call.group_stride = stride_or_zero(x, 0);
  call.row_stride = stride_or_zero(x, 1);
  call.m = m;
  run_parallel(fp8_quantize_tiles, g * blocks_of(m), fp8::grain(k * 128), call);
  return {codes, scales};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_dual(const Tensor& x, bool pow2, double eps) {
  const int64_t m = x.size(0), k = x.size(1);
  Tensor codes = empty_codes(x, {m, k}), scales = empty_row_scale(x, m, blocks_of(k));
  Tensor codes_t = empty_codes(x, {k, m}), scales_t = empty_row_scale(x, k, blocks_of(m));
  QuantizeCall call = quantize_call(x, k, codes, scales, pow2, eps);
  call.codes_t = pointer<uint8_t>(codes_t);
  call.scales_t = pointer<float>(scales_t);
  call.pitch_t = fp8::pitch_of(k);
  run_parallel(fp8_quantize_dual, blocks_of(k), fp8::grain(m * 128), call);
  return {codes, scales, codes_t, scales_t};
}

Tensor dequantize(const Tensor& codes, const Tensor& scales, int64_t block_rows, ScalarType out_dtype) {
  const int64_t g = codes.size(0), m = codes.size(1), k = codes.size(2);
  Tensor out = empty_of(codes, {g, m, k}, out_dtype);
  DequantizeCall call{};
  call.dtype = dtype_of(out);
  call.codes = pointer<const uint8_t>(codes);
  call.scales = pointer<const float>(scales);
  call.group_stride = stride_or_zero(codes, 0);
  call.row_stride = stride_or_zero(codes, 1);
  call.scale_group = stride_or_zero(scales, 0);
  call.scale_row = stride_or_zero(scales, 1);
  call.scale_block = stride_or_zero(scales, 2);
  call.m = m;
  call.k = k;
  call.block_rows = block_rows;
  call.out = out.mutable_data_ptr();
  run_parallel(fp8_dequantize, g * m, fp8::grain(k), call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("fp8_quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("fp8_quantize_tiles", TORCH_BOX(&quantize_tiles));
  m.impl("fp8_quantize_dual_fwd", TORCH_BOX(&quantize_dual));
  m.impl("fp8_dequantize_fwd", TORCH_BOX(&dequantize));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
