// fp8_grouped_matmul on the CPU: the rows of each expert are a segment of the dense matmul.
#include "common/panel_matmul.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {
namespace {

Tensor grouped_matmul(const Tensor& a, const OptionalTensor& a_scale, const Tensor& b, const Tensor& b_scale,
                      const Tensor& offsets, ScalarType out_dtype) {
  const int64_t m = a.size(0), n = b.size(1), groups = b.size(0);
  Tensor out = empty_of(a, {m, n}, out_dtype);
  prefer_huge_pages(out);
  const Index bounds = index_of(offsets);
  // clamped and made ascending: no bound can lead out of memory
  const auto bound = [&](int64_t i, int64_t least) {
    const int64_t value = bounds[i] < m ? bounds[i] : m;
    return value > least ? value : least;
  };
  std::vector<Segment> segments;
  int64_t begin = bound(0, 0);
  const int64_t first = begin;
  for (int64_t e = 0; e < groups; ++e) {
    const int64_t end = bound(e + 1, begin);
    if (end > begin) segments.push_back({e, begin, end});
    begin = end;
  }
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = n * (dtype_of(out) == Dtype::f32 ? 4 : 2);
  if (row_bytes > 0) {
    std::memset(data, 0, static_cast<size_t>(first * row_bytes));
    std::memset(data + begin * row_bytes, 0, static_cast<size_t>((m - begin) * row_bytes));
  }
  PanelProduct product{};
  product.weight = panel_weight(b, b_scale, 3, a.size(1));
  product.rows = panel_rows(a, a_scale);
  panel_matmul(product, segments, std::nullopt, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("fp8_grouped_matmul_fwd", TORCH_BOX(&grouped_matmul)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
