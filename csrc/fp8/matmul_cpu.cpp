// fp8_matmul on the CPU: a product over panels, with scales.
#include "common/panel_matmul.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {
namespace {

Tensor matmul(const Tensor& a, const OptionalTensor& a_scale, const Tensor& b, const Tensor& b_scale,
              const OptionalTensor& bias, ScalarType out_dtype) {
  const int64_t m = a.size(0);
  Tensor out = empty_of(a, {m, b.size(0)}, out_dtype);
  prefer_huge_pages(out);
  if (m > 0) {
    PanelProduct product{};
    product.weight = panel_weight(b, b_scale, 2, a.size(1));
    product.rows = panel_rows(a, a_scale);
    panel_matmul(product, {{0, 0, m}}, bias, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("fp8_matmul_fwd", TORCH_BOX(&matmul)); }

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
