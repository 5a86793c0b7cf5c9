// FP8 block-scaled matmul for Hopper: out[M, N] = (a * a_scale) (b * b_scale)^T + bias, e4m3 operands, K contiguous.
//
// One producer warp group feeds a ring of shared-memory stages by TMA; two consumer warp groups multiply with wgmma.
// Hopper's FP8 tensor cores keep about 13 bits of the accumulator, so each 128 of K starts a fresh accumulator that is
// then scaled and added to float32 registers; while one consumer promotes, the other one's products keep the tensor
// cores busy. A stage goes back to the producer before the promotion. The kernel is persistent: a CTA (or a cluster of
// two that shares the tiles of b by multicast) walks the output in groups of rows so that both operands stay in L2.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/tma.cuh"
#include "fp8/wgmma.cuh"

namespace tilefuse::fp8 {

constexpr int kBlockK = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// rows of tiles that are swept together along N
constexpr int kRasterGroup = 8;
// columns of one output store: 64 bytes, in the 64-byte swizzle
constexpr int kStoreColumns = 32;

template <int kBlockM, int kBlockN, int kStages>
struct MatmulStorage {
  static constexpr int kBytesA = kBlockM * kBlockK;
  static constexpr int kBytesB = kBlockN * kBlockK;
  static constexpr int kBytesOut = kBlockM * kBlockN * 2;

  // the tensor copies in the 128-byte swizzle want 1024-byte alignment
  alignas(1024) uint8_t a[kStages][kBytesA];
  alignas(1024) uint8_t b[kStages][kBytesB];
  alignas(1024) uint8_t out[kBytesOut];
  alignas(128) float a_scale[kStages][kBlockM];
  alignas(8) uint64_t full[kStages];
  alignas(8) uint64_t empty[kStages];
};

struct MatmulShape {
  int32_t m, n, k;
  // elements between rows of the output, and between rows of b's scales
  int64_t out_stride;
  int32_t b_scale_stride;
};

// row and column of tile `index` when tiles are taken in groups of rows, column by column inside a group
__device__ __forceinline__ void raster(int index, int tiles_m, int tiles_n, int& tile_m, int& tile_n) {
  const int per_group = kRasterGroup * tiles_n;
  const int group = index / per_group;
  const int first = group * kRasterGroup;
  const int rows = min(kRasterGroup, tiles_m - first);
  const int within = index - group * per_group;
  tile_m = first + within % rows;
  tile_n = within / rows;
}

template <typename Out>
__device__ __forceinline__ uint32_t pack2(float x, float y);

template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack2<__half>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// writes one consumer's 64 x kBlockN wave to shared memory (64-byte swizzle) and starts its TMA stores
template <typename Out, int kBlockN>
__device__ __forceinline__ void store_wave_tma(const float (&sum)[kBlockN / 2], uint8_t* shared, const CUtensorMap* map,
                                               int row, int column, int consumer) {
  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  // lane l addresses row l % 8 of matrix l / 8: (upper, lower half of 16 rows) x (8-column chunk j, j + 1)
  const int r = thread / 32 * 16 + lane % 16;
  const int half = lane / 16;
#pragma unroll
  for (int j = 0; j < kBlockN / 8; j += 2) {
    const int chunk = (j % 4) + half;
    uint8_t* panel = shared + (j / 4) * (64 * kStoreColumns * 2);
    const uint32_t address = shared_address(panel + r * 64 + ((chunk ^ ((r >> 1) & 3)) << 4));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(pack2<Out>(sum[4 * j], sum[4 * j + 1])), "r"(pack2<Out>(sum[4 * j + 2], sum[4 * j + 3])),
                 "r"(pack2<Out>(sum[4 * j + 4], sum[4 * j + 5])), "r"(pack2<Out>(sum[4 * j + 6], sum[4 * j + 7]))
                 : "memory");
  }
  fence_shared_async();
  named_barrier(1 + consumer, 128);
  if (thread == 0) {
#pragma unroll
    for (int panel = 0; panel < kBlockN / kStoreColumns; ++panel) {
      tma_store(map, shared + panel * (64 * kStoreColumns * 2), column + panel * kStoreColumns, row);
    }
    tma_store_commit();
  }
}

template <typename Out>
__device__ __forceinline__ Out convert(float x);
template <>
__device__ __forceinline__ float convert<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half convert<__half>(float x) {
  return __float2half_rn(x);
}

// straight from registers, for float32 outputs
template <typename Out, int kBlockN>
__device__ __forceinline__ void store_wave_direct(const float (&sum)[kBlockN / 2], Out* out, const MatmulShape& shape,
                                                  int row, int column) {
  const int thread = threadIdx.x % 128;
  const int first = row + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < kBlockN / 2; ++i) {
    const int r = first + (i & 2) * 4;
    const int c = column + i / 4 * 8 + thread % 4 * 2 + (i & 1);
    if (r < shape.m && c < shape.n) out[r * shape.out_stride + c] = convert<Out>(sum[i]);
  }
}

// kBlockM x kBlockN tile per CTA; kCluster = 2 shares each tile of b between two CTAs with neighbouring rows of tiles
template <typename Out, int kBlockM, int kBlockN, int kStages, int kCluster, bool kTmaStore>
__global__ void __launch_bounds__(kThreads, 1)
    matmul_sm90(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ CUtensorMap map_a_scale, const __grid_constant__ CUtensorMap map_out, Out* out,
                const float* b_scale, const float* bias, MatmulShape shape) {
#if defined(TILEFUSE_HAS_WGMMA)
  using Storage = MatmulStorage<kBlockM, kBlockN, kStages>;
  extern __shared__ uint8_t raw[];
  Storage& shared = *reinterpret_cast<Storage*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  // rows per consumer, taken in waves of 64 that reuse one accumulator
  constexpr int kWaves = kBlockM / (64 * kConsumers);
  constexpr int kTransaction = Storage::kBytesA + Storage::kBytesB + kBlockM * 4;

  const int k_blocks = (shape.k + kBlockK - 1) / kBlockK;
  const int tiles_n = (shape.n + kBlockN - 1) / kBlockN;
  // in units of one cluster
  const int tiles_m = (shape.m + kBlockM * kCluster - 1) / (kBlockM * kCluster);
  const int tiles = tiles_m * tiles_n;
  const uint32_t cta = kCluster > 1 ? cluster_cta() : 0;
  const int cluster_id = blockIdx.x / kCluster;
  const int clusters = gridDim.x / kCluster;

  if (threadIdx.x == 0) {
    tma_prefetch(&map_a);
    tma_prefetch(&map_b);
    tma_prefetch(&map_a_scale);
    if (kTmaStore) tma_prefetch(&map_out);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      // every consumer warp of every CTA that this stage's copies were sent to
      mbarrier_init(&shared.empty[stage], kConsumers * 4 * kCluster);
    }
    mbarrier_init_fence();
  }
  if (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  const int group = threadIdx.x / 128;
  if (group == 0) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t phase = 0;
      for (int tile = cluster_id; tile < tiles; tile += clusters) {
        int tile_m, tile_n;
        raster(tile, tiles_m, tiles_n, tile_m, tile_n);
        const int row = (tile_m * kCluster + static_cast<int>(cta)) * kBlockM;
        const int column = tile_n * kBlockN;
        for (int k = 0; k < k_blocks; ++k) {
          mbarrier_wait(&shared.empty[stage], phase ^ 1);
          mbarrier_expect(&shared.full[stage], kTransaction);
          tma_load(shared.a[stage], &map_a, &shared.full[stage], k * kBlockK, row);
          tma_load(shared.a_scale[stage], &map_a_scale, &shared.full[stage], row, k);
          if constexpr (kCluster == 1) {
            tma_load(shared.b[stage], &map_b, &shared.full[stage], k * kBlockK, column);
          } else {
            // each CTA fetches its share of b's rows for all
            constexpr int kRows = kBlockN / kCluster;
            tma_load_multicast(shared.b[stage] + cta * kRows * kBlockK, &map_b, &shared.full[stage], k * kBlockK,
                               column + static_cast<int>(cta) * kRows, (1 << kCluster) - 1);
          }
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
      if constexpr (kCluster > 1) {
        // no CTA may leave while the other one still signals its barriers
        for (int i = 0; i < kStages; ++i) {
          mbarrier_wait(&shared.empty[stage], phase ^ 1);
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int consumer = group - 1;
    const int thread = threadIdx.x % 128;
    const int lane = thread % 32;
    const int row_in_wave = thread / 32 * 16 + lane / 4;
    const int first_row = consumer * kWaves * 64;
    uint8_t* staging = shared.out + consumer * kWaves * 64 * kBlockN * 2;
    int stage = 0;
    uint32_t phase = 0;

    for (int tile = cluster_id; tile < tiles; tile += clusters) {
      int tile_m, tile_n;
      raster(tile, tiles_m, tiles_n, tile_m, tile_n);
      const int row = (tile_m * kCluster + static_cast<int>(cta)) * kBlockM + first_row;
      const int column = tile_n * kBlockN;
      // a tile covers columns of at most two 128-wide scale blocks; `boundary` is where the second one starts
      const int block = column / 128;
      const int last_block = (shape.n - 1) / 128;
      const int boundary = (block + 1) * 128 - column;
      const float* scale0 = b_scale + static_cast<int64_t>(block) * shape.b_scale_stride;
      const float* scale1 = b_scale + static_cast<int64_t>(min(block + 1, last_block)) * shape.b_scale_stride;

      float sum[kWaves][kBlockN / 2];
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
        for (int i = 0; i < kBlockN / 2; ++i) sum[wave][i] = 0.0f;
      }

      // one block ahead, so that the latency of these loads hides behind the products
      float next0 = k_blocks > 0 ? __ldg(scale0) : 0.0f;
      float next1 = kBlockN != 128 && k_blocks > 0 ? __ldg(scale1) : 0.0f;
      for (int k = 0; k < k_blocks; ++k) {
        const float b_scale0 = next0;
        const float b_scale1 = next1;
        if (k + 1 < k_blocks) {
          next0 = __ldg(scale0 + k + 1);
          if (kBlockN != 128) next1 = __ldg(scale1 + k + 1);
        }
        mbarrier_wait(&shared.full[stage], phase);
        const uint64_t b = wgmma_descriptor(shared_address(shared.b[stage]));
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
          const float upper = shared.a_scale[stage][first_row + wave * 64 + row_in_wave];
          const float lower = shared.a_scale[stage][first_row + wave * 64 + row_in_wave + 8];
          const uint64_t a = wgmma_descriptor(shared_address(shared.a[stage] + (first_row + wave * 64) * kBlockK));
          float product[kBlockN / 2];
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < kBlockK / 32; ++step) {
            // 32 bytes further along K; the descriptor counts in 16 bytes
            wgmma_e4m3<kBlockN>(product, a + 2 * step, b + 2 * step, step != 0);
          }
          wgmma_commit();
          wgmma_wait();
          if (wave == kWaves - 1) {
            __syncwarp();
            if (lane < kCluster) {
              if constexpr (kCluster == 1) {
                mbarrier_arrive(&shared.empty[stage]);
              } else {
                mbarrier_arrive_cluster(&shared.empty[stage], lane);
              }
            }
          }
          const float upper0 = upper * b_scale0, lower0 = lower * b_scale0;
          const float upper1 = upper * b_scale1, lower1 = lower * b_scale1;
#pragma unroll
          for (int j = 0; j < kBlockN / 8; ++j) {
            const bool first = kBlockN == 128 || j * 8 < boundary;
            const float s_upper = first ? upper0 : upper1;
            const float s_lower = first ? lower0 : lower1;
            sum[wave][4 * j] += s_upper * product[4 * j];
            sum[wave][4 * j + 1] += s_upper * product[4 * j + 1];
            sum[wave][4 * j + 2] += s_lower * product[4 * j + 2];
            sum[wave][4 * j + 3] += s_lower * product[4 * j + 3];
          }
          if (kWaves > 1) {
            // keeps the compiler from sinking this wave's additions below the next wave's products, which spills
#pragma unroll
            for (int i = 0; i < kBlockN / 2; ++i) asm volatile("" : "+f"(sum[wave][i])::"memory");
          }
        }
        if (++stage == kStages) {
          stage = 0;
          phase ^= 1;
        }
      }

      if (bias != nullptr) {
#pragma unroll
        for (int j = 0; j < kBlockN / 8; ++j) {
          const int c = column + j * 8 + thread % 4 * 2;
          const float bias0 = c < shape.n ? __ldg(bias + c) : 0.0f;
          const float bias1 = c + 1 < shape.n ? __ldg(bias + c + 1) : 0.0f;
#pragma unroll
          for (int wave = 0; wave < kWaves; ++wave) {
            sum[wave][4 * j] += bias0;
            sum[wave][4 * j + 1] += bias1;
            sum[wave][4 * j + 2] += bias0;
            sum[wave][4 * j + 3] += bias1;
          }
        }
      }

      if constexpr (kTmaStore) {
        // the previous tile's stores must have left the staging buffer; they overlapped this tile's products
        if (thread == 0) tma_store_wait_read();
        named_barrier(1 + consumer, 128);
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
          store_wave_tma<Out, kBlockN>(sum[wave], staging + wave * 64 * kBlockN * 2, &map_out, row + wave * 64, column,
                                       consumer);
        }
      } else {
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
          store_wave_direct<Out, kBlockN>(sum[wave], out, shape, row + wave * 64, column);
        }
      }
    }
    if (kTmaStore && thread == 0) tma_store_wait();
  }
#endif
}

}  // namespace tilefuse::fp8
