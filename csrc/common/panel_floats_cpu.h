// Panels on other CPUs: operands are float32, in vectors of the instruction set.
#pragma once

#include "common/panel_operands_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kSlice = kLanes * kVectors;  // of N: what one register tile covers
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Operand operand_of(uint8_t code) { return fp8::decode(code); }
inline Operand operand_of(bf16 value) { return to_float(value); }

// panels are [64 / kSlice][128 of K][kSlice of N]
inline void place(Operand* panel, int64_t n, int64_t k, Operand value) {
  panel[(n / kSlice * kPanelDepth + k) * kSlice + n % kSlice] = value;
}

template <typename T>
void panel_of_rows(const T* w, int64_t stride, int64_t rows, int64_t depth, Operand* panel) {
  for (int64_t n = 0; n < kPanelWidth; ++n) {
    for (int64_t k = 0; k < depth; ++k) place(panel, n, k, n < rows ? operand_of(w[n * stride + k]) : 0.0f);
    // whole pairs of K are multiplied
    if (depth % 2 != 0) place(panel, n, depth, 0.0f);
  }
}

template <typename T>
void panel_of_columns(const T* w, int64_t stride, int64_t columns, int64_t depth, Operand* panel) {
  // whole pairs of K are multiplied
  for (int64_t k = 0; k < depth + depth % 2; ++k) {
    for (int64_t n = 0; n < kPanelWidth; ++n) {
      place(panel, n, k, n < columns && k < depth ? operand_of(w[k * stride + n]) : 0.0f);
    }
  }
}

template <typename T>
void unpack_strips(const T* packed, int64_t stride, int64_t strips, int64_t pairs, Operand* panel) {
  for (int64_t n = 0; n < strips * kStripWidth; ++n) {
    const T* strip = packed + n / kStripWidth * stride;
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      place(panel, n, k, operand_of(packed_element(strip, kStripWidth, 2 * pairs, n % kStripWidth, k)));
    }
  }
}

template <typename T>
inline const Operand* in_place(const T*) {
  return nullptr;
}

template <typename T>
void operands_of(const T* from, int64_t count, Operand* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = operand_of(from[i]);
  for (int64_t i = count; i < kPanelDepth; ++i) out[i] = 0.0f;
}

struct Strips {
  Panel panel;
};

// c [R][64] += a [R][128] x panel, or with scales c += (a x panel) * scale_a * scale_b
template <int R, bool kScaled>
void multiply(const Operand* a, const Strips& strips, int64_t pairs, const float* scale_a, const float* scale_b,
              float* c, Ahead) {
  for (int64_t n = 0; n < kPanelWidth; n += kSlice) {
    Vector acc[R][kVectors] = {};
    if (!kScaled) {
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kVectors; ++j)
          std::memcpy(&acc[r][j], c + r * kPanelWidth + n + j * kLanes, sizeof(Vector));
      }
    }
    const Operand* slice = strips.panel.data + n * kPanelDepth;
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      Vector columns[kVectors];
      for (int j = 0; j < kVectors; ++j) std::memcpy(&columns[j], slice + k * kSlice + j * kLanes, sizeof(Vector));
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kVectors; ++j) acc[r][j] += columns[j] * a[r * kPanelDepth + k];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        float* to = c + r * kPanelWidth + n + j * kLanes;
        if (kScaled) {
          Vector sum, s;
          std::memcpy(&sum, to, sizeof(Vector));
          std::memcpy(&s, scale_b + n + j * kLanes, sizeof(Vector));
          // kept finite: zero codes times an overflown product would be NaN
          const Vector factor = s * scale_a[r];
          acc[r][j] = sum + acc[r][j] * (factor > kLargest ? Vector{} + kLargest : factor);
        }
        std::memcpy(to, &acc[r][j], sizeof(Vector));
      }
    }
  }
}

}  // namespace
}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
