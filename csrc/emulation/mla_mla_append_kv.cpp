// The cache writer's kernel on the CPU, for tests.
#include "emulation/binding.h"  // first

#include "mla/mla_append_kv.cuh"

using namespace tilefuse;

namespace {

template <typename T, typename W>
void run(mla::AppendArgs args, bool fp8) {
  mla::choose_vectors(args, sizeof(T), sizeof(W));
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.tokens, mla::kTokensPerBlock)));
  const dim3 block(32, mla::kTokensPerBlock);
  emulation::launch(grid, block, 0, [&] {
    if (fp8) {
      mla::append_kernel<T, W, true>(args);
    } else {
      mla::append_kernel<T, W, false>(args);
    }
  });
}

template <typename T>
void run_weight(const mla::AppendArgs& args, bool same, bool fp8) {
  if (same) {
    run<T, T>(args, fp8);
  } else {
    run<T, float>(args, fp8);
  }
}

}  // namespace

TILEFUSE_EMULATION(m) {
  // addresses: kv_a, weight, cos, sin, positions, slots, cache; sizes: the integers of AppendArgs in their order
  m.def("append", [](const std::string& dtype, bool same_weight, bool fp8, const std::vector<uintptr_t>& addresses,
                     const std::vector<int64_t>& sizes, float eps, bool interleaved, bool positions_wide,
                     bool slots_wide) {
    mla::AppendArgs args{};
    args.kv_a = emulation::pointer<void>(addresses[0]);
    args.weight = emulation::pointer<void>(addresses[1]);
    args.cos = emulation::pointer<float>(addresses[2]);
    args.sin = emulation::pointer<float>(addresses[3]);
    args.positions = emulation::pointer<void>(addresses[4]);
    args.slots = emulation::pointer<void>(addresses[5]);
    args.cache = emulation::pointer<uint8_t>(addresses[6]);
    args.kv_stride = sizes[0];
    args.cos_stride = sizes[1];
    args.sin_stride = sizes[2];
    args.page_stride = sizes[3];
    args.row_stride = sizes[4];
    args.pages = sizes[5];
    args.page_size = sizes[6];
    args.table_rows = sizes[7];
    args.tokens = sizes[8];
    args.rank = static_cast<int>(sizes[9]);
    args.half = static_cast<int>(sizes[10]);
    args.eps = eps;
    args.interleaved = interleaved;
    args.positions_wide = positions_wide;
    args.slots_wide = slots_wide;
    if (dtype == "bfloat16") run_weight<bf16>(args, same_weight, fp8);
    if (dtype == "float16") run_weight<f16>(args, same_weight, fp8);
    if (dtype == "float32") run_weight<float>(args, same_weight, fp8);
  });
}
