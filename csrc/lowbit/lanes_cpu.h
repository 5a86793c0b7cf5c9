// Vectors whose lanes are columns of a weight, for the products of the lowbit family on the CPU.
//
// The 32 bits of a lane hold kPack codes of consecutive K, which one instruction multiplies by as many of a row and
// adds up: four with VNNI, whose weights are unsigned and whose rows are signed bytes; elsewhere two, as int16, because
// the instruction for bytes saturates. Integers are exact in any order, so all copies agree.
#pragma once

#include "common/floats_cpu.h"
#include "common/transpose_cpu.h"

namespace tilefuse {

constexpr int64_t kPanelColumns = 64;
constexpr int64_t kPartRows = 256;  // rows that share one unpacking of a panel
// of K: 2^16 * 255 * 128 is less than 2^31
constexpr int64_t kSpan = int64_t{1} << 16;

namespace TILEFUSE_ISA {
namespace {

// kDepth of K at a time: a panel of 8-bit codes stays in the first cache
#if defined(__AVX512VNNI__)
constexpr bool kUnsignedWeights = true;
constexpr int kLanes = 16, kVectors = 4, kPack = 4, kDepth = 512;
using IntegerOperand = int8_t;
#elif defined(__AVX512BW__)
constexpr bool kUnsignedWeights = false;
constexpr int kLanes = 16, kVectors = 4, kPack = 2, kDepth = 256;
using IntegerOperand = int16_t;
#elif defined(__AVX2__)
constexpr bool kUnsignedWeights = false;
constexpr int kLanes = 8, kVectors = 2, kPack = 2, kDepth = 128;
using IntegerOperand = int16_t;
#else
constexpr bool kUnsignedWeights = false;
constexpr int kLanes = 4, kVectors = 2, kPack = 2, kDepth = 128;
using IntegerOperand = int16_t;
#endif
constexpr int kSlice = kLanes * kVectors;  // of N: what one register tile covers
constexpr int64_t kTileRows = kLanes == 4 ? 4 : 6;

// sums wrap, so they are unsigned
typedef uint32_t Lanes __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t LooseLanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t SignedLanes __attribute__((vector_size(kLanes * 4), may_alias));
// codes of one row that one lane multiplies
typedef uint32_t Word __attribute__((aligned(4), may_alias));
// sums of 16 columns
typedef uint32_t Sums __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t SignedSums __attribute__((vector_size(64), aligned(4), may_alias));

TILEFUSE_INLINE Lanes load_lanes(const uint32_t* p) { return *reinterpret_cast<const LooseLanes*>(p); }

TILEFUSE_INLINE void store_lanes(uint32_t* p, Lanes v) { *reinterpret_cast<LooseLanes*>(p) = v; }

// each lane of acc plus the products of its codes
TILEFUSE_INLINE Lanes accumulate(Lanes acc, Lanes weight, Lanes row) {
#if defined(__AVX512VNNI__)
  return (Lanes)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, (__m512i)row);
#elif defined(__AVX512BW__)
  return acc + (Lanes)_mm512_madd_epi16((__m512i)weight, (__m512i)row);
#elif defined(__AVX2__)
  return acc + (Lanes)_mm256_madd_epi16((__m256i)weight, (__m256i)row);
#elif defined(__SSE2__)
  return acc + (Lanes)_mm_madd_epi16((__m128i)weight, (__m128i)row);
#else
  const SignedLanes w = (SignedLanes)weight, r = (SignedLanes)row;
  const Lanes low = (Lanes)((w << 16) >> 16) * (Lanes)((r << 16) >> 16);
  return acc + low + (Lanes)(w >> 16) * (Lanes)(r >> 16);
#endif
}

template <int R>
struct Rows {
  static constexpr int kCount = R;
};

// calls body(first, rows) for tiles of equal height, at most kTileRows, whose height is a type
template <typename Body>
inline void for_tiles(int64_t count, const Body& body) {
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0, r = 0; tile < tiles; ++tile) {
    const int64_t height = (count - r + tiles - tile - 1) / (tiles - tile);
    switch (height) {
      case 1:
        body(r, Rows<1>{});
        break;
      case 2:
        body(r, Rows<2>{});
        break;
      case 3:
        body(r, Rows<3>{});
        break;
      case 4:
        body(r, Rows<4>{});
        break;
      case 5:
        body(r, Rows<(kTileRows > 4 ? 5 : 1)>{});
        break;
      default:
        body(r, Rows<kTileRows>{});
        break;
    }
    r += height;
  }
}

// c [R][64] of sums, plus the products of R rows, `stride` words apart, with `words` words of K of all columns, those
// of lanes' vectors `vector` and words `word` values apart
template <int R>
void multiply_tile(const Word* rows, int64_t stride, const uint32_t* panel, int64_t vector, int64_t word, int64_t words,
                   bool first, uint32_t* c) {
  for (int64_t n = 0; n < kPanelColumns; n += kSlice, panel += kVectors * vector) {
    Lanes acc[R][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        acc[r][j] = first ? Lanes{} : load_lanes(c + r * kPanelColumns + n + j * kLanes);
      }
    }
    for (int64_t w = 0; w < words; ++w) {
      Lanes columns[kVectors];
      for (int j = 0; j < kVectors; ++j) columns[j] = load_lanes(panel + j * vector + w * word);
      for (int r = 0; r < R; ++r) {
        const Lanes row = Lanes{} + rows[r * stride + w];
        for (int j = 0; j < kVectors; ++j) acc[r][j] = accumulate(acc[r][j], columns[j], row);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) store_lanes(c + r * kPanelColumns + n + j * kLanes, acc[r][j]);
    }
  }
}

// out [64] += float(sums) * (row_scale * scales), of int32 sums, or int64 ones if there are any
TILEFUSE_INLINE void add_scaled(const uint32_t* c, const int64_t* wide, float row_scale, const float* scales,
                                float* out) {
  for (int64_t n = 0; n < kPanelColumns; n += kFloats) {
    Floats sums;
    if (wide == nullptr) {
      sums = __builtin_convertvector(*reinterpret_cast<const SignedSums*>(c + n), Floats);
    } else {
      for (int64_t i = 0; i < kFloats; ++i) sums[i] = static_cast<float>(wide[n + i]);
    }
    put(out, n, get(out, n, ManyFloats{}) + sums * (row_scale * get(scales, n, ManyFloats{})));
  }
}

// `count` rows of 64 sums as rows of the output, `stride` values apart, of which `columns` exist
template <typename T>
void store_rows(const float* sums, int64_t count, int64_t columns, const float* bias, T* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, sums += kPanelColumns, out += stride) {
    over_floats(columns, [&](int64_t j, auto lanes) {
      const auto sum = get(sums, j, lanes);
      put(out, j, bias == nullptr ? sum : sum + get(bias, j, lanes));
    });
  }
}

// a pointer into `room` that starts a cache line, and `room` behind what it points to
template <typename T>
T* take(char*& room, int64_t count) {
  room += -reinterpret_cast<uintptr_t>(room) & 63;
  T* taken = reinterpret_cast<T*>(room);
  room += count * static_cast<int64_t>(sizeof(T));
  return taken;
}

}  // namespace
}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

constexpr int64_t kUnpackedRows = 2048;  // rows unpacked at a time

// What one row of a product [M, K] x [K, N] has as operands, and what a range of the work has for itself.
struct LaneSizes {
  int64_t m, n, k;
  int64_t operands, bytes, sums;  // of a row: operands of `bytes` bytes, and sums of them
  int64_t room;
};

// Unpacks rows of a call and multiplies them with panels of columns, as many at a time as stay in the caches.
template <typename Call, typename Unpack, typename Multiply>
inline void multiply_rows(Call& call, const LaneSizes& sizes, const Unpack& unpack, const Multiply& multiply) {
  const int64_t most = sizes.m < kUnpackedRows ? sizes.m : kUnpackedRows;
  const int64_t room = most * sizes.operands * sizes.bytes + 64;
  const std::unique_ptr<char[]> operands(new char[static_cast<size_t>(room)]);
  prefer_huge_pages(operands.get(), room);
  const std::unique_ptr<int32_t[]> sums(new int32_t[static_cast<size_t>(most * sizes.sums + 1)]);
  // aligned to a cache line
  call.operands = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(operands.get()) + 63) / 64 * 64);
  call.sums = sums.get();
  const int64_t panels = (sizes.n + kPanelColumns - 1) / kPanelColumns;
  for (; call.first < sizes.m; call.first += kUnpackedRows) {
    call.rows = sizes.m - call.first < kUnpackedRows ? sizes.m - call.first : kUnpackedRows;
    run_parallel(unpack, call.rows, 1 + 32768 / (sizes.operands + 1), call);
    const int64_t parts = (call.rows + kPartRows - 1) / kPartRows;
    const int64_t rows = call.rows < kPartRows ? call.rows : kPartRows;
    // codes of the weight count as a few rows
    const int64_t grain = 1 + (int64_t{1} << 20) / ((rows + 8) * kPanelColumns * (sizes.k + 64));
    run_parallel(multiply, panels * parts, grain, call, parts, RangeScratch<char>{sizes.room});
  }
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
