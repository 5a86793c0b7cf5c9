// Matrix products of gathered rows with grouped weights on the CPU: what the kernels and their hosts share.
//
// The weight goes through panels of 128 of K x 64 of N. Every element sums along K in one order, whatever the form in
// which the weight lies, how many rows there are and where tiles end: packed and plain weights give the same bits, and
// a row's result does not depend on the others. Forms of a weight:
//
//   rows      [N, K] with contiguous K, the checkpoint's
//   columns   [N, K] with contiguous N, a transposed view
//   packed    strips of 16 columns, made once by tilefuse.pack_weight; the rows past the last multiple of 16 stay rows.
//             K is padded to a multiple of 4. bfloat16: [N / 16][K / 2][16][2], pairs of K side by side for each
//             column, what one dot-product instruction takes. e4m3: [N / 16][K / 4][4][2][4][2], the 64 codes of four
//             of K in the order in which interleaving bytes gives pairs. tilefuse/packing.py is the other half.
#pragma once

#include "common/cpu.h"
#include "common/rows.h"

#ifdef TILEFUSE_REGISTER
#include <functional>
#endif

namespace tilefuse {

enum class WeightForm : int32_t { rows, columns, packed };

// [G, N, K] bfloat16, or e4m3 codes with scales for `scale_rows` rows and 128 of K
struct PanelWeight {
  const void* data;
  WeightForm form;
  bool codes;
  int64_t group, stride;  // elements from one group to the next, and from one row (or column, or packed row)
  int64_t n, k;
  const float* scale;
  int64_t scale_group, scale_row, scale_block, scale_rows;
};

// rows of an activation, and those of [first, first + rows) as operands: [KB][rows][128], with [KB][rows] scales
struct PanelRows {
  SourceRows source;
  bool codes;          // e4m3; bfloat16 otherwise
  const float* scale;  // [M, KB] of codes
  int64_t scale_row, scale_block;
  int64_t first, rows;
  void* operands;
  float* scales;
};

struct PanelProduct {
  PanelWeight weight;
  PanelRows rows;
  // runs of the unpacked rows; each meets `items` pairs of panels of its weight. starts[i]: units of work before part i
  const Segment* parts;
  const int64_t* starts;
  int64_t count, items;
};

constexpr int64_t kPanelDepth = 128;  // of K: one scale
constexpr int64_t kPanelWidth = 64;   // of N
constexpr int64_t kPartRows = 512;    // rows that share one unpacking of a panel

static inline int64_t panel_blocks(int64_t k) { return (k + kPanelDepth - 1) / kPanelDepth; }

// work of two panels against a part: to read the weight costs what a few rows do
static inline int64_t item_units(const Segment& part) { return part.end - part.begin + 8; }

namespace TILEFUSE_ISA {

// c and d [rows of the part][64]: the part's rows times columns [n, n + 64) and [m, m + 64) of its weight; d is left as
// it is where m is past the last column
void panel_products(const PanelProduct& product, const Segment& part, int64_t n, int64_t m, float* c, float* d);

// calls body(part, item) for the items whose work starts in [begin, end) units
template <typename Body>
static inline void for_items(const PanelProduct& product, int64_t begin, int64_t end, const Body& body) {
  for (int64_t p = 0; p < product.count && product.starts[p] < end; ++p) {
    const int64_t units = item_units(product.parts[p]);
    for (int64_t i = 0, at = product.starts[p]; i < product.items && at < end; ++i, at += units) {
      if (at >= begin) body(product.parts[p], i);
    }
  }
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

// rows of bfloat16
PanelRows panel_rows(const SourceRows& source);

// a [M, K]: e4m3 codes with scales [M, KB], or bfloat16 without
PanelRows panel_rows(const Tensor& a, const OptionalTensor& a_scale);

// b [G, N, K] or [N, K], or a packed weight's data, which has one dim more: [.., N, K / 2, 2]. `k` is the activation's.
PanelWeight panel_weight(const Tensor& b, const OptionalTensor& b_scale, int64_t dims, int64_t k);

// unpacks rows and calls run(product, units) for as many at a time as stay in the caches; `items` covers all of the
// weight unless set
void panel_matmul(PanelProduct product, const std::vector<Segment>& segments,
                  const std::function<void(const PanelProduct&, int64_t)>& run);

// out [M, N] of any float dtype, with an optional bias [G, N]
void panel_matmul(const PanelProduct& product, const std::vector<Segment>& segments, const OptionalTensor& bias,
                  Tensor& out);

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
