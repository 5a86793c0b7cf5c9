// grouped_matmul on the CPU: bfloat16 and e4m3 weights through panels, PyTorch's matmul for the others.
#include "moe/grouped_cpu_host.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

namespace {

Tensor matmul_fwd(Tensor a, Tensor b, Tensor offsets, OptionalTensor a_index, OptionalTensor bias, int64_t index_div,
                  ScalarType out_dtype, OptionalTensor b_scale) {
  const int64_t rows = a_index ? a_index->numel() : a.size(0), n = b.size(1);
  Tensor out = empty_of(a, {rows, n}, out_dtype);
  prefer_huge_pages(out);
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  zero_outside(out, bounds);
  const SourceRows source = rows_of(a, a_index, index_div);
  if (panels_apply(a)) {
    PanelProduct product{};
    product.weight = panel_weight(b, b_scale, 3, a.size(1));
    product.rows = panel_rows(source);
    panel_matmul(product, segments_of(bounds), bias, out);
    return out;
  }
  const size_t row_bytes = static_cast<size_t>(n) * static_cast<size_t>(out.element_size());
  matmul_tiles(a, source, b, bounds, bias, out_dtype, [&](int64_t first, int64_t count, const Tensor& product) {
    std::memcpy(static_cast<char*>(out.data_ptr()) + static_cast<size_t>(first) * row_bytes, product.data_ptr(),
                static_cast<size_t>(count) * row_bytes);
  });
  return out;
}

// the rows of one group side by side: in place where they already are
Tensor group_rows(const Tensor& t, const SourceRows& rows, int64_t begin, int64_t end, const Tensor& buffer) {
  const int64_t width = t.size(1);
  const size_t element = static_cast<size_t>(t.element_size());
  if (rows.index.data == nullptr) {
    char* data = static_cast<char*>(t.data_ptr()) + static_cast<size_t>(begin * rows.stride) * element;
    return blob(data, {end - begin, width}, {rows.stride, 1}, t.scalar_type());
  }
  char* to = static_cast<char*>(buffer.data_ptr());
  copy_rows(rows, begin, end, static_cast<size_t>(width) * element, static_cast<size_t>(rows.stride) * element, to);
  return blob(to, {end - begin, width}, {width, 1}, t.scalar_type());
}

Tensor matmul_wgrad(Tensor a, Tensor dout, Tensor offsets, OptionalTensor a_index, OptionalTensor dout_index,
                    int64_t index_div, ScalarType out_dtype) {
  const int64_t rows = a_index ? a_index->numel() : a.size(0), experts = offsets.numel() - 1;
  const int64_t n = dout.size(1), k = a.size(1);
  Tensor out = empty_of(a, {experts, n, k}, out_dtype);
  if (n * k == 0) return out;
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  int64_t largest = 0;
  for (int64_t e = 0; e < experts; ++e) largest = std::max(largest, bounds[e + 1] - bounds[e]);
  const SourceRows a_rows = rows_of(a, a_index, index_div), dout_rows = rows_of(dout, dout_index, index_div);
  const Tensor a_buffer = empty_of(a, {a_index ? largest : 0, k});
  const Tensor dout_buffer = empty_of(dout, {dout_index ? largest : 0, n});
  const size_t matrix_bytes = static_cast<size_t>(n * k) * static_cast<size_t>(out.element_size());
  for (int64_t e = 0; e < experts; ++e) {
    char* data = static_cast<char*>(out.data_ptr()) + static_cast<size_t>(e) * matrix_bytes;
    if (bounds[e + 1] <= bounds[e]) {
      std::memset(data, 0, matrix_bytes);
      continue;
    }
    Tensor left = torch::stable::transpose(group_rows(dout, dout_rows, bounds[e], bounds[e + 1], dout_buffer), 0, 1);
    Tensor right = group_rows(a, a_rows, bounds[e], bounds[e + 1], a_buffer);
    if (out_dtype != a.scalar_type()) {
      left = torch::stable::to(left, out_dtype);
      right = torch::stable::to(right, out_dtype);
    }
    mm_out(left, right, blob(data, {n, k}, {k, 1}, out_dtype));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("grouped_matmul_fwd", TORCH_BOX(&matmul_fwd));
  m.impl("grouped_matmul_wgrad", TORCH_BOX(&matmul_wgrad));
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
