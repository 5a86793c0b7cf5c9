// What the products of common/panel_matmul.h multiply on the CPU: operands, panels of them, and their scales.
#pragma once

#include "common/fp8.h"
#include "common/immintrin.h"
#include "common/panel_matmul.h"

#if defined(__AVX512BF16__)
#define TILEFUSE_PAIRS 1
#endif

namespace tilefuse {
namespace TILEFUSE_ISA {
namespace {

constexpr int64_t kTileRows = 6;  // of M: one register tile
constexpr int64_t kStripWidth = 16, kStrips = kPanelWidth / kStripWidth;
constexpr int64_t kStrip = kStripWidth * kPanelDepth;  // operands of a strip of a panel
constexpr int64_t kFetchedBytes = 1024;                // how far ahead a stream of weights is asked for
constexpr float kLargest = 3.4028234663852886e38f;

#if defined(TILEFUSE_PAIRS)
using Operand = uint16_t;
#else
using Operand = float;
#endif

// Lines of the weight that the next panel is made of: `count` of them for each pair of K, `line` bytes apart, and the
// next pair's `pair` bytes on. A tile of rows asks for `share` of them.
struct Ahead {
  const char* data;
  int64_t pair, line;
  int share, count;
};

// four strips [64 pairs of K][16 of N][2], `stride` operands apart (elsewhere than on AVX512-BF16 another layout)
struct Panel {
  const Operand* data;
  int64_t stride;
};

// the scales of a weight's columns from n on
struct ColumnScales {
  const PanelWeight& w;
  int64_t group, n;

  // of columns [first, first + count) in one block of K; 0 past the last column
  void load(int64_t block, int64_t first, int64_t count, float* out) const {
    const float* scale = w.scale + group * w.scale_group + block * w.scale_block;
    for (int64_t i = 0; i < count;) {
      const int64_t column = n + first + i, row = column / w.scale_rows, end = (row + 1) * w.scale_rows - column;
      const float value = column < w.n ? scale[row * w.scale_row] : 0.0f;
      for (const int64_t stop = i + end < count ? i + end : count; i < stop; ++i) out[i] = value;
    }
  }
};

// where few rows' operands and scales lie: `block` and `scale_block` lead from one 128 of K to the next
struct FewRows {
  const Operand* a;
  const float* scale;
  int64_t block, scale_block;
};

// element (n, k) of one group of a packed weight with `all` rows
template <typename T>
inline T packed_element(const T* data, int64_t all, int64_t padded, int64_t n, int64_t k) {
  if (n >= all / kStripWidth * kStripWidth) return data[n * padded + k];
  const int64_t c = n % kStripWidth;
  const T* strip = data + (n - c) * padded;
  if (sizeof(T) == 2) return strip[(k / 2 * kStripWidth + c) * 2 + k % 2];
  return strip[k / 4 * 64 + c / 4 * 16 + k % 4 / 2 * 8 + c % 4 * 2 + k % 2];
}

}  // namespace
}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
