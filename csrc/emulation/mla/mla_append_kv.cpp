// The cache writer's kernel on the CPU, for tests.
#include "emulation/binding.h"  // first

#include "mla/mla_append_kv.cuh"

using namespace tilefuse;

namespace {

template <typename T, typename W>
void run(mla::MlaAppendKvCall call, bool fp8) {
  mla::choose_vectors(call, sizeof(T), sizeof(W));
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.tokens, mla::kTokensPerBlock)));
  const dim3 block(32, mla::kTokensPerBlock);
  emulation::launch(grid, block, 0, [&] {
    if (fp8) {
      mla::append_kernel<T, W, true>(call);
    } else {
      mla::append_kernel<T, W, false>(call);
    }
  });
}

template <typename T>
void run_weight(const mla::MlaAppendKvCall& call, bool same, bool fp8) {
  if (same) {
    run<T, T>(call, fp8);
  } else {
    run<T, float>(call, fp8);
  }
}

}  // namespace

TILEFUSE_EMULATION(m) {
  // addresses: kv_a, weight, cos, sin, positions, slots, cache; sizes: the integers of MlaAppendKvCall in their order
  m.def("append",
        [](const std::string& dtype, bool same_weight, bool fp8, const std::vector<uintptr_t>& addresses,
           const std::vector<int64_t>& sizes, float eps, bool interleaved, bool positions_wide, bool slots_wide) {
          mla::MlaAppendKvCall call{};
          call.kv_a = emulation::pointer<void>(addresses[0]);
          call.weight = emulation::pointer<void>(addresses[1]);
          call.cos = emulation::pointer<float>(addresses[2]);
          call.sin = emulation::pointer<float>(addresses[3]);
          call.positions = {emulation::pointer<const void>(addresses[4]), positions_wide};
          call.slots = {emulation::pointer<const void>(addresses[5]), slots_wide};
          call.cache = emulation::pointer<uint8_t>(addresses[6]);
          call.kv_stride = sizes[0];
          call.cos_stride = sizes[1];
          call.sin_stride = sizes[2];
          call.page_stride = sizes[3];
          call.row_stride = sizes[4];
          call.pages = sizes[5];
          call.page_size = sizes[6];
          call.table_rows = sizes[7];
          call.tokens = sizes[8];
          call.rank = static_cast<int>(sizes[9]);
          call.half = static_cast<int>(sizes[10]);
          call.eps = eps;
          call.interleaved = interleaved;
          if (dtype == "bfloat16") run_weight<bf16>(call, same_weight, fp8);
          if (dtype == "float16") run_weight<f16>(call, same_weight, fp8);
          if (dtype == "float32") run_weight<float>(call, same_weight, fp8);
        });
}
