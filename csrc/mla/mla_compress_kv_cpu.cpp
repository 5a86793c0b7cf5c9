// Latent rows from the raw down-projection, on the CPU.
#include "mla/latent.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// scratch: R + 2 r floats
void mla_compress_rows(const LatentCall& call, void* out, float* scratch, int64_t begin, int64_t end) {
  const int64_t width = call.rank + 2 * call.half;
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    for (int64_t token = begin; token < end; ++token) {
      latent_row<T>(call, token, scratch, scratch + width);
      store_row<T>(scratch, width, static_cast<T*>(out) + token * width);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_compress_rows, (const LatentCall&, void*, float*, int64_t, int64_t))

static Tensor mla_compress_kv_fwd(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                                  double eps, bool interleaved) {
  const std::vector<float> weights = float_weight(weight);
  const LatentCall call = latent_call(kv_a, weights, cos, sin, positions, eps, interleaved);
  if (call.half > 0) {
    for (int64_t i = 0; positions && i < call.tokens; ++i) {
      const int64_t position = index_data(*positions)[i];
      if (position < 0 || position >= cos.size(0)) {
        throw std::runtime_error("tilefuse.mla_compress_kv: positions must be in [0, " + std::to_string(cos.size(0)) +
                                 "), got " + std::to_string(position));
      }
    }
  }
  Tensor out = empty_contiguous(kv_a);
  const auto kernel = mla_compress_rows_dispatch();
  void* to = out.mutable_data_ptr();
  parallel_for(0, call.tokens, kLatentGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(call.rank + 4 * call.half);
    kernel(call, to, scratch.data(), begin, end);
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tilefuse_cpu, m) {
  m.def(
      "mla_compress_kv_fwd(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor? positions, float eps, "
      "bool interleaved) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("mla_compress_kv_fwd", TORCH_BOX(&mla_compress_kv_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
