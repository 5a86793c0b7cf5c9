// Kernels that test the emulation itself: each primitive, and each fault that it must catch.
#include "emulation/binding.h"

#include "common/cuda.cuh"

using namespace tilefuse;
using emulation::launch;
using emulation::pointer;

namespace {

__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  atomicAdd(&out[i], static_cast<int>(i) + 1);
}

template <typename T, bool Barrier>
__global__ void reverse(const T* x, T* out) {
  __shared__ T buffer[256];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  buffer[threadIdx.x] = x[i];
  if constexpr (Barrier) __syncthreads();
  out[i] = buffer[blockDim.x - 1 - threadIdx.x];
}

// each warp reads what its neighbour warp wrote; a warp barrier is not enough
__global__ void warp_race(const float* x, float* out) {
  __shared__ float buffer[128];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = buffer[(threadIdx.x + 32) % 128];
}

// blocks run in any order, so reading a neighbour block's output is a race
__global__ void block_race(int* data) {
  if (threadIdx.x == 0) data[blockIdx.x] = data[(blockIdx.x + 1) % gridDim.x] + 1;
}

__global__ void reverse_dynamic(const double* x, double* out, int past) {
  TILEFUSE_DYNAMIC_SHARED(double, buffer);
  buffer[threadIdx.x] = x[threadIdx.x];
  if (past > 0 && threadIdx.x == 0) buffer[blockDim.x + past - 1] = 0.0;
  __syncthreads();
  out[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

__global__ void unwritten_shared(float* out) {
  __shared__ float buffer[32];
  TILEFUSE_DYNAMIC_SHARED(float, dynamic);
  // the first block leaves values behind that the second one must not see
  if (blockIdx.x == 0) buffer[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
  __syncthreads();
  if (blockIdx.x == 1) {
    out[threadIdx.x] = buffer[threadIdx.x];
    out[32 + threadIdx.x] = dynamic[threadIdx.x];
  }
}

// an array, so that no compiler warns about the missing initialisation
__global__ void unwritten_local(float* out, int n) {
  float values[8];
  for (int i = 0; i < n; ++i) values[i] = 1.0f;
  out[threadIdx.x] = values[threadIdx.x % 8];
}

__global__ void shuffle(const int* x, int* out, int kind, int argument, int width, unsigned mask) {
  const int i = threadIdx.x;
  if ((mask >> (i % 32) & 1u) == 0) return;
  if (kind == 0) out[i] = __shfl_sync(mask, x[i], argument, width);
  if (kind == 1) out[i] = __shfl_up_sync(mask, x[i], argument, width);
  if (kind == 2) out[i] = __shfl_down_sync(mask, x[i], argument, width);
  if (kind == 3) out[i] = __shfl_xor_sync(mask, x[i], argument, width);
}

__global__ void votes(const int* x, unsigned* out) {
  const int i = threadIdx.x, n = blockDim.x;
  const unsigned mask = __ballot_sync(kFullWarp, 1);
  out[i] = __ballot_sync(mask, x[i] > 0);
  out[n + i] = __any_sync(mask, x[i] > 0);
  out[2 * n + i] = __all_sync(mask, x[i] > 0);
  out[3 * n + i] = __match_any_sync(mask, x[i]);
  out[4 * n + i] = static_cast<unsigned>(__reduce_add_sync(mask, x[i]));
  out[5 * n + i] = static_cast<unsigned>(__reduce_max_sync(mask, x[i]));
}

// four groups of eight lanes, each with its own mask, in different branches
__global__ void groups(const float* x, float* out) {
  const int group = threadIdx.x / 8;
  const unsigned mask = 0xffu << (8 * group);
  float value = x[threadIdx.x];
  if (group % 2 == 0) {
    value = warp_sum<8>(value, mask);
  } else {
    value = warp_max<8>(value, mask);
  }
  out[threadIdx.x] = value;
}

__global__ void half_shuffle(const bf16* x, bf16* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
}

__global__ void reductions(const float* x, float* out) {
  __shared__ float scratch[32];
  const float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  const float total = block_sum(value, scratch);
  const float largest = block_max(value, scratch);
  out[2 * (blockIdx.x * blockDim.x + threadIdx.x)] = total;
  out[2 * (blockIdx.x * blockDim.x + threadIdx.x) + 1] = largest;
}

__global__ void barrier_votes(const int* x, int* out) {
  const int i = threadIdx.x, n = blockDim.x;
  out[i] = __syncthreads_count(x[i]);
  out[n + i] = __syncthreads_and(x[i]);
  out[2 * n + i] = __syncthreads_or(x[i]);
}

__global__ void histogram(const int* x, int* counts, int* largest, unsigned* ticket, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&counts[x[i]], 1);
  atomicMax(largest, x[i]);
  atomicInc(ticket, 9u);
}

__global__ void locked(int* lock, int* counter) {
  while (atomicCAS(lock, 0, 1) != 0) __nanosleep(10);
  const int seen = *counter;
  __nanosleep(10);
  *counter = seen + 1;
  atomicExch(lock, 0);
}

__global__ void unlocked(int* counter) {
  const int seen = *counter;
  __nanosleep(10);
  *counter = seen + 1;
}

template <bool Wait>
__global__ void pipeline(const float* x, float* out, int tiles) {
  __shared__ __align__(16) float buffer[2][128];
  const int i = threadIdx.x * 4;
  cp_async_16(&buffer[0][i], x + i);
  cp_async_commit();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) cp_async_16(&buffer[(tile + 1) % 2][i], x + (tile + 1) * 128 + i, tile + 2 == tiles ? 8 : 16);
    cp_async_commit();
    if constexpr (Wait) cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[tile * 128 + i + j] = buffer[tile % 2][127 - i - j];
    __syncthreads();
  }
}

__global__ void fault(const char* name, float* data, int zero) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  __shared__ float buffer[64];
  const int i = threadIdx.x;
  if (is("barrier some skip") && i < 40) __syncthreads();
  if (is("barriers differ")) {
    if (i < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (is("lane not in mask")) data[i] = __shfl_sync(0x0000ffffu, data[i], 0);
  if (is("masks differ")) data[i] = __shfl_xor_sync(i % 32 < 16 ? kFullWarp : 0x00ff0000u << (i % 2), data[i], 1);
  if (is("operations differ")) {
    data[i] = i % 2 ? __shfl_xor_sync(kFullWarp, data[i], 1) : static_cast<float>(__ballot_sync(kFullWarp, 1));
  }
  if (is("lanes at a barrier")) {
    if (i % 32 < 16) data[i] = __shfl_xor_sync(kFullWarp, data[i], 1);
    __syncthreads();
  }
  if (is("bad width")) data[i] = __shfl_sync(kFullWarp, data[i], 0, 12);
  if (is("misaligned")) store_vec(data + 1 + i * 4, load_vec<4>(data + i * 4));
  if (is("shared index")) buffer[i + 1 + zero] = 1.0f;
  if (is("null")) data[i] = *(zero == 0 ? static_cast<const float*>(nullptr) : data);
  if (is("overflow")) data[i] = static_cast<float>(0x7fffffff + i + zero);
  if (is("division")) data[i] = static_cast<float>(i / zero);
  if (is("trap") && i == 5) __trap();
  if (is("spin")) {
    while (atomicAdd(reinterpret_cast<int*>(data), 0) >= 0) {
    }
  }
  if (is("async misaligned")) cp_async_16(buffer, data + 1);
}

__global__ void integers(const int* x, const int* y, int* out, int n) {
  const int i = threadIdx.x;
  const int a = x[i], b = y[i];
  const auto ua = static_cast<unsigned>(a), ub = static_cast<unsigned>(b);
  int row = 0;
  const auto put = [&](auto value) { out[row++ * n + i] = static_cast<int>(value); };
  put(__popc(ua));
  put(__ffs(a));
  put(__clz(a));
  put(__brev(ua));
  put(__byte_perm(ua, ub, 0x3b71u));
  put(__funnelshift_l(ua, ub, 7));
  put(__funnelshift_r(ua, ub, 7));
  put(__mulhi(a, b));
  put(__umulhi(ua, ub));
  put(min(a, b));
  put(max(a, b));
  put(__dp4a(a & 0x7f7f7f7f, b & 0x7f7f7f7f, 3));
}

__global__ void floats(const float* x, float* out, int n) {
  const int i = threadIdx.x;
  const float a = x[i];
  int row = 0;
  const auto put = [&](float value) { out[row++ * n + i] = value; };
  put(rsqrtf(a));
  put(__fdiv_rn(1.0f, a));
  put(__frcp_rn(a));
  put(__fmaf_rn(a, a, 1.0f));
  put(__expf(a));
  put(__logf(a));
  put(fast_exp2(a));
  put(static_cast<float>(__float2int_rn(a)));
  put(static_cast<float>(__float2int_rz(a)));
  put(__saturatef(a));
  put(__int_as_float(__float_as_int(a)));
}

template <typename T>
__global__ void convert(const T* x, float* wide, T* back, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  wide[i] = to_float(x[i]);
  back[i] = from_float<T>(wide[i]);
}

template <typename T>
__global__ void narrow(const float* x, T* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = from_float<T>(x[i]);
}

template <typename T, int N>
__global__ void copy_vectors(const T* x, T* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i * N < n) store_vec(out + i * N, i % 2 ? load_vec<N>(x + i * N) : load_vec_streaming<N>(x + i * N));
}

template <typename T>
void define_dtype(pybind11::module_& m, const std::string& name) {
  m.def(("convert_" + name).c_str(), [](uintptr_t x, uintptr_t wide, uintptr_t back, int64_t n) {
    launch(static_cast<unsigned>(ceil_div<int64_t>(n, 256)), 256, 0,
           [&] { convert(pointer<T>(x), pointer<float>(wide), pointer<T>(back), n); });
  });
  m.def(("narrow_" + name).c_str(), [](uintptr_t x, uintptr_t out, int64_t n) {
    launch(static_cast<unsigned>(ceil_div<int64_t>(n, 256)), 256, 0,
           [&] { narrow(pointer<float>(x), pointer<T>(out), n); });
  });
  m.def(("copy_" + name).c_str(), [](uintptr_t x, uintptr_t out, int64_t n) {
    constexpr int N = kVec16<T>;
    launch(static_cast<unsigned>(ceil_div<int64_t>(n, 64 * N)), 64, 0,
           [&] { copy_vectors<T, N>(pointer<T>(x), pointer<T>(out), n); });
  });
}

dim3 to_dim(const std::array<unsigned, 3>& d) { return {d[0], d[1], d[2]}; }

}  // namespace

TILEFUSE_EMULATION(m) {
  m.def("indices", [](uintptr_t out, std::array<unsigned, 3> grid, std::array<unsigned, 3> block, size_t shared) {
    launch(to_dim(grid), to_dim(block), shared, [&] { indices(pointer<int>(out)); });
  });
  m.def("reverse", [](uintptr_t x, uintptr_t out, int n, int threads, bool with_barrier) {
    launch(n / threads, threads, 0, [&] {
      if (with_barrier) {
        reverse<float, true>(pointer<float>(x), pointer<float>(out));
      } else {
        reverse<float, false>(pointer<float>(x), pointer<float>(out));
      }
    });
  });
  m.def("warp_race", [](uintptr_t x, uintptr_t out) {
    launch(1, 128, 0, [&] { warp_race(pointer<float>(x), pointer<float>(out)); });
  });
  m.def("block_race", [](uintptr_t data, int n) { launch(n, 32, 0, [&] { block_race(pointer<int>(data)); }); });
  m.def("reverse_dynamic", [](uintptr_t x, uintptr_t out, int n, int past) {
    launch(1, n, n * sizeof(double), [&] { reverse_dynamic(pointer<double>(x), pointer<double>(out), past); });
  });
  m.def("unwritten_shared", [](uintptr_t out) { launch(2, 32, 128, [&] { unwritten_shared(pointer<float>(out)); }); });
  m.def("unwritten_local",
        [](uintptr_t out, int n) { launch(1, 8, 0, [&] { unwritten_local(pointer<float>(out), n); }); });
  m.def("shuffle", [](uintptr_t x, uintptr_t out, int threads, int kind, int argument, int width, unsigned mask) {
    launch(1, threads, 0, [&] { shuffle(pointer<int>(x), pointer<int>(out), kind, argument, width, mask); });
  });
  m.def("votes", [](uintptr_t x, uintptr_t out, int threads) {
    launch(1, threads, 0, [&] { votes(pointer<int>(x), pointer<unsigned>(out)); });
  });
  m.def("groups",
        [](uintptr_t x, uintptr_t out) { launch(1, 32, 0, [&] { groups(pointer<float>(x), pointer<float>(out)); }); });
  m.def("half_shuffle", [](uintptr_t x, uintptr_t out) {
    launch(1, 32, 0, [&] { half_shuffle(pointer<bf16>(x), pointer<bf16>(out)); });
  });
  m.def("reductions", [](uintptr_t x, uintptr_t out, int blocks, int threads) {
    launch(blocks, threads, 0, [&] { reductions(pointer<float>(x), pointer<float>(out)); });
  });
  m.def("barrier_votes", [](uintptr_t x, uintptr_t out, int threads) {
    launch(1, threads, 0, [&] { barrier_votes(pointer<int>(x), pointer<int>(out)); });
  });
  m.def("histogram", [](uintptr_t x, uintptr_t counts, uintptr_t largest, uintptr_t ticket, int n) {
    launch(ceil_div(n, 64), 64, 0, [&] {
      histogram(pointer<int>(x), pointer<int>(counts), pointer<int>(largest), pointer<unsigned>(ticket), n);
    });
  });
  m.def("locked", [](uintptr_t lock, uintptr_t counter, int threads) {
    launch(2, threads, 0, [&] { locked(pointer<int>(lock), pointer<int>(counter)); });
  });
  m.def("unlocked",
        [](uintptr_t counter, int threads) { launch(1, threads, 0, [&] { unlocked(pointer<int>(counter)); }); });
  m.def("pipeline", [](uintptr_t x, uintptr_t out, int tiles, bool wait) {
    launch(1, 32, 0, [&] {
      if (wait) {
        pipeline<true>(pointer<float>(x), pointer<float>(out), tiles);
      } else {
        pipeline<false>(pointer<float>(x), pointer<float>(out), tiles);
      }
    });
  });
  m.def("fault", [](const std::string& name, uintptr_t data) {
    launch(1, 64, 0, [&] { fault(name.c_str(), pointer<float>(data), 0); });
  });
  m.def("integers", [](uintptr_t x, uintptr_t y, uintptr_t out, int n) {
    launch(1, n, 0, [&] { integers(pointer<int>(x), pointer<int>(y), pointer<int>(out), n); });
  });
  m.def("floats", [](uintptr_t x, uintptr_t out, int n) {
    launch(1, n, 0, [&] { floats(pointer<float>(x), pointer<float>(out), n); });
  });
  define_dtype<float>(m, "float32");
  define_dtype<bf16>(m, "bfloat16");
  define_dtype<f16>(m, "float16");
  define_dtype<fp8_e4m3>(m, "float8_e4m3fn");
  define_dtype<fp8_e5m2>(m, "float8_e5m2");
}
