// build-flags: -ffp-contract=fast
// Block-scaled e4m3 matmul on the CPU, dense and grouped.
//
// Codes are exact in bfloat16 and their products exact in float32, so contraction changes no bit of a product. The
// weight is unpacked one [128 of K] x [64 of N] panel at a time; the activation once per 2048 rows. Within 128 of K
// products accumulate in float32 registers, then scales are applied and the result is added to a float32 tile.
// A row's arithmetic does not depend on how many rows there are.
#include "common/fp8.h"
#include "common/immintrin.h"
#include "fp8/segments_cpu.h"

namespace tilefuse {

struct Fp8MatmulCall {
  // [M, K] codes and [M, KB] scales
  const uint8_t* a;
  const float* a_scale;
  int64_t a_row, a_scale_row, a_scale_block;
  // [G, N, K] codes, and scales for `scale_rows` rows and 128 of K
  const uint8_t* b;
  const float* b_scale;
  int64_t b_group, b_row, b_scale_group, b_scale_row, b_scale_block, scale_rows;
  const float* bias;
  int64_t n, k;
  Dtype dtype;
  char* out;
  // `rows` rows of a from `first` on: [KB][rows][128] operands and [KB][rows] scales
  int64_t first, rows;
  void* unpacked;
  float* scales;
  // runs of those rows; each meets all panels of its weight
  const fp8::Segment* parts;
};

// rows unpacked at a time, and rows that share one unpacking of a panel
constexpr int64_t kUnpackedRows = 2048, kPartRows = 512;

namespace TILEFUSE_ISA {

namespace {

constexpr int64_t kDepth = 128;   // of K: one scale
constexpr int64_t kWidth = 64;    // of N: one panel
constexpr int64_t kTileRows = 6;  // of M: one register tile
constexpr float kLargest = 3.4028234663852886e38f;

#if defined(__AVX512BF16__)

// ---- AVX512-BF16: operands are bfloat16, pairs along K feed one dot product ----
using Operand = uint16_t;

// 32 codes to bfloat16
inline __m512i unpack32(const uint8_t* codes) {
  const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
  __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  // subnormals are 0 .. 7 times 2^-9
  const __m512i subnormals =
      _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude,
                                        subnormals);
  value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(value, _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8));
}

inline void unpack_row(const uint8_t* codes, int64_t count, Operand* out) {
  alignas(64) uint8_t padded[kDepth];
  if (count < kDepth) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, codes, static_cast<size_t>(count));
    codes = padded;
  }
  for (int64_t i = 0; i < kDepth; i += 32) _mm512_storeu_si512(out + i, unpack32(codes + i));
}

inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// panel [64 pairs of K][64 of N] from up to 64 rows of the weight
void pack_panel(const uint8_t* b, int64_t row_stride, int64_t rows, int64_t depth, Operand* panel) {
  alignas(64) Operand unpacked[16 * kDepth];
  for (int64_t n = 0; n < kWidth; n += 16) {
    for (int64_t i = 0; i < 16; ++i) {
      if (n + i < rows) {
        unpack_row(b + (n + i) * row_stride, depth, unpacked + i * kDepth);
      } else {
        std::memset(unpacked + i * kDepth, 0, kDepth * sizeof(Operand));
      }
    }
    for (int64_t pair = 0; pair < kDepth / 2; pair += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_load_si512(unpacked + i * kDepth + pair * 2);
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(panel + ((pair + i) * kWidth + n) * 2, r[i]);
    }
  }
}

// c [R][64] += (a [R][128] x panel) * scale_a * scale_b
template <int R>
void multiply(const Operand* a, const Operand* panel, const float* scale_a, const float* scale_b, float* c) {
  __m512 acc[R][4];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < kDepth / 2; ++pair) {
    __m512bh columns[4];
    for (int j = 0; j < 4; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(panel + pair * 2 * kWidth + j * 32);
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * kDepth + pair * 2, 4);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(two);
      for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], row, columns[j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const __m512 s = _mm512_set1_ps(scale_a[r]);
    for (int j = 0; j < 4; ++j) {
      float* place = c + r * kWidth + j * 16;
      // kept finite: zero codes times an overflown product would be NaN (a NaN scale, the second operand, stays)
      const __m512 factor =
          _mm512_min_ps(_mm512_set1_ps(kLargest), _mm512_mul_ps(s, _mm512_loadu_ps(scale_b + j * 16)));
      _mm512_storeu_ps(place, _mm512_fmadd_ps(acc[r][j], factor, _mm512_loadu_ps(place)));
    }
  }
}

#else

// ---- everywhere else: operands are float32, in vectors of the instruction set ----
using Operand = float;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kSlice = kLanes * kVectors;  // of N: what one register tile covers
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

inline void unpack_row(const uint8_t* codes, int64_t count, Operand* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fp8::decode(codes[i]);
  for (int64_t i = count; i < kDepth; ++i) out[i] = 0.0f;
}

// panel [64 / kSlice][128 of K][kSlice of N]
void pack_panel(const uint8_t* b, int64_t row_stride, int64_t rows, int64_t depth, Operand* panel) {
  alignas(64) Operand unpacked[kSlice * kDepth];
  for (int64_t n = 0; n < kWidth; n += kSlice) {
    for (int64_t i = 0; i < kSlice; ++i) {
      if (n + i < rows) {
        unpack_row(b + (n + i) * row_stride, depth, unpacked + i * kDepth);
      } else {
        std::memset(unpacked + i * kDepth, 0, kDepth * sizeof(Operand));
      }
    }
    for (int64_t k = 0; k < kDepth; ++k) {
      for (int64_t i = 0; i < kSlice; ++i) panel[(n / kSlice * kDepth + k) * kSlice + i] = unpacked[i * kDepth + k];
    }
  }
}

template <int R>
void multiply(const Operand* a, const Operand* panel, const float* scale_a, const float* scale_b, float* c) {
  for (int64_t n = 0; n < kWidth; n += kSlice) {
    Vector acc[R][kVectors] = {};
    const Operand* slice = panel + n * kDepth;
    for (int64_t k = 0; k < kDepth; ++k) {
      Vector columns[kVectors];
      for (int j = 0; j < kVectors; ++j) std::memcpy(&columns[j], slice + k * kSlice + j * kLanes, sizeof(Vector));
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kVectors; ++j) acc[r][j] += columns[j] * a[r * kDepth + k];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        Vector place, s;
        std::memcpy(&place, c + r * kWidth + n + j * kLanes, sizeof(Vector));
        std::memcpy(&s, scale_b + n + j * kLanes, sizeof(Vector));
        // kept finite: zero codes times an overflown product would be NaN
        const Vector factor = s * scale_a[r];
        place += acc[r][j] * (factor > kLargest ? Vector{} + kLargest : factor);
        std::memcpy(c + r * kWidth + n + j * kLanes, &place, sizeof(Vector));
      }
    }
  }
}

#endif

inline void multiply_rows(int64_t rows, const Operand* a, const Operand* panel, const float* scale_a,
                          const float* scale_b, float* c) {
  switch (rows) {
    case 1:
      return multiply<1>(a, panel, scale_a, scale_b, c);
    case 2:
      return multiply<2>(a, panel, scale_a, scale_b, c);
    case 3:
      return multiply<3>(a, panel, scale_a, scale_b, c);
    case 4:
      return multiply<4>(a, panel, scale_a, scale_b, c);
    case 5:
      return multiply<5>(a, panel, scale_a, scale_b, c);
    default:
      return multiply<6>(a, panel, scale_a, scale_b, c);
  }
}

template <typename T>
void store(const float* c, int64_t rows, int64_t columns, const float* bias, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; ++n) {
      const float value = c[r * kWidth + n];
      out[r * out_stride + n] = from_float<T>(bias != nullptr ? value + bias[n] : value);
    }
  }
}

// one panel of one weight, from column n on, against the rows of one part: out [count, up to 64]
void multiply_panel(const Fp8MatmulCall& call, const fp8::Segment& part, int64_t n, float* c) {
  alignas(64) Operand panel[kDepth * kWidth];
  alignas(64) float scale_b[kWidth];
  const int64_t k = call.k, count = part.end - part.begin, columns = call.n - n < kWidth ? call.n - n : kWidth;
  const uint8_t* b = call.b + part.group * call.b_group + n * call.b_row;
  const float* b_scale = call.b_scale + part.group * call.b_scale_group;
  const Operand* a = static_cast<const Operand*>(call.unpacked);
  for (int64_t i = 0; i < count * kWidth; ++i) c[i] = 0.0f;
  for (int64_t start = 0, block = 0; start < k; start += kDepth, ++block) {
    pack_panel(b + start, call.b_row, columns, k - start < kDepth ? k - start : kDepth, panel);
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = (n + i) / call.scale_rows;
      scale_b[i] = i < columns ? b_scale[row * call.b_scale_row + block * call.b_scale_block] : 0.0f;
    }
    for (int64_t r = 0; r < count; r += kTileRows) {
      const int64_t at = block * call.rows + part.begin - call.first + r;
      multiply_rows(count - r, a + at * kDepth, panel, call.scales + at, scale_b, c + r * kWidth);
    }
  }
  const float* bias = call.bias == nullptr ? nullptr : call.bias + n;
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    store(c, count, columns, bias, reinterpret_cast<T*>(call.out) + part.begin * call.n + n, call.n);
  })
}

}  // namespace

void fp8_matmul_operand_bytes(int64_t* bytes) { *bytes = sizeof(Operand); }

// rows [begin, end) of those that are unpacked
void fp8_matmul_unpack(const Fp8MatmulCall& call, int64_t begin, int64_t end) {
  Operand* unpacked = static_cast<Operand*>(call.unpacked);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t start = 0, block = 0; start < call.k; start += kDepth, ++block) {
      const int64_t depth = call.k - start < kDepth ? call.k - start : kDepth;
      const int64_t row = call.first + r, to = block * call.rows + r;
      unpack_row(call.a + row * call.a_row + start, depth, unpacked + to * kDepth);
      call.scales[to] = call.a_scale[row * call.a_scale_row + block * call.a_scale_block];
    }
  }
}

// items are a part and a panel, the panel fastest; c: kPartRows rows of a panel
void fp8_matmul_panels(const Fp8MatmulCall& call, float* c, int64_t begin, int64_t end) {
  const int64_t panels = (call.n + kWidth - 1) / kWidth;
  for (int64_t i = begin; i < end; ++i) multiply_panel(call, call.parts[i / panels], i % panels * kWidth, c);
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include "fp8/host.h"

namespace tilefuse {

TILEFUSE_DISPATCH(fp8_matmul_operand_bytes)
TILEFUSE_DISPATCH(fp8_matmul_unpack)
TILEFUSE_DISPATCH(fp8_matmul_panels)

void fp8::matmul_segments(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                          const float* bias, const std::vector<Segment>& segments, Tensor& out) {
  // dims before N and K
  const int64_t lead = b.dim() - 2;
  Fp8MatmulCall call{};
  call.a = pointer<const uint8_t>(a);
  call.a_scale = pointer<const float>(a_scale);
  call.a_row = stride_or_zero(a, 0);
  call.a_scale_row = stride_or_zero(a_scale, 0);
  call.a_scale_block = stride_or_zero(a_scale, 1);
  call.b = pointer<const uint8_t>(b);
  call.b_scale = pointer<const float>(b_scale);
  call.b_group = lead > 0 ? stride_or_zero(b, 0) : 0;
  call.b_row = stride_or_zero(b, lead);
  call.b_scale_group = lead > 0 ? stride_or_zero(b_scale, 0) : 0;
  call.b_scale_row = stride_or_zero(b_scale, lead);
  call.b_scale_block = stride_or_zero(b_scale, lead + 1);
  call.n = b.size(lead);
  call.k = b.size(lead + 1);
  call.scale_rows = b_scale.size(lead) == call.n ? 1 : 128;
  call.bias = bias;
  call.dtype = dtype_of(out);
  call.out = pointer<char>(out);
  if (segments.empty() || call.n == 0) return;

  int64_t bytes = 0;
  fp8_matmul_operand_bytes(&bytes);
  const int64_t blocks = blocks_of(call.k), panels = (call.n + 63) / 64, last = segments.back().end;
  call.first = segments.front().begin;
  const int64_t most = last - call.first < kUnpackedRows ? last - call.first : kUnpackedRows;
  const std::unique_ptr<char[]> unpacked(new char[static_cast<size_t>(most * blocks * 128 * bytes + 64)]);
  const std::unique_ptr<float[]> scales(new float[static_cast<size_t>(most * blocks + 1)]);
  // aligned to a cache line
  call.unpacked = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(unpacked.get()) + 63) / 64 * 64);
  call.scales = scales.get();
  for (; call.first < last; call.first += kUnpackedRows) {
    const int64_t stop = last - call.first < kUnpackedRows ? last : call.first + kUnpackedRows;
    call.rows = stop - call.first;
    run_parallel(fp8_matmul_unpack, call.rows, grain(call.k), call);
    std::vector<Segment> parts;
    for (const Segment& s : segments) {
      const int64_t begin = s.begin > call.first ? s.begin : call.first, end = s.end < stop ? s.end : stop;
      for (int64_t r = begin; r < end; r += kPartRows) {
        parts.push_back({s.group, r, end - r < kPartRows ? end : r + kPartRows});
      }
    }
    call.parts = parts.data();
    run_parallel(fp8_matmul_panels, static_cast<int64_t>(parts.size()) * panels, 1, call,
                 RangeScratch<float>{kPartRows * 64});
  }
}

namespace {

Tensor matmul(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
              const OptionalTensor& bias, ScalarType out_dtype) {
  const int64_t m = a.size(0), n = b.size(0);
  Tensor out = torch::stable::new_empty(a, {m, n}, out_dtype);
  if (m > 0) fp8::matmul_segments(a, a_scale, b, b_scale, pointer<const float>(bias), {{0, 0, m}}, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("fp8_matmul_fwd", TORCH_BOX(&matmul)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
