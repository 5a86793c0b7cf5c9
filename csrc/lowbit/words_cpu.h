// Codes of 8, 6 and 4 bits of a panel of columns on the CPU, a column in each lane.
//
// Rows of codes are read a line at a time and transposed as 32-bit words, [16 words][64 columns], before anything is
// unpacked: shifts and masks of a word then serve as many columns as a vector has lanes. What is unpacked at a time is
// a unit, 8 elements of K. Codes are unsigned: 8-bit ones that are signed get 128 more, as do their zeros.
#pragma once

#include "lowbit/lanes_cpu.h"

namespace tilefuse {

constexpr int64_t kUnit = 8;           // of K
constexpr int64_t kRunUnits = 8;       // at most, in one run
constexpr int64_t kLineWords = 16;     // of a column, in one line of panels
constexpr int64_t kBlockBytes = 24;    // 32 elements of 6 bits: 16 bytes of low nibbles, 8 of high pairs
constexpr int64_t kBlockNibbles = 16;  // bytes

// codes [N, row bytes]
struct CodeRows {
  const uint8_t* data;
  int64_t n, stride, bytes;
  int32_t bits;
  bool is_signed;
};

// units of K in a line: as many as 16 words hold, and whole blocks of 6 bits
static inline int64_t line_units(int32_t bits) { return bits == 4 ? 16 : 8; }

static inline int64_t line_bytes(int32_t bits) { return line_units(bits) * bits; }

// Units of one group, and of one line, that are multiplied at a time. Units at the ends of a group that does not begin
// and end with units belong to two groups; where a run's rows are unpacked, they are 0 outside of the group.
struct CodeRun {
  int64_t group;
  int64_t line, unit, units;  // units [unit, unit + units) of the line
  int64_t start;              // operands of rows before this run, for each row
  int64_t span;               // numbered over all groups
  bool opens_line;            // whether the line is not the one before
  bool opens, closes;         // the first and the last run of a span
  bool closes_group;
};

namespace TILEFUSE_ISA {
namespace {

// the last line of a row, shorter than 64 bytes, as full ones lie
inline void last_line(const CodeRows& rows, const uint8_t* from, int64_t bytes, uint8_t* line) {
  std::memset(line, 0, kLineWords * 4);
  if (rows.bits != 6) {
    std::memcpy(line, from, static_cast<size_t>(bytes));
    return;
  }
  for (; bytes > 0; bytes -= kBlockBytes, from += kBlockBytes, line += kBlockBytes) {
    const int64_t nibbles = bytes < kBlockBytes ? bytes / 3 * 2 : kBlockNibbles;
    const int64_t pairs = bytes < kBlockBytes ? bytes - nibbles : kBlockBytes - kBlockNibbles;
    std::memcpy(line, from, static_cast<size_t>(nibbles));
    std::memcpy(line + kBlockNibbles, from + nibbles, static_cast<size_t>(pairs));
  }
}

// words [16][64] of columns [n, n + 64); columns past the last repeat it
inline void load_line(const CodeRows& rows, int64_t n, int64_t line, uint32_t* words) {
  const int64_t start = line * line_bytes(rows.bits), left = rows.bytes - start;
  const uint32_t flip = rows.is_signed ? 0x80808080u : 0u;
  // 64 bytes are read of 48 as well
  const bool whole = left >= kLineWords * 4;
  for (int64_t first = 0; first < kPanelColumns && n + first < rows.n; first += kLanes) {
    alignas(64) uint8_t copies[kLanes][kLineWords * 4];
    const uint8_t* columns[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t column = n + first + i < rows.n ? n + first + i : rows.n - 1;
      columns[i] = rows.data + column * rows.stride + start;
      if (!whole) {
        last_line(rows, columns[i], left < line_bytes(rows.bits) ? left : line_bytes(rows.bits), copies[i]);
        columns[i] = copies[i];
      }
    }
    for (int64_t word = 0; word < kLineWords; word += kLanes) {
      Lanes v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        v[i] = load_lanes(reinterpret_cast<const uint32_t*>(columns[i] + word * 4)) ^ flip;
        // the line after next: a hint, wherever it points
        if (whole && word == 0) __builtin_prefetch(columns[i] + 2 * kLineWords * 4, 0, 2);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_lanes(words + (word + i) * kPanelColumns + first, v[i]);
    }
  }
}

// the codes of a unit of kLanes columns
template <int kBits>
struct UnitCodes {
  Lanes low, high;

  // words: of a line, from the first of these columns on
  TILEFUSE_INLINE UnitCodes load(const uint32_t* words, int64_t unit) {
    if constexpr (kBits == 4) return {load_lanes(words + unit * kPanelColumns), Lanes{}};
    if constexpr (kBits == 8) {
      return {load_lanes(words + 2 * unit * kPanelColumns), load_lanes(words + (2 * unit + 1) * kPanelColumns)};
    }
    // a block is four words of nibbles and two of pairs, each of these for two units
    const uint32_t* block = words + unit / 4 * 6 * kPanelColumns;
    const Lanes pairs = load_lanes(block + (4 + unit % 4 / 2) * kPanelColumns);
    return {load_lanes(block + unit % 4 * kPanelColumns), pairs >> static_cast<uint32_t>(unit % 2 * 16)};
  }

  // of the element kElement of the unit; bits above may be left in 4-bit codes
  template <int kElement>
  TILEFUSE_INLINE Lanes loose(const UnitCodes& codes) {
    if constexpr (kBits == 4) return codes.low >> (4 * kElement);
    if constexpr (kBits == 8) return ((kElement < 4 ? codes.low : codes.high) >> (8 * (kElement % 4))) & 255u;
    return ((codes.low >> (4 * kElement)) & 15u) | (((codes.high >> (2 * kElement)) & 3u) << 4);
  }

  static constexpr int kWords = kUnit / kPack;  // of a row, in a unit

  // kPack codes as one instruction multiplies them; element_of says which
  template <int kWord>
  TILEFUSE_INLINE Lanes word(const UnitCodes& codes) {
    if constexpr (kPack == 4) {
      if constexpr (kBits == 8) return kWord == 0 ? codes.low : codes.high;
      const Lanes nibbles = (codes.low >> (4 * kWord)) & 0x0f0f0f0fu;
      if constexpr (kBits == 4) return nibbles;
      // every other pair of bits, spread to bytes
      Lanes pairs = (codes.high >> (2 * kWord)) & 0x3333u;
      pairs = (pairs | (pairs << 8)) & 0x00ff00ffu;
      return nibbles | (((pairs | (pairs << 4)) & 0x03030303u) << 4);
    }
    if constexpr (kBits == 8) return ((kWord < 2 ? codes.low : codes.high) >> (8 * (kWord % 2))) & 0x00ff00ffu;
    const Lanes nibbles = (codes.low >> (4 * kWord)) & 0x000f000fu;
    if constexpr (kBits == 4) return nibbles;
    const Lanes pairs = ((codes.high & 0xffu) | ((codes.high & 0xff00u) << 8)) >> (2 * kWord);
    return nibbles | ((pairs & 0x00030003u) << 4);
  }

  // the element of the unit whose code is number `place` of a word
  static constexpr int element_of(int word, int place) {
    if (kPack == 4) return kBits == 8 ? 4 * word + place : 2 * place + word;
    return kBits == 8 ? word / 2 * 4 + word % 2 + 2 * place : word + 4 * place;
  }
};

}  // namespace
}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
