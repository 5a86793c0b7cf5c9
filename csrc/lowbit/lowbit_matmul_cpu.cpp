// build-isas: avx512vnni
// lowbit_matmul on the CPU. A panel of 64 columns is unpacked for many rows at a time, along runs of K that lie in one
// group. Every element sums along K in one order, whatever the number of rows: its bits do not depend on the others.
#include "lowbit/words_cpu.h"

namespace tilefuse {

// values of groups [N, G], rows `stride` apart
struct GroupValues {
  const void* data;
  Dtype dtype;
  bool bytes;  // uint8 instead of a float type
  int64_t stride;
};

struct LowbitCall {
  CodeRows codes;
  GroupValues scale, zero;  // no data: the zero is `middle`
  int32_t middle;           // of codes as they are unpacked, which is 128 more where they are signed
  const float* bias;
  void* out;  // [M, N]
  Dtype out_dtype;
  const void* x;  // [M, K]
  Dtype x_dtype;
  const float* x_scale;                                       // [M, G] of int8 x
  int64_t k, x_stride, x_scale_stride, groups, group, spans;  // `spans` of all groups
  const CodeRun* runs;
  int64_t count, depth;  // runs, and operands of one row in all of them
  // rows [first, first + rows) as operands, of each run [rows][8 * units]; of int8 their sums [rows][spans]
  int64_t first, rows;
  void* operands;
  int32_t* sums;
};

namespace TILEFUSE_ISA {
namespace {

typedef float FloatLanes __attribute__((vector_size(kLanes * 4), may_alias));
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int64_t kRunDepth = kRunUnits * kUnit;

TILEFUSE_INLINE FloatLanes load_floats(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }

TILEFUSE_INLINE void store_floats(float* p, FloatLanes v) { *reinterpret_cast<LooseFloats*>(p) = v; }

// one rounding where the instruction set has that, in any function of this file
TILEFUSE_INLINE FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatLanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// code - zero of one element of a unit; `offset`: what 8-bit codes have too much. kCentred: 4-bit codes whose zero
// is 8.
template <int kBits, int kElement, bool kCentred>
TILEFUSE_INLINE FloatLanes level(const UnitCodes<kBits>& codes, FloatLanes zero, uint32_t offset) {
  const Lanes code = UnitCodes<kBits>::template loose<kElement>(codes);
#if defined(__AVX512F__)
  if constexpr (kBits == 4) {
    // looks at the four low bits of a lane
    const __m512 first = kCentred ? _mm512_set1_ps(-8.0f) : _mm512_setzero_ps();
    const __m512 count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const FloatLanes value = (FloatLanes)_mm512_permutexvar_ps((__m512i)code, _mm512_add_ps(count, first));
    return kCentred ? value : value - zero;
  }
#endif
  const Lanes clean = kBits == 4 ? code & 15u : kBits == 8 ? code - offset : code;
  return __builtin_convertvector((SignedLanes)clean, FloatLanes) - zero;
}

template <int kBits, bool kCentred, typename Body, int... kElement>
TILEFUSE_INLINE void each_level(const UnitCodes<kBits> (&codes)[kVectors], const FloatLanes (&zero)[kVectors],
                                uint32_t offset, const Body& body, std::integer_sequence<int, kElement...>) {
  (
      [&]() __attribute__((always_inline)) {
        FloatLanes levels[kVectors];
        for (int j = 0; j < kVectors; ++j) levels[j] = level<kBits, kElement, kCentred>(codes[j], zero[j], offset);
        body(kElement, levels);
      }(),
      ...);
}

// calls body(element of the run, code - zero of it in kVectors vectors of columns from n on)
template <int kBits, bool kCentred, typename Body>
TILEFUSE_INLINE void each_element(const CodeRun& run, const uint32_t* words, const float* zeros, uint32_t offset,
                                  int64_t n, const Body& body) {
  FloatLanes zero[kVectors];
  for (int j = 0; j < kVectors; ++j) zero[j] = load_floats(zeros + n + j * kLanes);
  for (int64_t u = 0; u < run.units; ++u) {
    UnitCodes<kBits> codes[kVectors];
    for (int j = 0; j < kVectors; ++j) codes[j] = UnitCodes<kBits>::load(words + n + j * kLanes, run.unit + u);
    each_level<kBits, kCentred>(
        codes, zero, offset,
        [&](int element, const FloatLanes(&levels)[kVectors])
            __attribute__((always_inline)) { body(u * kUnit + element, levels); },
        std::make_integer_sequence<int, kUnit>{});
  }
}

// the sums of a group that R rows have so far, [R][64]; at its end, `total` gets them times the scales
template <int R>
struct GroupSums {
  FloatLanes acc[R][kVectors];

  TILEFUSE_INLINE void load(GroupSums& sums, bool opens, const float* sum, int64_t n) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        sums.acc[r][j] = opens ? FloatLanes{} : load_floats(sum + r * kPanelColumns + n + j * kLanes);
      }
    }
  }

  TILEFUSE_INLINE void add(GroupSums& sums, const float* x, int64_t stride, const FloatLanes (&levels)[kVectors]) {
    for (int r = 0; r < R; ++r) {
      const FloatLanes value = FloatLanes{} + x[r * stride];
      for (int j = 0; j < kVectors; ++j) sums.acc[r][j] = multiply_add(levels[j], value, sums.acc[r][j]);
    }
  }

  TILEFUSE_INLINE void store(const GroupSums& sums, bool closes, const float* scales, int64_t n, float* sum,
                             float* total) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = n + j * kLanes, cell = r * kPanelColumns + at;
        if (closes) {
          store_floats(total + cell, multiply_add(sums.acc[r][j], load_floats(scales + at), load_floats(total + cell)));
        } else {
          store_floats(sum + cell, sums.acc[r][j]);
        }
      }
    }
  }
};

// what a range of work has for itself
struct Room {
  uint32_t *words, *codes;
  float *panel, *sum, *total, *scales, *zeros;
  int64_t* wide;

  static constexpr int64_t kCells = kPartRows * kPanelColumns;

  // values of groups of 16 more
  static int64_t bytes(int64_t groups) {
    const int64_t values = 2 * (groups + kFloats) * kPanelColumns;
    return 4 * (kLineWords * kPanelColumns + 2 * kRunDepth * kPanelColumns + 2 * kCells + values) + 8 * kCells + 8 * 64;
  }

  Room(char* room, int64_t groups)
      : words(take<uint32_t>(room, kLineWords * kPanelColumns)),
        codes(take<uint32_t>(room, kRunDepth * kPanelColumns)),
        panel(take<float>(room, kRunDepth * kPanelColumns)),
        sum(take<float>(room, kCells)),
        total(take<float>(room, kCells)),
        scales(take<float>(room, (groups + kFloats) * kPanelColumns)),
        zeros(take<float>(room, (groups + kFloats) * kPanelColumns)),
        wide(take<int64_t>(room, kCells)) {}
};

constexpr int64_t kFewRows = 4;  // whose sums stay in registers while codes are unpacked

// rows of one run: x [count][8 * units]
template <int kBits, bool kCentred>
void multiply_run(const CodeRun& run, const Room& room, uint32_t offset, const float* x, int64_t count) {
  const int64_t depth = run.units * kUnit;
  const float *zeros = room.zeros + run.group * kPanelColumns, *scales = room.scales + run.group * kPanelColumns;
  if (count <= kFewRows) {
    for_tiles(count, [&](int64_t, auto height) {
      constexpr int R = decltype(height)::kCount <= kFewRows ? decltype(height)::kCount : 1;
      for (int64_t n = 0; n < kPanelColumns; n += kSlice) {
        GroupSums<R> sums;
        GroupSums<R>::load(sums, run.opens, room.sum, n);
        each_element<kBits, kCentred>(
            run, room.words, zeros, offset, n,
            [&](int64_t k, const FloatLanes(&levels)[kVectors])
                __attribute__((always_inline)) { GroupSums<R>::add(sums, x + k, depth, levels); });
        GroupSums<R>::store(sums, run.closes_group, scales, n, room.sum, room.total);
      }
    });
    return;
  }
  for (int64_t n = 0; n < kPanelColumns; n += kSlice) {
    each_element<kBits, kCentred>(run, room.words, zeros, offset, n,
                                  [&](int64_t k, const FloatLanes(&levels)[kVectors]) __attribute__((always_inline)) {
                                    for (int j = 0; j < kVectors; ++j)
                                      store_floats(room.panel + k * kPanelColumns + n + j * kLanes, levels[j]);
                                  });
  }
  for_tiles(count, [&](int64_t r, auto height) {
    constexpr int R = decltype(height)::kCount;
    const float* rows = x + r * depth;
    float *sum = room.sum + r * kPanelColumns, *total = room.total + r * kPanelColumns;
    for (int64_t n = 0; n < kPanelColumns; n += kSlice) {
      GroupSums<R> sums;
      GroupSums<R>::load(sums, run.opens, sum, n);
      for (int64_t k = 0; k < depth; ++k) {
        FloatLanes levels[kVectors];
        for (int j = 0; j < kVectors; ++j) levels[j] = load_floats(room.panel + k * kPanelColumns + n + j * kLanes);
        GroupSums<R>::add(sums, rows + k, depth, levels);
      }
      GroupSums<R>::store(sums, run.closes_group, scales, n, sum, total);
    }
  });
}

template <int kBits, int... kWord>
TILEFUSE_INLINE void unpack_words(const UnitCodes<kBits>& codes, uint32_t* to, std::integer_sequence<int, kWord...>) {
  (store_lanes(to + kWord * kPanelColumns, UnitCodes<kBits>::template word<kWord>(codes)), ...);
}

// the exact sums of rows of one run, as room.codes' integers; at the end of a group they are scaled
template <int kBits>
void multiply_run_int8(const LowbitCall& call, const CodeRun& run, const Room& room, const IntegerOperand* x, int64_t r,
                       int64_t count) {
  constexpr int kWords = UnitCodes<kBits>::kWords;
  for (int64_t n = 0; n < kPanelColumns; n += kLanes) {
    for (int64_t u = 0; u < run.units; ++u) {
      unpack_words<kBits>(UnitCodes<kBits>::load(room.words + n, run.unit + u),
                          room.codes + u * kWords * kPanelColumns + n, std::make_integer_sequence<int, kWords>{});
    }
  }
  uint32_t* sums = reinterpret_cast<uint32_t*>(room.sum);
  const int64_t words = run.units * kWords;
  for_tiles(count, [&](int64_t i, auto height) {
    multiply_tile<decltype(height)::kCount>(reinterpret_cast<const Word*>(x) + i * words, words, room.codes, kLanes,
                                            kPanelColumns, words, run.opens, sums + i * kPanelColumns);
  });
  if (!run.closes) return;
  const float *zeros = room.zeros + run.group * kPanelColumns, *scales = room.scales + run.group * kPanelColumns;
  const bool several = call.spans != call.groups;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t* row = sums + i * kPanelColumns;
    int64_t* wide = room.wide + i * kPanelColumns;
    const uint32_t row_sum = static_cast<uint32_t>(call.sums[(r + i) * call.spans + run.span]);
    for (int64_t n = 0; n < kPanelColumns; n += kFloats) {
      const SignedSums zero = __builtin_convertvector(get(zeros, n, ManyFloats{}), SignedSums);
      *reinterpret_cast<Sums*>(row + n) -= (Sums)zero * row_sum;
    }
    if (several) {
      for (int64_t n = 0; n < kPanelColumns; ++n) wide[n] += static_cast<int32_t>(row[n]);
    }
    if (!run.closes_group) continue;
    const float scale = call.x_scale[(call.first + r + i) * call.x_scale_stride + run.group];
    add_scaled(row, several ? wide : nullptr, scale, scales, room.total + i * kPanelColumns);
    if (several) std::memset(wide, 0, kPanelColumns * sizeof(int64_t));
  }
}

TILEFUSE_INLINE float value_of(uint8_t x) { return static_cast<float>(x); }

template <typename T>
TILEFUSE_INLINE float value_of(T x) {
  return to_float(x);
}

// values of columns [n, n + 64) as [G][64] in float32, plus `shift`
template <typename T>
void group_values(const T* data, int64_t stride, int64_t groups, int64_t columns, float shift, float* out) {
  alignas(64) float some[kLanes][kFloats];
  for (int64_t first = 0; first < columns; first += kLanes) {
    for (int64_t g = 0; g < groups; g += kFloats) {
      const int64_t count = groups - g < kFloats ? groups - g : kFloats;
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* from = data + (first + i < columns ? first + i : columns - 1) * stride + g;
        if (count == kFloats) {
          for (int64_t j = 0; j < kFloats; ++j) some[i][j] = value_of(from[j]) + shift;
        } else {
          for (int64_t j = 0; j < count; ++j) some[i][j] = value_of(from[j]) + shift;
        }
      }
      for (int64_t part = 0; part < count; part += kLanes) {
        Lanes v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = (Lanes)load_floats(some[i] + part);
        transpose(v);
        for (int i = 0; i < kLanes; ++i) {
          store_floats(out + (g + part + i) * kPanelColumns + first, (FloatLanes)v[i]);
        }
      }
    }
  }
}

void values_of_panel(const LowbitCall& call, int64_t n, float shift, const Room& room) {
  const int64_t columns = call.codes.n - n < kPanelColumns ? call.codes.n - n : kPanelColumns;
  TILEFUSE_BY_DTYPE(call.scale.dtype, T, {
    const T* data = static_cast<const T*>(call.scale.data) + n * call.scale.stride;
    group_values(data, call.scale.stride, call.groups, columns, 0.0f, room.scales);
  })
  if (call.zero.data == nullptr) {
    for (int64_t i = 0; i < call.groups * kPanelColumns; ++i) room.zeros[i] = static_cast<float>(call.middle) + shift;
  } else if (call.zero.bytes) {
    const uint8_t* data = static_cast<const uint8_t*>(call.zero.data) + n * call.zero.stride;
    group_values(data, call.zero.stride, call.groups, columns, shift, room.zeros);
  } else {
    TILEFUSE_BY_DTYPE(call.zero.dtype, T, {
      const T* data = static_cast<const T*>(call.zero.data) + n * call.zero.stride;
      group_values(data, call.zero.stride, call.groups, columns, shift, room.zeros);
    })
  }
}

// Calls body(part's first row, rows, first column) with room.total = 0, and stores what it leaves there. `shift`: what
// is added to zeros.
template <typename Body>
void each_part(const LowbitCall& call, int64_t parts, float shift, const Room& room, int64_t begin, int64_t end,
               const Body& body) {
  int64_t panel = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / parts * kPanelColumns, r = item % parts * kPartRows;
    const int64_t count = call.rows - r < kPartRows ? call.rows - r : kPartRows;
    const int64_t columns = call.codes.n - n < kPanelColumns ? call.codes.n - n : kPanelColumns;
    if (panel != n) values_of_panel(call, n, shift, room);
    panel = n;
    std::memset(room.total, 0, static_cast<size_t>(count * kPanelColumns) * sizeof(float));
    body(r, count, n);
    const float* bias = call.bias == nullptr ? nullptr : call.bias + n;
    TILEFUSE_BY_DTYPE(call.out_dtype, T, {
      T* out = static_cast<T*>(call.out) + (call.first + r) * call.codes.n + n;
      store_rows(room.total, count, columns, bias, out, call.codes.n);
    })
  }
}

template <int kBits, bool kCentred>
void multiply_parts(const LowbitCall& call, int64_t parts, const Room& room, int64_t begin, int64_t end) {
  const uint32_t offset = call.codes.is_signed ? 128 : 0;
  each_part(call, parts, 0.0f, room, begin, end, [&](int64_t r, int64_t count, int64_t n) {
    for (int64_t i = 0; i < call.count; ++i) {
      const CodeRun& run = call.runs[i];
      if (run.opens_line) load_line(call.codes, n, run.line, room.words);
      const float* x = static_cast<const float*>(call.operands) + run.start * call.rows + r * run.units * kUnit;
      multiply_run<kBits, kCentred>(run, room, offset, x, count);
    }
  });
}

template <int kBits>
void multiply_parts_int8(const LowbitCall& call, int64_t parts, const Room& room, int64_t begin, int64_t end) {
  if (call.spans != call.groups) std::memset(room.wide, 0, Room::kCells * sizeof(int64_t));
  each_part(call, parts, call.codes.is_signed ? 128.0f : 0.0f, room, begin, end,
            [&](int64_t r, int64_t count, int64_t n) {
              for (int64_t i = 0; i < call.count; ++i) {
                const CodeRun& run = call.runs[i];
                if (run.opens_line) load_line(call.codes, n, run.line, room.words);
                const IntegerOperand* x =
                    static_cast<const IntegerOperand*>(call.operands) + run.start * call.rows + r * run.units * kUnit;
                multiply_run_int8<kBits>(call, run, room, x, r, count);
              }
            });
}

// the elements of K that a run covers, its group's, as places in the run
struct Covered {
  int64_t first, begin, end;  // K of the run's place 0; places
};

inline Covered covered(const LowbitCall& call, const CodeRun& run) {
  const int64_t first = (run.line * line_units(call.codes.bits) + run.unit) * kUnit;
  const int64_t from = run.group * call.group;
  const int64_t to = from + call.group < call.k ? from + call.group : call.k;
  const int64_t last = first + run.units * kUnit;
  return {first, from > first ? from - first : 0, (to < last ? to : last) - first};
}

template <int kBits>
void unpack_run_int8(const int8_t* x, const Covered& covered, IntegerOperand* to) {
  constexpr int kWords = UnitCodes<kBits>::kWords;
  for (int64_t u = covered.begin / kUnit; u * kUnit < covered.end; ++u) {
    for (int w = 0; w < kWords; ++w) {
      for (int place = 0; place < kPack; ++place) {
        const int64_t k = u * kUnit + UnitCodes<kBits>::element_of(w, place);
        to[u * kUnit + w * kPack + place] = k >= covered.begin && k < covered.end ? x[k] : 0;
      }
    }
  }
}

}  // namespace

// rows [begin, end) of those that are unpacked, in float32
void lowbit_unpack_rows(const LowbitCall& call, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < call.count; ++i) {
    const CodeRun& run = call.runs[i];
    const Covered place = covered(call, run);
    const int64_t depth = run.units * kUnit;
    for (int64_t r = begin; r < end; ++r) {
      float* to = static_cast<float*>(call.operands) + run.start * call.rows + r * depth;
      for (int64_t j = 0; j < place.begin; ++j) to[j] = 0.0f;
      for (int64_t j = place.end; j < depth; ++j) to[j] = 0.0f;
      TILEFUSE_BY_DTYPE(call.x_dtype, T, {
        const T* from = static_cast<const T*>(call.x) + (call.first + r) * call.x_stride + place.first + place.begin;
        over_floats(place.end - place.begin,
                    [&](int64_t j, auto lanes) { put(to + place.begin, j, get(from, j, lanes)); });
      })
    }
  }
}

// the same of int8 codes, in the order of the weight's words, with their sums
void lowbit_unpack_rows_int8(const LowbitCall& call, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < call.count; ++i) {
    const CodeRun& run = call.runs[i];
    const Covered place = covered(call, run);
    for (int64_t r = begin; r < end; ++r) {
      const int8_t* from = static_cast<const int8_t*>(call.x) + (call.first + r) * call.x_stride + place.first;
      IntegerOperand* to = static_cast<IntegerOperand*>(call.operands) + run.start * call.rows + r * run.units * kUnit;
      switch (call.codes.bits) {
        case 4:
          unpack_run_int8<4>(from, place, to);
          break;
        case 6:
          unpack_run_int8<6>(from, place, to);
          break;
        default:
          unpack_run_int8<8>(from, place, to);
          break;
      }
      int32_t sum = 0;
      for (int64_t j = place.begin; j < place.end; ++j) sum += from[j];
      int32_t& total = call.sums[r * call.spans + run.span];
      total = run.opens ? sum : total + sum;
    }
  }
}

// panels of columns times parts of rows, the parts of one panel behind each other
void lowbit_multiply(const LowbitCall& call, int64_t parts, char* memory, int64_t begin, int64_t end) {
  const Room room(memory, call.groups);
  switch (call.codes.bits) {
    case 4:
      if (call.zero.data == nullptr) {
        multiply_parts<4, true>(call, parts, room, begin, end);
      } else {
        multiply_parts<4, false>(call, parts, room, begin, end);
      }
      break;
    case 6:
      multiply_parts<6, false>(call, parts, room, begin, end);
      break;
    default:
      multiply_parts<8, false>(call, parts, room, begin, end);
      break;
  }
}

void lowbit_multiply_int8(const LowbitCall& call, int64_t parts, char* memory, int64_t begin, int64_t end) {
  const Room room(memory, call.groups);
  switch (call.codes.bits) {
    case 4:
      multiply_parts_int8<4>(call, parts, room, begin, end);
      break;
    case 6:
      multiply_parts_int8<6>(call, parts, room, begin, end);
      break;
    default:
      multiply_parts_int8<8>(call, parts, room, begin, end);
      break;
  }
}

void lowbit_room_bytes(int64_t groups, int64_t* bytes) { *bytes = Room::bytes(groups); }

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(lowbit_unpack_rows)
TILEFUSE_DISPATCH(lowbit_unpack_rows_int8)
TILEFUSE_DISPATCH(lowbit_multiply)
TILEFUSE_DISPATCH(lowbit_multiply_int8)
TILEFUSE_DISPATCH(lowbit_room_bytes)

namespace {

// the runs of all groups, with spans of at most `span_units`
std::vector<CodeRun> runs_of(LowbitCall& call, int64_t span_units) {
  std::vector<CodeRun> runs;
  const int64_t line = line_units(call.codes.bits);
  for (int64_t group = 0; group < call.groups; ++group) {
    const int64_t from = group * call.group, to = from + call.group < call.k ? from + call.group : call.k;
    const int64_t first = from / kUnit, last = (to + kUnit - 1) / kUnit;
    for (int64_t u = first; u < last;) {
      const int64_t span_end = u + span_units - (u - first) % span_units;
      int64_t end = u + kRunUnits;
      for (const int64_t limit : {(u / line + 1) * line, span_end, last}) end = limit < end ? limit : end;
      CodeRun run{};
      run.group = group;
      run.line = u / line;
      run.unit = u % line;
      run.units = end - u;
      run.start = call.depth;
      run.span = call.spans;
      run.opens_line = runs.empty() || runs.back().line != run.line;
      run.opens = (u - first) % span_units == 0;
      run.closes = end == span_end || end == last;
      run.closes_group = end == last;
      runs.push_back(run);
      call.depth += run.units * kUnit;
      call.spans += run.closes ? 1 : 0;
      u = end;
    }
  }
  return runs;
}

GroupValues group_values_of(const Tensor& values) {
  const bool bytes = values.element_size() == 1;
  return {values.const_data_ptr(), bytes ? Dtype::f32 : dtype_of(values), bytes, stride_or_zero(values, 0)};
}

LowbitCall call_of(const Tensor& x, const Tensor& q, const Tensor& scale, const OptionalTensor& zero,
                   const OptionalTensor& bias, int64_t bits, int64_t group_size, Tensor& out) {
  LowbitCall call{};
  const bool is_signed = q.scalar_type() == ScalarType::Char;
  call.codes = {static_cast<const uint8_t*>(q.const_data_ptr()),
                q.size(0),
                stride_or_zero(q, 0),
                q.size(1),
                static_cast<int32_t>(bits),
                is_signed};
  call.scale = group_values_of(scale);
  if (zero) call.zero = group_values_of(*zero);
  call.middle = is_signed ? 0 : 1 << (bits - 1);
  call.bias = pointer<const float>(bias);
  call.out = out.mutable_data_ptr();
  call.out_dtype = dtype_of(out);
  call.x = x.const_data_ptr();
  call.k = x.size(1);
  call.x_stride = stride_or_zero(x, 0);
  call.groups = scale.size(1);
  call.group = group_size == 0 ? call.k : group_size;
  return call;
}

// `bytes`: of one operand
LaneSizes sizes_of(const LowbitCall& call, int64_t m, int64_t bytes) {
  LaneSizes sizes{m, call.codes.n, call.k, call.depth, bytes, call.spans, 0};
  lowbit_room_bytes(call.groups, &sizes.room);
  return sizes;
}

Tensor lowbit_matmul(const Tensor& x, const Tensor& q, const Tensor& scale, const OptionalTensor& zero,
                     const OptionalTensor& bias, int64_t bits, int64_t group_size, ScalarType out_dtype) {
  Tensor out = empty_of(x, {x.size(0), q.size(0)}, out_dtype);
  prefer_huge_pages(out);
  if (x.size(0) == 0 || q.size(0) == 0) return out;
  LowbitCall call = call_of(x, q, scale, zero, bias, bits, group_size, out);
  call.x_dtype = dtype_of(x);
  // float sums of a group are one
  const std::vector<CodeRun> runs = runs_of(call, int64_t{1} << 60);
  call.runs = runs.data();
  call.count = static_cast<int64_t>(runs.size());
  multiply_rows(call, sizes_of(call, x.size(0), sizeof(float)), lowbit_unpack_rows, lowbit_multiply);
  return out;
}

Tensor lowbit_matmul_int8(const Tensor& x, const Tensor& x_scale, const Tensor& q, const Tensor& scale,
                          const OptionalTensor& zero, const OptionalTensor& bias, int64_t bits, int64_t group_size,
                          ScalarType out_dtype) {
  Tensor out = empty_of(x, {x.size(0), q.size(0)}, out_dtype);
  prefer_huge_pages(out);
  if (x.size(0) == 0 || q.size(0) == 0) return out;
  LowbitCall call = call_of(x, q, scale, zero, bias, bits, group_size, out);
  call.x_scale = pointer<const float>(x_scale);
  call.x_scale_stride = stride_or_zero(x_scale, 0);
  const std::vector<CodeRun> runs = runs_of(call, kSpan / kUnit);
  call.runs = runs.data();
  call.count = static_cast<int64_t>(runs.size());
  multiply_rows(call, sizes_of(call, x.size(0), sizeof(int16_t)), lowbit_unpack_rows_int8, lowbit_multiply_int8);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("lowbit_matmul_fwd", TORCH_BOX(&lowbit_matmul));
  m.impl("lowbit_matmul_int8", TORCH_BOX(&lowbit_matmul_int8));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
