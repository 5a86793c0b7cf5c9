// Launch and registration of the Hopper FP8 matmul (matmul_sm90.cuh).
// build-archs: 9.0a
#include <cuda.h>

#include <cmath>

#include "common/launch.h"
#include "fp8/matmul_sm90.cuh"

namespace tilefuse::fp8 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// through the runtime, so that the library does not link libcuda and loads on a machine without a driver
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                    "tilefuse.fp8_matmul: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(pointer);
  }();
  return function;
}

CUtensorMap tensor_map(CUtensorMapDataType type, const void* base, uint64_t inner, uint64_t outer, uint64_t row_bytes,
                       uint32_t box_inner, uint32_t box_outer, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {inner, outer};
  const cuuint64_t strides[] = {row_bytes};
  const cuuint32_t box[] = {box_inner, box_outer};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode_tiled()(&map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "tilefuse.fp8_matmul: cuTensorMapEncodeTiled failed with ",
                  static_cast<int>(result));
  return map;
}

struct Fp8MatmulCall {
  const void* a;
  const float* a_scale;
  const void* b;
  const float* b_scale;
  const float* bias;
  void* out;
  int64_t a_stride, b_stride, a_scale_stride;
  MatmulShape shape;
  int multiprocessors;
  cudaStream_t stream;
};

template <typename Out>
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
constexpr CUtensorMapDataType kMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

template <typename Out, int kBlockM, int kBlockN, int kStages, int kCluster, bool kTmaStore>
void launch(const Fp8MatmulCall& matmul) {
  const MatmulShape& shape = matmul.shape;
  const auto map_a = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, matmul.a, shape.k, shape.m, matmul.a_stride, kBlockK,
                                kBlockM, CU_TENSOR_MAP_SWIZZLE_128B);
  const auto map_b = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, matmul.b, shape.k, shape.n, matmul.b_stride, kBlockK,
                                kBlockN / kCluster, CU_TENSOR_MAP_SWIZZLE_128B);
  const auto map_scale =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, matmul.a_scale, shape.m, (shape.k + kBlockK - 1) / kBlockK,
                 matmul.a_scale_stride * 4, kBlockM, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
  CUtensorMap map_out{};
  if constexpr (kTmaStore) {
    map_out = tensor_map(kMapType<Out>, matmul.out, shape.n, shape.m, shape.out_stride * 2, kStoreColumns, 64,
                         CU_TENSOR_MAP_SWIZZLE_64B);
  }

  auto* kernel = matmul_sm90<Out, kBlockM, kBlockN, kStages, kCluster, kTmaStore>;
  // the storage is aligned to 1024 bytes inside the dynamic shared memory
  constexpr int kShared = sizeof(MatmulStorage<kBlockM, kBlockN, kStages>) + 1024;
  static_assert(kShared <= 232448, "more shared memory than a Hopper block can have");
  allow_shared_memory(kernel, kShared);

  const int tiles = ceil_div(shape.m, kBlockM * kCluster) * ceil_div(shape.n, kBlockN);
  const int clusters = std::min(tiles, matmul.multiprocessors / kCluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = matmul.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, map_a, map_b, map_scale, map_out,
                                               static_cast<Out*>(matmul.out), matmul.b_scale, matmul.bias, shape);
  STD_TORCH_CHECK(error == cudaSuccess, "tilefuse.fp8_matmul: CUDA launch failed: ", cudaGetErrorString(error));
}

// tile shapes, in the order of the `tile` argument of fp8_matmul_sm90; the relative costs per output element follow
// from the shared-memory traffic of each (wider tiles read less of the other operand from L2)
struct Tile {
  int m, n, cluster;
  float cost;
};
constexpr Tile kTiles[] = {
    {128, 128, 1, 1.10f}, {128, 128, 2, 1.03f}, {128, 160, 1, 1.04f}, {128, 160, 2, 1.01f}, {256, 128, 1, 1.00f}};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// the tile that finishes in the fewest waves, weighted by what a wave costs
int choose_tile(int64_t m, int64_t n, int multiprocessors) {
  int best = 0;
  float least = INFINITY;
  for (int i = 0; i < kTileCount; ++i) {
    const Tile& tile = kTiles[i];
    const int64_t tiles =
        ceil_div(m, static_cast<int64_t>(tile.m) * tile.cluster) * ceil_div(n, static_cast<int64_t>(tile.n));
    const int64_t waves = ceil_div(tiles, static_cast<int64_t>(multiprocessors / tile.cluster));
    const float cost = static_cast<float>(waves * tile.m * tile.n) * tile.cost;
    if (cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

template <typename Out>
void launch_tile(int tile, const Fp8MatmulCall& matmul) {
  // float32 rows go straight from the accumulators
  constexpr bool kStore = sizeof(Out) == 2;
  switch (tile) {
    case 0:
      return launch<Out, 128, 128, 5, 1, kStore>(matmul);
    case 1:
      return launch<Out, 128, 128, 5, 2, kStore>(matmul);
    case 2:
      return launch<Out, 128, 160, 4, 1, kStore>(matmul);
    case 3:
      return launch<Out, 128, 160, 4, 2, kStore>(matmul);
    default:
      return launch<Out, 256, 128, 3, 1, kStore>(matmul);
  }
}

// `tile` indexes kTiles, -1 chooses; the caller has checked what TMA asks of shapes and strides (ops/fp8/matmul.py)
Tensor matmul_tile(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   const OptionalTensor& bias, ScalarType out_dtype, int64_t tile) {
  STD_TORCH_CHECK(tile >= -1 && tile < kTileCount, "tilefuse.fp8_matmul_sm90: tile must be in [-1, ", kTileCount,
                  "), got ", tile);
  const CudaCall call(a);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(0);
  Tensor out = empty_of(a, {m, n}, out_dtype);
  if (m == 0 || n == 0) return out;

  const int64_t scale_stride = a_scale.size(1) == 1 ? round_up(m, int64_t{4}) : a_scale.stride(1);
  const Fp8MatmulCall matmul{
      a.const_data_ptr(),
      pointer<const float>(a_scale),
      b.const_data_ptr(),
      pointer<const float>(b_scale),
      pointer<const float>(bias),
      out.mutable_data_ptr(),
      a.stride(0),
      b.stride(0),
      scale_stride,
      MatmulShape{static_cast<int32_t>(m), static_cast<int32_t>(n), static_cast<int32_t>(k), n,
                  static_cast<int32_t>(b_scale.stride(0))},
      multiprocessors(call.device),
      call.stream,
  };
  const int chosen = tile >= 0 ? static_cast<int>(tile) : choose_tile(m, n, matmul.multiprocessors);
  if (out_dtype == ScalarType::Float) {
    launch_tile<float>(chosen, matmul);
  } else if (out_dtype == ScalarType::BFloat16) {
    launch_tile<__nv_bfloat16>(chosen, matmul);
  } else {
    launch_tile<__half>(chosen, matmul);
  }
  return out;
}

Tensor matmul(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
              const OptionalTensor& bias, ScalarType out_dtype) {
  return matmul_tile(a, a_scale, b, b_scale, bias, out_dtype, -1);
}

}  // namespace
}  // namespace tilefuse::fp8

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cuda, CUDA, m) {
  m.impl("fp8_matmul_fwd", TORCH_BOX(&tilefuse::fp8::matmul));
  // one tile shape of the above: the tests define this op
  m.impl("fp8_matmul_sm90", TORCH_BOX(&tilefuse::fp8::matmul_tile));
}
