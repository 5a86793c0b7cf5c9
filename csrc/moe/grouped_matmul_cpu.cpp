// grouped_matmul on the CPU: dot products on AVX512-BF16, PyTorch's matmul elsewhere.
#include "moe/dot_cpu.h"

namespace tilefuse {

struct GroupedMatmulCall {
  SourceRows a;
  const void* b;
  int64_t b_expert, b_row;  // strides
  const void* bias;         // [E, N] or nullptr
  void* out;
  bool out_f32;
  int64_t n, k;
};

namespace TILEFUSE_ISA {

void grouped_dot([[maybe_unused]] const GroupedMatmulCall& call, [[maybe_unused]] const GroupTile* tiles,
                 [[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) {
#if defined(TILEFUSE_MOE_DOT)
  PackedRows packed = packed_rows(call.k);
  alignas(64) float product[kTileRows * kPanelCols];
  DotState states[kDotStates];
  for (int64_t t = begin; t < end; ++t) {
    const GroupTile& tile = tiles[t];
    const int64_t count = tile.row_end - tile.row_begin;
    pack(packed, call.a, tile, call.k);
    const bf16* w = static_cast<const bf16*>(call.b) + tile.expert * call.b_expert;
    const bf16* bias = call.bias == nullptr ? nullptr : static_cast<const bf16*>(call.bias) + tile.expert * call.n;
    for (int64_t first = tile.n_begin; first < tile.n_end; first += kPanelCols) {
      const int64_t width = tile.n_end - first < kPanelCols ? tile.n_end - first : kPanelCols;
      if (!call.out_f32)
        fetch_rows(static_cast<const bf16*>(call.out) + tile.row_begin * call.n + first, call.n, count);
      for (int64_t n = first; n < first + width; n += kDotCols) {
        const bf16 *columns[kDotCols], *next[kDotCols];
        weight_rows(w, call.b_row, n, tile.n_end, columns);
        weight_rows(w, call.b_row, n + 2 * kDotCols <= tile.n_end ? n + kDotCols : n, tile.n_end, next);
        dot_panel(packed.data, count, columns, next, call.k, states, product + (n - first));
      }
      if (bias != nullptr) add_bias(product, count, width, bias + first);
      for (int64_t r = 0; r < count; ++r) {
        const float* row = product + r * kPanelCols;
        const int64_t at = (tile.row_begin + r) * call.n + first;
        if (call.out_f32) {
          std::memcpy(static_cast<float*>(call.out) + at, row, static_cast<size_t>(width) * sizeof(float));
        } else {
          store_panel_row(row, width, static_cast<bf16*>(call.out) + at);
        }
      }
    }
  }
  std::free(packed.data);
#endif
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#include "moe/grouped_cpu_host.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

TILEFUSE_DISPATCH(grouped_dot)

namespace {

Tensor matmul_fwd(Tensor a, Tensor b, Tensor offsets, OptionalTensor a_index, OptionalTensor bias, int64_t index_div,
                  ScalarType out_dtype) {
  const int64_t rows = a_index ? a_index->numel() : a.size(0), n = b.size(1), k = b.size(2);
  Tensor out = torch::stable::new_empty(a, {rows, n}, out_dtype);
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  zero_outside(out, bounds);
  const SourceRows source = rows_of(a, a_index, index_div);
  if (dot_applies(a, b)) {
    const GroupedMatmulCall call{source,
                                 b.const_data_ptr(),
                                 b.stride(0),
                                 stride_or_zero(b, 1),
                                 pointer<const void>(bias),
                                 out.data_ptr(),
                                 out_dtype == ScalarType::Float,
                                 n,
                                 k};
    const std::vector<GroupTile> tiles = tiles_of(bounds, n);
    run_parallel(grouped_dot, static_cast<int64_t>(tiles.size()), 1, call, tiles.data());
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

Tensor matmul_wgrad(Tensor a, Tensor grad, Tensor offsets, OptionalTensor a_index, OptionalTensor grad_index,
                    int64_t index_div, ScalarType out_dtype) {
  const int64_t rows = a_index ? a_index->numel() : a.size(0), experts = offsets.numel() - 1;
  const int64_t n = grad.size(1), k = a.size(1);
  Tensor out = torch::stable::new_empty(a, {experts, n, k}, out_dtype);
  if (n * k == 0) return out;
  const std::vector<int64_t> bounds = bounds_of(offsets, rows);
  int64_t largest = 0;
  for (int64_t e = 0; e < experts; ++e) largest = std::max(largest, bounds[e + 1] - bounds[e]);
  const SourceRows a_rows = rows_of(a, a_index, index_div), grad_rows = rows_of(grad, grad_index, index_div);
  const Tensor a_buffer = torch::stable::new_empty(a, {a_index ? largest : 0, k});
  const Tensor grad_buffer = torch::stable::new_empty(grad, {grad_index ? largest : 0, n});
  const size_t matrix_bytes = static_cast<size_t>(n * k) * static_cast<size_t>(out.element_size());
  for (int64_t e = 0; e < experts; ++e) {
    char* data = static_cast<char*>(out.data_ptr()) + static_cast<size_t>(e) * matrix_bytes;
    if (bounds[e + 1] <= bounds[e]) {
      std::memset(data, 0, matrix_bytes);
      continue;
    }
    Tensor left = torch::stable::transpose(group_rows(grad, grad_rows, bounds[e], bounds[e + 1], grad_buffer), 0, 1);
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
