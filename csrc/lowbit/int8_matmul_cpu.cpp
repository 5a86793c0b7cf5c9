// build-isas: avx512vnni
// int8_matmul on the CPU: exact sums over panels of columns, then the scales of rows and columns.
#include "lowbit/lanes_cpu.h"

namespace tilefuse {

// float32 scales of rows or columns for each group; a stride of 0 where all groups share one
struct IntegerScales {
  const float* data;
  int64_t stride, group;
};

struct Int8MatmulCall {
  const void* a;  // [M, K] int8, or uint8 with zeros
  const uint8_t* a_zero;
  const int8_t* b;  // [N, K]
  const float* bias;
  void* out;  // [M, N]
  Dtype out_dtype;
  int64_t n, a_stride, zero_stride, b_stride;
  IntegerScales a_scale, b_scale;
  // of K, a group padded to 4, and how many spans a group has
  int64_t groups, group, padded, spans;
  // rows [first, first + rows) as operands [rows][groups][padded] of int8 or int16; where weights are made unsigned,
  // the sums of a row's operands [rows][groups][spans]
  int64_t first, rows;
  void* operands;
  int32_t* sums;
};

namespace TILEFUSE_ISA {
namespace {

constexpr int kStep = kLanes * kPack;  // of K: what one vector holds of a column
constexpr int64_t kStripLanes = kDepth / kPack * kLanes;
constexpr int64_t kPanelLanes = kStripLanes * (kPanelColumns / kLanes);

// kStep codes of a column as a panel holds them: plus 128 where weights are unsigned
TILEFUSE_INLINE Lanes weight_codes(const int8_t* p) {
#if defined(__AVX512VNNI__)
  return (Lanes)_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
#elif defined(__AVX512BW__)
  return (Lanes)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Lanes)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  alignas(16) int16_t wide[kStep];
  for (int i = 0; i < kStep; ++i) wide[i] = p[i];
  return load_lanes(reinterpret_cast<const uint32_t*>(wide));
#endif
}

TILEFUSE_INLINE Lanes last_codes(const int8_t* p, int64_t count) {
  int8_t rest[kStep] = {};
  std::memcpy(rest, p, static_cast<size_t>(count));
  return weight_codes(rest);
}

// `depth` of K from k on of columns [n, n + 64) as [64 / kLanes][kDepth / kPack][kLanes]. Columns past the last repeat
// it; K is padded with what meets zeros.
void unpack_panel(const Int8MatmulCall& call, int64_t n, int64_t k, int64_t depth, uint32_t* panel) {
  for (int64_t first = n; first < n + kPanelColumns && first < call.n; first += kLanes, panel += kStripLanes) {
    const int8_t* columns[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      columns[i] = call.b + (first + i < call.n ? first + i : call.n - 1) * call.b_stride + k;
    }
    for (int64_t j = 0; j < depth; j += kStep) {
      Lanes v[kLanes];
      if (depth - j >= kStep) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          v[i] = weight_codes(columns[i] + j);
          // a line of the next panel, or of memory that need not be mapped: a hint
          __builtin_prefetch(columns[i] + j + kDepth, 0, 2);
        }
      } else {
        for (int i = 0; i < kLanes; ++i) v[i] = last_codes(columns[i] + j, depth - j);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_lanes(panel + (j / kPack + i) * kLanes, v[i]);
    }
  }
}

// sums [count][64] += rows times a panel
void multiply_panel(const Word* rows, int64_t stride, int64_t count, const uint32_t* panel, int64_t words, bool first,
                    uint32_t* sums) {
  for_tiles(count, [&](int64_t r, auto height) {
    multiply_tile<decltype(height)::kCount>(rows + r * stride, stride, panel, kStripLanes, kLanes, words, first,
                                            sums + r * kPanelColumns);
  });
}

constexpr int64_t kFewRows = 4;  // that need no panel

TILEFUSE_INLINE uint32_t sum_of_lanes(Lanes v) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// The same for R rows, `width` operands apart, which stay in the first cache: columns are read in their own order, and
// lanes go along K. Where `column_sums` are asked for, they are sums of the weight's operands.
template <int R>
void multiply_columns(const Int8MatmulCall& call, const IntegerOperand* rows, int64_t width, int64_t n, int64_t k,
                      int64_t depth, uint32_t* sums, uint32_t* column_sums) {
  // columns at a time
  constexpr int kStreams = R > 2 || kLanes < 16 ? 4 : 8;
  const int64_t whole = depth / kStep * kStep;
  // what is left of each row, padded with zeros
  alignas(64) IntegerOperand rest[R][kStep] = {};
  for (int r = 0; r < R; ++r) {
    std::memcpy(rest[r], rows + r * width + whole, static_cast<size_t>(depth - whole) * sizeof(IntegerOperand));
  }
  for (int64_t c = 0; c < kPanelColumns && n + c < call.n; c += kStreams) {
    const int8_t* columns[kStreams];
    for (int i = 0; i < kStreams; ++i) {
      columns[i] = call.b + (n + c + i < call.n ? n + c + i : call.n - 1) * call.b_stride + k;
    }
    Lanes acc[R][kStreams] = {}, own[kStreams] = {};
    const auto add = [&](const Lanes(&weights)[kStreams], const IntegerOperand* from, int64_t stride)
                         __attribute__((always_inline)) {
                           for (int i = 0; i < kStreams && column_sums != nullptr; ++i) {
                             own[i] = accumulate(own[i], weights[i], Lanes{} + 0x01010101u);
                           }
                           for (int r = 0; r < R; ++r) {
                             const Lanes row = load_lanes(reinterpret_cast<const uint32_t*>(from + r * stride));
                             for (int i = 0; i < kStreams; ++i) acc[r][i] = accumulate(acc[r][i], weights[i], row);
                           }
                         };
    for (int64_t j = 0; j < whole; j += kStep) {
      Lanes weights[kStreams];
      for (int i = 0; i < kStreams; ++i) {
        weights[i] = weight_codes(columns[i] + j);
        // of the columns after these: a hint, wherever it points
        __builtin_prefetch(columns[i] + j + kStreams * call.b_stride);
      }
      add(weights, rows + j, width);
    }
    if (whole < depth) {
      Lanes weights[kStreams];
      for (int i = 0; i < kStreams; ++i) weights[i] = last_codes(columns[i] + whole, depth - whole);
      add(weights, rest[0], kStep);
    }
    for (int i = 0; i < kStreams; ++i) {
      for (int r = 0; r < R; ++r) sums[r * kPanelColumns + c + i] = sum_of_lanes(acc[r][i]);
      if (column_sums != nullptr) column_sums[c + i] = sum_of_lanes(own[i]);
    }
  }
}

// what a range of work has for itself
struct Room {
  uint32_t *panel, *sums, *column_sums;
  float *out, *scales;
  int64_t* wide;  // sums of groups that are longer than a span

  static constexpr int64_t kCells = kPartRows * kPanelColumns;
  static constexpr int64_t kBytes = 4 * kPanelLanes + 16 * kCells + 8 * kPanelColumns + 6 * 64;

  explicit Room(char* room)
      : panel(take<uint32_t>(room, kPanelLanes)),
        sums(take<uint32_t>(room, kCells)),
        column_sums(take<uint32_t>(room, kPanelColumns)),
        out(take<float>(room, kCells)),
        scales(take<float>(room, kPanelColumns)),
        wide(take<int64_t>(room, kCells)) {}
};

// Takes off what sums with unsigned weights have too much: 128 for each operand of the row, and the row's zero, of
// which 128 is in its operands already, for each code of the column.
TILEFUSE_INLINE void correct(uint32_t row_sum, uint32_t zero, const uint32_t* column_sums, uint32_t* sums) {
  for (int64_t n = 0; n < kPanelColumns; n += kFloats) {
    Sums& sixteen = *reinterpret_cast<Sums*>(sums + n);
    sixteen -= 128 * row_sum + zero * *reinterpret_cast<const Sums*>(column_sums + n);
  }
}

// room.sums: the exact ones of rows [r, r + count) of those unpacked with columns [n, n + 64), over a span of a group
void add_up(const Int8MatmulCall& call, int64_t r, int64_t count, int64_t n, int64_t group, int64_t span,
            const Room& room) {
  const int64_t start = span * kSpan, width = call.groups * call.padded;
  const int64_t stop = start + kSpan < call.group ? start + kSpan : call.group;
  const IntegerOperand* rows = static_cast<const IntegerOperand*>(call.operands) + r * width + group * call.padded;
  const bool zeros = kUnsignedWeights && call.a_zero != nullptr;
  if (count <= kFewRows) {
    const int64_t depth = stop - start, steps = (depth + kStep - 1) / kStep;
    for_tiles(count, [&](int64_t, auto height) {
      constexpr int R = decltype(height)::kCount <= kFewRows ? decltype(height)::kCount : 1;
      multiply_columns<R>(call, rows + start, width, n, group * call.group + start, depth, room.sums,
                          zeros ? room.column_sums : nullptr);
    });
    for (int64_t i = 0; zeros && i < kPanelColumns; ++i) {
      room.column_sums[i] -= static_cast<uint32_t>(128 * kStep * steps);
    }
  }
  for (int64_t k = start; k < stop && count > kFewRows; k += kDepth) {
    const int64_t depth = stop - k < kDepth ? stop - k : kDepth, words = (depth + kPack - 1) / kPack;
    unpack_panel(call, n, group * call.group + k, depth, room.panel);
    multiply_panel(reinterpret_cast<const Word*>(rows + k), width / kPack, count, room.panel, words, k == start,
                   room.sums);
    if (zeros) {
      Word ones[kDepth / kPack];
      for (int64_t i = 0; i < words; ++i) ones[i] = 0x01010101u;
      multiply_panel(ones, 0, 1, room.panel, words, k == start, room.column_sums);
      for (int64_t i = 0; i < kPanelColumns; ++i) room.column_sums[i] -= static_cast<uint32_t>(128 * kPack * words);
    }
  }
  for (int64_t i = 0; kUnsignedWeights && i < count; ++i) {
    const int32_t zero = zeros ? call.a_zero[(call.first + r + i) * call.zero_stride] - 128 : 0;
    const int32_t row_sum = call.sums[((r + i) * call.groups + group) * call.spans + span];
    correct(static_cast<uint32_t>(row_sum), static_cast<uint32_t>(zero), room.column_sums,
            room.sums + i * kPanelColumns);
  }
}

// room.out: [count][64] in float32, without the bias
void multiply_part(const Int8MatmulCall& call, int64_t r, int64_t count, int64_t n, const Room& room) {
  const int64_t cells = count * kPanelColumns;
  std::memset(room.out, 0, static_cast<size_t>(cells) * sizeof(float));
  for (int64_t group = 0; group < call.groups; ++group) {
    if (call.spans != 1) std::memset(room.wide, 0, static_cast<size_t>(cells) * sizeof(int64_t));
    for (int64_t span = 0; span < call.spans; ++span) {
      add_up(call, r, count, n, group, span, room);
      if (call.spans == 1) break;
      for (int64_t i = 0; i < cells; ++i) room.wide[i] += static_cast<int32_t>(room.sums[i]);
    }
    const float* scales = call.b_scale.data + n * call.b_scale.stride + group * call.b_scale.group;
    for (int64_t i = 0; i < kPanelColumns; ++i) {
      room.scales[i] = n + i < call.n ? scales[i * call.b_scale.stride] : 0.0f;
    }
    scales = call.a_scale.data + (call.first + r) * call.a_scale.stride + group * call.a_scale.group;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * kPanelColumns;
      add_scaled(room.sums + at, call.spans == 1 ? nullptr : room.wide + at, scales[i * call.a_scale.stride],
                 room.scales, room.out + at);
    }
  }
}

// a group of a row, its codes minus `zero`
template <typename Code>
void unpack_group(const Code* from, int64_t count, int64_t padded, int32_t zero, IntegerOperand* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<IntegerOperand>(from[i] - zero);
  for (int64_t i = count; i < padded; ++i) to[i] = 0;
}

}  // namespace

void int8_unpack_rows(const Int8MatmulCall& call, int64_t begin, int64_t end) {
  IntegerOperand* to = static_cast<IntegerOperand*>(call.operands) + begin * call.groups * call.padded;
  int32_t* sums = call.sums + begin * call.groups * call.spans;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = call.first + r;
    // a byte has no room for less
    const int32_t zero = call.a_zero == nullptr ? 0 : kUnsignedWeights ? 128 : call.a_zero[row * call.zero_stride];
    for (int64_t group = 0; group < call.groups; ++group, to += call.padded) {
      const int64_t at = row * call.a_stride + group * call.group;
      if (call.a_zero == nullptr) {
        unpack_group(static_cast<const int8_t*>(call.a) + at, call.group, call.padded, zero, to);
      } else {
        unpack_group(static_cast<const uint8_t*>(call.a) + at, call.group, call.padded, zero, to);
      }
      for (int64_t start = 0; kUnsignedWeights && start < call.group; start += kSpan) {
        const int64_t stop = start + kSpan < call.group ? start + kSpan : call.group;
        int32_t sum = 0;
        for (int64_t i = start; i < stop; ++i) sum += to[i];
        *sums++ = sum;
      }
    }
  }
}

// panels of columns times parts of rows, the parts of one panel behind each other
void int8_multiply(const Int8MatmulCall& call, int64_t parts, char* memory, int64_t begin, int64_t end) {
  const Room room(memory);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / parts * kPanelColumns, r = item % parts * kPartRows;
    const int64_t count = call.rows - r < kPartRows ? call.rows - r : kPartRows;
    const int64_t columns = call.n - n < kPanelColumns ? call.n - n : kPanelColumns;
    multiply_part(call, r, count, n, room);
    const float* bias = call.bias == nullptr ? nullptr : call.bias + n;
    TILEFUSE_BY_DTYPE(call.out_dtype, T, {
      T* out = static_cast<T*>(call.out) + (call.first + r) * call.n + n;
      store_rows(room.out, count, columns, bias, out, call.n);
    })
  }
}

void int8_room_bytes(int64_t* bytes) { *bytes = Room::kBytes; }

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(int8_unpack_rows)
TILEFUSE_DISPATCH(int8_multiply)
TILEFUSE_DISPATCH(int8_room_bytes)

namespace {

int64_t groups_of(const Tensor& scale) { return scale.dim() == 2 ? scale.size(1) : 1; }

// [R] or [R, G]
IntegerScales integer_scales(const Tensor& scale) {
  return {pointer<const float>(scale), stride_or_zero(scale, 0), groups_of(scale) > 1 ? scale.stride(1) : 0};
}

Tensor int8_matmul(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   const OptionalTensor& bias, const OptionalTensor& a_zero, ScalarType out_dtype) {
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  Tensor out = empty_of(a, {m, n}, out_dtype);
  prefer_huge_pages(out);
  if (m == 0 || n == 0) return out;
  Int8MatmulCall call{};
  call.a = a.const_data_ptr();
  call.a_zero = pointer<const uint8_t>(a_zero);
  call.zero_stride = a_zero ? stride_or_zero(*a_zero, 0) : 0;
  call.b = pointer<const int8_t>(b);
  call.bias = pointer<const float>(bias);
  call.out = out.mutable_data_ptr();
  call.out_dtype = dtype_of(out);
  call.n = n;
  call.a_stride = stride_or_zero(a, 0);
  call.b_stride = stride_or_zero(b, 0);
  call.a_scale = integer_scales(a_scale);
  call.b_scale = integer_scales(b_scale);
  call.groups = groups_of(a_scale) == 1 ? groups_of(b_scale) : groups_of(a_scale);
  call.group = call.groups == 0 ? 0 : k / call.groups;
  call.padded = (call.group + 3) / 4 * 4;
  call.spans = (call.group + kSpan - 1) / kSpan;
  LaneSizes sizes{m, n, k, call.groups * call.padded, sizeof(int16_t), call.groups * call.spans, 0};
  int8_room_bytes(&sizes.room);
  multiply_rows(call, sizes, int8_unpack_rows, int8_multiply);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("int8_matmul_fwd", TORCH_BOX(&int8_matmul)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
