// Block quantisation to e4m3 on the CPU: 1 x 128, 128 x 128, both directions of one read, and back.
#include "fp8/block_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// rows [begin, end) of x [M, K]; scales of one row are `pitch` apart
template <typename T>
static void quantize_rows(const T* x, int64_t row_stride, int64_t k, uint8_t* q, float* scale, int64_t pitch, bool pow2,
                          float eps, bool stream, int64_t begin, int64_t end) {
  // scales of some rows and columns are gathered, since a row's lie whole pages apart
  constexpr int64_t ROWS = 16, BLOCKS = 64;
  float scales[ROWS][BLOCKS];
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t rows = end - first < ROWS ? end - first : ROWS;
    for (int64_t start = 0; start < k; start += BLOCKS * kBlock) {
      const int64_t count = k - start < BLOCKS * kBlock ? k - start : BLOCKS * kBlock;
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

void fp8_quantize_rows(Dtype dtype, const void* x, int64_t row_stride, int64_t k, uint8_t* q, float* scale,
                       int64_t pitch, bool pow2, float eps, bool stream, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(dtype, T, quantize_rows(static_cast<const T*>(x), row_stride, k, q, scale, pitch, pow2, eps, stream,
                                            begin, end));
}

// block rows [begin, end) of x [G, M, K], counted over all g; scale [G, MB, KB] contiguous
template <typename T>
static void quantize_tiles(const T* x, int64_t g_stride, int64_t row_stride, int64_t m, int64_t k, uint8_t* q,
                           float* scale, bool pow2, float eps, int64_t begin, int64_t end) {
  constexpr int64_t WIDE = 8;
  const int64_t row_blocks = (m + kBlock - 1) / kBlock, blocks = (k + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / row_blocks, first = i % row_blocks * kBlock;
    const int64_t rows = m - first < kBlock ? m - first : kBlock;
    const T* source = x + g * g_stride + first * row_stride;
    uint8_t* target = q + (g * m + first) * k;
    // some tiles side by side: longer pieces of each row
    for (int64_t panel = 0; panel < blocks; panel += WIDE) {
      const int64_t wide = blocks - panel < WIDE ? blocks - panel : WIDE;
      uint32_t amax[WIDE] = {};
      bool finite[WIDE];
      float s[WIDE];
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

void fp8_quantize_tiles(Dtype dtype, const void* x, int64_t g_stride, int64_t row_stride, int64_t m, int64_t k,
                        uint8_t* q, float* scale, bool pow2, float eps, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(dtype, T,
                    quantize_tiles(static_cast<const T*>(x), g_stride, row_stride, m, k, q, scale, pow2, eps, begin, end));
}

// column blocks [begin, end) of x [M, K]: every 128 x 128 tile is read once and quantised along both directions
template <typename T>
static void quantize_dual(const T* x, int64_t row_stride, int64_t m, int64_t k, uint8_t* q, float* scale,
                          int64_t pitch, uint8_t* q_t, float* scale_t, int64_t pitch_t, bool pow2, float eps,
                          int64_t begin, int64_t end) {
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

void fp8_quantize_dual(Dtype dtype, const void* x, int64_t row_stride, int64_t m, int64_t k, uint8_t* q, float* scale,
                       int64_t pitch, uint8_t* q_t, float* scale_t, int64_t pitch_t, bool pow2, float eps,
                       int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(dtype, T,
                    quantize_dual(static_cast<const T*>(x), row_stride, m, k, q, scale, pitch, q_t, scale_t, pitch_t,
                                  pow2, eps, begin, end));
}

// rows [begin, end) of q [G, M, K], counted over all g
template <typename T>
static void dequantize(const uint8_t* q, int64_t q_g, int64_t q_m, const float* scale, int64_t scale_g, int64_t scale_m,
                       int64_t scale_k, int64_t m, int64_t k, int64_t block_rows, T* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / m, row = i % m;
    const uint8_t* source = q + g * q_g + row * q_m;
    const float* scales = scale + g * scale_g + row / block_rows * scale_m;
    for (int64_t start = 0, block = 0; start < k; start += kBlock, ++block) {
      const int64_t stop = k - start < kBlock ? k : start + kBlock;
      const float s = scales[block * scale_k];
      for (int64_t c = start; c < stop; ++c) out[i * k + c] = from_float<T>(fp8::decode(source[c]) * s);
    }
  }
}

void fp8_dequantize(Dtype dtype, const uint8_t* q, int64_t q_g, int64_t q_m, const float* scale, int64_t scale_g,
                    int64_t scale_m, int64_t scale_k, int64_t m, int64_t k, int64_t block_rows, void* out, int64_t begin,
                    int64_t end) {
  TILEFUSE_BY_DTYPE(dtype, T,
                    dequantize(q, q_g, q_m, scale, scale_g, scale_m, scale_k, m, k, block_rows, static_cast<T*>(out),
                               begin, end));
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include "fp8/host.h"

namespace tilefuse {

TILEFUSE_DISPATCH(fp8_quantize_rows, (Dtype, const void*, int64_t, int64_t, uint8_t*, float*, int64_t, bool, float,
                                      bool, int64_t, int64_t))
TILEFUSE_DISPATCH(fp8_quantize_tiles, (Dtype, const void*, int64_t, int64_t, int64_t, int64_t, uint8_t*, float*, bool,
                                       float, int64_t, int64_t))
TILEFUSE_DISPATCH(fp8_quantize_dual, (Dtype, const void*, int64_t, int64_t, int64_t, uint8_t*, float*, int64_t,
                                      uint8_t*, float*, int64_t, bool, float, int64_t, int64_t))
TILEFUSE_DISPATCH(fp8_dequantize, (Dtype, const uint8_t*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                                   int64_t, int64_t, int64_t, void*, int64_t, int64_t))

namespace {

using fp8::blocks_of;
using fp8::empty_codes;
using fp8::empty_row_scale;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, bool pow2, double eps) {
  const int64_t m = x.size(0), k = x.size(1), row_stride = stride_or_zero(x, 0);
  Tensor q = empty_codes(x, {m, k}), scale = empty_row_scale(x, m, blocks_of(k));
  const Dtype dtype = dtype_of(x);
  const void* data = x.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  const bool stream = fp8::past_caches(m * k);
  const auto run = fp8_quantize_rows_dispatch();
  parallel_for(0, m, fp8::grain(k), [&](int64_t begin, int64_t end) {
    run(dtype, data, row_stride, k, codes, scales, fp8::pitch_of(m), pow2, static_cast<float>(eps), stream, begin, end);
  });
  return {q, scale};
}

std::tuple<Tensor, Tensor> quantize_tiles(const Tensor& x, bool pow2, double eps) {
  const int64_t g = x.size(0), m = x.size(1), k = x.size(2);
  Tensor q = empty_codes(x, {g, m, k});
  Tensor scale = torch::stable::new_empty(x, {g, blocks_of(m), blocks_of(k)}, ScalarType::Float);
  const int64_t g_stride = stride_or_zero(x, 0), row_stride = stride_or_zero(x, 1);
  const Dtype dtype = dtype_of(x);
  const void* data = x.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  const auto run = fp8_quantize_tiles_dispatch();
  parallel_for(0, g * blocks_of(m), fp8::grain(k * 128), [&](int64_t begin, int64_t end) {
    run(dtype, data, g_stride, row_stride, m, k, codes, scales, pow2, static_cast<float>(eps), begin, end);
  });
  return {q, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_dual(const Tensor& x, bool pow2, double eps) {
  const int64_t m = x.size(0), k = x.size(1), row_stride = stride_or_zero(x, 0);
  Tensor q = empty_codes(x, {m, k}), scale = empty_row_scale(x, m, blocks_of(k));
  Tensor q_t = empty_codes(x, {k, m}), scale_t = empty_row_scale(x, k, blocks_of(m));
  const Dtype dtype = dtype_of(x);
  const void* data = x.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* codes_t = static_cast<uint8_t*>(q_t.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  auto* scales_t = static_cast<float*>(scale_t.mutable_data_ptr());
  const auto run = fp8_quantize_dual_dispatch();
  parallel_for(0, blocks_of(k), fp8::grain(m * 128), [&](int64_t begin, int64_t end) {
    run(dtype, data, row_stride, m, k, codes, scales, fp8::pitch_of(m), codes_t, scales_t, fp8::pitch_of(k), pow2,
        static_cast<float>(eps), begin, end);
  });
  return {q, scale, q_t, scale_t};
}

Tensor dequantize(const Tensor& q, const Tensor& scale, int64_t block_rows, ScalarType out_dtype) {
  const int64_t g = q.size(0), m = q.size(1), k = q.size(2);
  Tensor out = torch::stable::new_empty(q, {g, m, k}, out_dtype);
  const Dtype dtype = dtype_of(out);
  const auto* codes = static_cast<const uint8_t*>(q.const_data_ptr());
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  void* data = out.mutable_data_ptr();
  const int64_t q_g = stride_or_zero(q, 0), q_m = stride_or_zero(q, 1), scale_g = stride_or_zero(scale, 0),
                scale_m = stride_or_zero(scale, 1), scale_k = stride_or_zero(scale, 2);
  const auto run = fp8_dequantize_dispatch();
  parallel_for(0, g * m, fp8::grain(k), [&](int64_t begin, int64_t end) {
    run(dtype, codes, q_g, q_m, scales, scale_g, scale_m, scale_k, m, k, block_rows, data, begin, end);
  });
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
