// build-flags: -ffp-contract=fast
// The products of common/panel_matmul.h. Values of both operands are exact in bfloat16 and their products exact in
// float32, so contraction changes no bit of a product.
#include "common/panel_matmul.h"

#include "common/panel_operands_cpu.h"
#if defined(TILEFUSE_PAIRS)
#include "common/panel_pairs_cpu.h"
#else
#include "common/panel_floats_cpu.h"
#endif

namespace tilefuse {

struct PanelStore {
  char* out;
  Dtype dtype;
  const void* bias;  // [G, N] or nullptr
  Dtype bias_dtype;
};

namespace TILEFUSE_ISA {

namespace {

template <int R>
struct Rows {
  static constexpr int kCount = R;
};

// calls body with a number of rows, at most kTileRows, as a type
template <typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  switch (rows) {
    case 1:
      return body(Rows<1>{});
    case 2:
      return body(Rows<2>{});
    case 3:
      return body(Rows<3>{});
    case 4:
      return body(Rows<4>{});
    case 5:
      return body(Rows<5>{});
    default:
      return body(Rows<kTileRows>{});
  }
}

// whether columns [n, n + 64) are strips of a packed weight
inline bool whole_strips(const PanelWeight& w, int64_t n) {
  const int64_t packed = w.n / kStripWidth * kStripWidth;
  return w.form == WeightForm::packed && n % kStripWidth == 0 && n + kPanelWidth <= packed;
}

// columns [n, n + 64) of a packed weight from `start` of K on: in place where strips are what a panel has, else in
// `room`
template <typename T>
Panel packed_panel(const PanelWeight& w, const T* data, int64_t n, int64_t start, int64_t depth, Operand* room) {
  const int64_t pairs = (depth + 1) / 2, stride = kStripWidth * w.stride;
  const int64_t there = n % kStripWidth == 0 ? (w.n - n) / kStripWidth : 0;
  const int64_t strips = there < kStrips ? there : kStrips;
  const T* first = data + n * w.stride + start * kStripWidth;
  if (strips == kStrips && in_place(first) != nullptr) return {in_place(first), stride};
  if (strips > 0) unpack_strips(first, stride, strips, pairs, room);
  for (int64_t c = strips * kStripWidth; c < kPanelWidth; ++c) {
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      const bool inside = n + c < w.n && k < depth;
      place(room, c, k, inside ? operand_of(packed_element(data, w.n, w.stride, n + c, start + k)) : Operand{0});
    }
  }
  return {room, kStrip};
}

template <typename T>
Panel panel_of(const PanelWeight& w, const T* data, int64_t n, int64_t start, int64_t depth, Operand* room) {
  switch (w.form) {
    case WeightForm::rows:
      panel_of_rows(data + n * w.stride + start, w.stride, w.n - n, depth, room);
      return {room, kStrip};
    case WeightForm::columns:
      panel_of_columns(data + start * w.stride + n, w.stride, w.n - n, depth, room);
      return {room, kStrip};
    default:
      return packed_panel(w, data, n, start, depth, room);
  }
}

// what is multiplied after the panel at (n, start): lines for `tiles` tiles of rows to ask for between them
template <typename T>
Ahead ahead_of(const PanelWeight& w, const T* data, int64_t n, int64_t start, int64_t tiles) {
  start += kPanelDepth;
  if (start >= w.k) {
    start = 0;
    n += kPanelWidth;
  }
  Ahead ahead{};
  if (start + kPanelDepth > w.k || n + kPanelWidth > w.n || w.form == WeightForm::columns) return ahead;
  constexpr int64_t kSize = sizeof(T);
  if (w.form == WeightForm::packed) {
    ahead = {reinterpret_cast<const char*>(data + n * w.stride + start * kStripWidth), 32 * kSize,
             kStripWidth * w.stride * kSize, 0, static_cast<int>(kStrips)};
  } else {
    ahead = {reinterpret_cast<const char*>(data + n * w.stride + start), w.stride * kSize, 64, 0,
             static_cast<int>(kPanelDepth * kSize / 64)};
  }
  ahead.share = static_cast<int>((ahead.count + tiles - 1) / tiles);
  return ahead;
}

template <bool kScaled, typename T>
void product_of(const PanelProduct& product, const Segment& part, int64_t n, float* c) {
  const PanelWeight& w = product.weight;
  const PanelRows& rows = product.rows;
  const T* data = static_cast<const T*>(w.data) + part.group * w.group;
  const ColumnScales scales{w, part.group, n};
  const int64_t k = w.k, count = part.end - part.begin, first = part.begin - rows.first;
  const Operand* a = static_cast<const Operand*>(rows.operands) + first * kPanelDepth;
#if defined(TILEFUSE_PAIRS)
  if (count <= kTileRows && w.form == WeightForm::rows) {
    const FewRows few{a, rows.scales + first, rows.rows * kPanelDepth, rows.rows};
    const int64_t columns = w.n - n < kPanelWidth ? w.n - n : kPanelWidth;
    return with_rows(count, [&](auto r) {
      multiply_rows<decltype(r)::kCount>(data + n * w.stride, w.stride, columns, k, few, scales, c);
    });
  }
#endif
  alignas(64) Operand room[kPanelDepth * kPanelWidth];
  alignas(64) float scale_b[kPanelWidth];
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  std::memset(c, 0, static_cast<size_t>(count * kPanelWidth) * sizeof(float));
  for (int64_t start = 0, block = 0; start < k; start += kPanelDepth, ++block) {
    const int64_t depth = k - start < kPanelDepth ? k - start : kPanelDepth;
#if defined(TILEFUSE_PAIRS)
    const bool unpacks = sizeof(T) == 1 && whole_strips(w, n);
#else
    constexpr bool unpacks = false;
#endif
    const Strips strips{unpacks ? Panel{room, kStrip} : panel_of(w, data, n, start, depth, room)};
    if (kScaled) scales.load(block, 0, kPanelWidth, scale_b);
    Ahead ahead = ahead_of(w, data, n, start, tiles);
    for (int64_t tile = 0, r = 0; tile < tiles; ++tile) {
      // tiles of equal height
      const int64_t height = (count - r + tiles - tile - 1) / (tiles - tile);
      const int64_t at = block * rows.rows + r;
      const auto add = [&](const auto& columns) {
        with_rows(height, [&](auto tile_rows) {
          multiply<decltype(tile_rows)::kCount, kScaled>(a + at * kPanelDepth, columns, (depth + 1) / 2,
                                                         rows.scales + first + at, scale_b, c + r * kPanelWidth, ahead);
        });
      };
#if defined(TILEFUSE_PAIRS)
      if constexpr (sizeof(T) == 1) {
        const uint8_t* codes = data + n * w.stride + start * kStripWidth;
        unpacks&& tile == 0 ? add(CodeStrips{codes, kStripWidth * w.stride, room, CodePairs{}}) : add(strips);
      } else {
        add(strips);
      }
#else
      add(strips);
#endif
      r += height;
      ahead.data += ahead.share * ahead.line;
      ahead.count -= ahead.share;
      if (ahead.count < ahead.share) ahead.share = ahead.count > 0 ? ahead.count : 0;
    }
  }
}

template <bool kScaled, typename T>
void products_of(const PanelProduct& product, const Segment& part, int64_t n, int64_t m, float* c, float* d) {
  const PanelWeight& w = product.weight;
  const PanelRows& rows = product.rows;
  const int64_t count = part.end - part.begin, first = part.begin - rows.first;
  if constexpr (kFewRows<T> > 0) {
    if (count <= kFewRows<T> && whole_strips(w, n) && whole_strips(w, m)) {
      const T* data = static_cast<const T*>(w.data) + part.group * w.group;
      const Operand* a = static_cast<const Operand*>(rows.operands) + first * kPanelDepth;
      const FewRows few{a, rows.scales + first, rows.rows * kPanelDepth, rows.rows};
      return with_rows(count, [&](auto r) {
        // more rows than kFewRows are never asked for
        constexpr int kCount = decltype(r)::kCount < kFewRows<T> ? decltype(r)::kCount : kFewRows<T>;
        multiply_strips<kCount>(data + n * w.stride, data + m * w.stride, kStripWidth * w.stride, w.k, few,
                                ColumnScales{w, part.group, n}, ColumnScales{w, part.group, m}, c, d);
      });
    }
  }
  product_of<kScaled, T>(product, part, n, c);
  if (m < w.n) product_of<kScaled, T>(product, part, m, d);
}

template <typename T, typename Bias>
void store(const float* c, int64_t rows, int64_t columns, const Bias* bias, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, c += kPanelWidth, out += out_stride) {
    if (bias == nullptr) {
      for (int64_t n = 0; n < columns; ++n) out[n] = from_float<T>(c[n]);
    } else {
      for (int64_t n = 0; n < columns; ++n) out[n] = from_float<T>(c[n] + to_float(bias[n]));
    }
  }
}

template <typename T>
void unpack_rows(const PanelRows& rows, int64_t k, int64_t begin, int64_t end) {
  Operand* operands = static_cast<Operand*>(rows.operands);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = source_row(rows.source, rows.first + r);
    const T* from = static_cast<const T*>(rows.source.data) + at * rows.source.stride;
    for (int64_t start = 0, block = 0; start < k; start += kPanelDepth, ++block) {
      const int64_t to = block * rows.rows + r;
      if (at < 0) {
        std::memset(operands + to * kPanelDepth, 0, kPanelDepth * sizeof(Operand));
      } else {
        operands_of(from + start, k - start < kPanelDepth ? k - start : kPanelDepth, operands + to * kPanelDepth);
      }
      if (rows.scales != nullptr) {
        const bool own = rows.scale != nullptr && at >= 0;
        rows.scales[to] = own ? rows.scale[at * rows.scale_row + block * rows.scale_block] : 1.0f;
      }
    }
  }
}

}  // namespace

void panel_products(const PanelProduct& product, const Segment& part, int64_t n, int64_t m, float* c, float* d) {
  product.weight.codes ? products_of<true, uint8_t>(product, part, n, m, c, d)
                       : products_of<false, bf16>(product, part, n, m, c, d);
}

void panel_operand_bytes(int64_t* bytes) { *bytes = sizeof(Operand); }

// rows [begin, end) of those that are unpacked
void panel_unpack(const PanelRows& rows, int64_t k, int64_t begin, int64_t end) {
  rows.codes ? unpack_rows<uint8_t>(rows, k, begin, end) : unpack_rows<bf16>(rows, k, begin, end);
}

// the panels of a range of work, stored as rows of the output; c: two panels of a part's rows
void panel_store(const PanelProduct& product, const PanelStore& store_to, float* c, int64_t begin, int64_t end) {
  const int64_t n_all = product.weight.n;
  for_items(product, begin, end, [&](const Segment& part, int64_t item) {
    const int64_t first = item * 2 * kPanelWidth;
    float* halves[2] = {c, c + kPartRows * kPanelWidth};
    panel_products(product, part, first, first + kPanelWidth, halves[0], halves[1]);
    for (int half = 0; half < 2; ++half) {
      const int64_t n = first + half * kPanelWidth, columns = n_all - n < kPanelWidth ? n_all - n : kPanelWidth;
      if (columns <= 0) break;
      TILEFUSE_BY_DTYPE(store_to.dtype, T, {
        T* out = reinterpret_cast<T*>(store_to.out) + part.begin * n_all + n;
        TILEFUSE_BY_DTYPE(store_to.bias_dtype, Bias, {
          const Bias* bias = static_cast<const Bias*>(store_to.bias);
          if (bias != nullptr) bias += part.group * n_all + n;
          store(halves[half], part.end - part.begin, columns, bias, out, n_all);
        })
      })
    }
  });
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(panel_operand_bytes)
TILEFUSE_DISPATCH(panel_unpack)
TILEFUSE_DISPATCH(panel_store)

namespace {

constexpr int64_t kUnpackedRows = 2048;  // rows unpacked at a time

// rows per task of a parallel loop: about 32768 elements
int64_t unpack_grain(int64_t k) { return 1 + 32768 / (k + 1); }

}  // namespace

PanelRows panel_rows(const SourceRows& source) {
  PanelRows rows{};
  rows.source = source;
  return rows;
}

PanelRows panel_rows(const Tensor& a, const OptionalTensor& a_scale) {
  const SourceRows source{a.const_data_ptr(), a.size(0), stride_or_zero(a, 0), {}, 1};
  if (!a_scale) return panel_rows(source);
  PanelRows rows{};
  rows.source = source;
  rows.codes = true;
  rows.scale = pointer<const float>(*a_scale);
  rows.scale_row = stride_or_zero(*a_scale, 0);
  rows.scale_block = stride_or_zero(*a_scale, 1);
  return rows;
}

PanelWeight panel_weight(const Tensor& b, const OptionalTensor& b_scale, int64_t dims, int64_t k) {
  const int64_t lead = dims - 2;
  PanelWeight w{};
  w.data = b.const_data_ptr();
  w.codes = b.element_size() == 1;
  w.n = b.size(lead);
  w.k = k;
  w.group = lead > 0 ? stride_or_zero(b, 0) : 0;
  if (b.dim() > dims) {
    w.form = WeightForm::packed;
    w.stride = b.size(lead + 1) * 2;
  } else if (b.stride(lead + 1) == 1 || b.size(lead + 1) <= 1) {
    w.form = WeightForm::rows;
    w.stride = stride_or_zero(b, lead);
  } else {
    w.form = WeightForm::columns;
    w.stride = b.stride(lead + 1);
  }
  if (b_scale) {
    w.scale = pointer<const float>(*b_scale);
    w.scale_group = lead > 0 ? stride_or_zero(*b_scale, 0) : 0;
    w.scale_row = stride_or_zero(*b_scale, lead);
    w.scale_block = stride_or_zero(*b_scale, lead + 1);
    w.scale_rows = b_scale->size(lead) == w.n ? 1 : kPanelDepth;
  }
  return w;
}

void panel_matmul(PanelProduct product, const std::vector<Segment>& segments,
                  const std::function<void(const PanelProduct&, int64_t)>& run) {
  if (segments.empty() || product.weight.n == 0) return;
  const int64_t k = product.weight.k, blocks = panel_blocks(k), last = segments.back().end;
  PanelRows& rows = product.rows;
  int64_t bytes = 0;
  panel_operand_bytes(&bytes);
  rows.first = segments.front().begin;
  const int64_t most = last - rows.first < kUnpackedRows ? last - rows.first : kUnpackedRows;
  const int64_t room = most * blocks * kPanelDepth * bytes + 64;
  const std::unique_ptr<char[]> operands(new char[static_cast<size_t>(room)]);
  prefer_huge_pages(operands.get(), room);
  const std::unique_ptr<float[]> scales(new float[static_cast<size_t>(most * blocks + 1)]);
  // aligned to a cache line
  rows.operands = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(operands.get()) + 63) / 64 * 64);
  rows.scales = product.weight.codes ? scales.get() : nullptr;
  if (product.items == 0) product.items = (product.weight.n + 2 * kPanelWidth - 1) / (2 * kPanelWidth);
  for (; rows.first < last; rows.first += kUnpackedRows) {
    const int64_t stop = last - rows.first < kUnpackedRows ? last : rows.first + kUnpackedRows;
    rows.rows = stop - rows.first;
    run_parallel(panel_unpack, rows.rows, unpack_grain(k), rows, k);
    std::vector<Segment> parts;
    std::vector<int64_t> starts;
    int64_t units = 0;
    for (const Segment& s : segments) {
      const int64_t begin = s.begin > rows.first ? s.begin : rows.first, end = s.end < stop ? s.end : stop;
      for (int64_t r = begin; r < end; r += kPartRows) {
        parts.push_back({s.group, r, end - r < kPartRows ? end : r + kPartRows});
        starts.push_back(units);
        units += product.items * item_units(parts.back());
      }
    }
    product.parts = parts.data();
    product.starts = starts.data();
    product.count = static_cast<int64_t>(parts.size());
    run(product, units);
  }
}

void panel_matmul(const PanelProduct& product, const std::vector<Segment>& segments, const OptionalTensor& bias,
                  Tensor& out) {
  const PanelStore store_to{pointer<char>(out), dtype_of(out), pointer<const void>(bias),
                            bias ? dtype_of(*bias) : Dtype::f32};
  panel_matmul(product, segments, [&](const PanelProduct& chunk, int64_t units) {
    run_parallel(panel_store, units, 64, chunk, store_to, RangeScratch<float>{2 * kPartRows * kPanelWidth});
  });
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
