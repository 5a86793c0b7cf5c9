// Rotary embedding on the GPU, for work so small that a Triton launch costs more than the kernel.
//
// A row is one head of one token. It is cut into units of one 16-byte access (two for a pair of halves); a thread takes
// one unit of one token and walks over some of the heads, so that cos and sin are loaded once for all of them.
#pragma once

#include "common/cuda.cuh"
#include "rope/rope.h"

namespace tilefuse {

__host__ __device__ __forceinline__ int rope_groups(const RopeCall& p, int which) {
  return ceil_div(p.tensors[which].heads, p.heads_per_thread);
}

// table row of a token, never outside of the table
__device__ __forceinline__ int64_t table_row(const RopeCall& p, int64_t token, int axis) {
  const int64_t batch = token / p.seq_len, place = token - batch * p.seq_len;
  int64_t row = place;
  if (p.positions.data != nullptr) {
    const int64_t* strides = p.position_strides;
    row = p.positions[axis * strides[0] + batch * strides[1] + place * strides[2]];
  } else if (p.bounds.data != nullptr) {
    row = packed_place(p, token);
  }
  row = row < p.table_rows ? row : p.table_rows - 1;
  return row > 0 ? row : 0;
}

// cos and sin of N pairs of one token; the tables' rows are aligned when N > 1
template <int N>
__device__ __forceinline__ void load_table(const RopeCall& p, int64_t token, int pair, float* cos, float* sin) {
  if (p.mrope) {
    for (int i = 0; i < N; ++i) {
      const int64_t row = table_row(p, token, mrope_axis(p, pair + i));
      cos[i] = p.cos[row * p.cos_stride + pair + i];
      sin[i] = p.sin[row * p.sin_stride + pair + i];
    }
  } else {
    const int64_t row = table_row(p, token, 0);
    const Vec<float, N> c = load_vec<N>(p.cos + row * p.cos_stride + pair);
    const Vec<float, N> s = load_vec<N>(p.sin + row * p.sin_stride + pair);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      cos[i] = c.data[i];
      sin[i] = s.data[i];
    }
  }
  if (p.conjugate) {
#pragma unroll
    for (int i = 0; i < N; ++i) sin[i] = -sin[i];
  }
}

// What a unit holds: `kFirst` elements at one place and, for halves, as many at another. kWidth is the access width.
template <typename T, int kWidth, bool kInterleaved>
struct RopeUnit {
  static constexpr int kPairs = kInterleaved ? (kWidth > 1 ? kWidth / 2 : 1) : kWidth;
  float a[kPairs], b[kPairs];

  static __host__ __device__ int rotary_units(int half) { return half / kPairs; }

  __device__ __forceinline__ void load(const T* row, const RopeCall& p, int pair) {
    if constexpr (kInterleaved) {
      if constexpr (kWidth > 1) {
        const Vec<T, kWidth> x = load_vec<kWidth>(row + p.offset + 2 * pair);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          a[i] = to_float(x.data[2 * i]);
          b[i] = to_float(x.data[2 * i + 1]);
        }
      } else {
        a[0] = to_float(row[p.offset + 2 * pair]);
        b[0] = to_float(row[p.offset + 2 * pair + 1]);
      }
    } else {
      const Vec<T, kWidth> x = load_vec<kWidth>(row + p.offset + pair);
      const Vec<T, kWidth> y = load_vec<kWidth>(row + p.offset + p.half + pair);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        a[i] = to_float(x.data[i]);
        b[i] = to_float(y.data[i]);
      }
    }
  }

  __device__ __forceinline__ void rotate(const float* cos, const float* sin) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float turned = a[i] * cos[i] - b[i] * sin[i];
      b[i] = b[i] * cos[i] + a[i] * sin[i];
      a[i] = turned;
    }
  }

  __device__ __forceinline__ void store(T* row, const RopeCall& p, int pair) const {
    if constexpr (kInterleaved) {
      if constexpr (kWidth > 1) {
        Vec<T, kWidth> x;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          x.data[2 * i] = from_float<T>(a[i]);
          x.data[2 * i + 1] = from_float<T>(b[i]);
        }
        store_vec(row + p.offset + 2 * pair, x);
      } else {
        row[p.offset + 2 * pair] = from_float<T>(a[0]);
        row[p.offset + 2 * pair + 1] = from_float<T>(b[0]);
      }
    } else {
      Vec<T, kWidth> x, y;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        x.data[i] = from_float<T>(a[i]);
        y.data[i] = from_float<T>(b[i]);
      }
      store_vec(row + p.offset + pair, x);
      store_vec(row + p.offset + p.half + pair, y);
    }
  }
};

// first element of the i-th access outside of the rotary slice
__device__ __forceinline__ int copied_element(const RopeCall& p, int i, int width) {
  return i * width < p.offset ? i * width : i * width + 2 * p.half;
}

template <typename T, int kWidth, bool kInterleaved>
__host__ __device__ inline int rope_units(const RopeCall& p) {
  const int copied = p.copy ? (p.dim - 2 * p.half) / kWidth : 0;
  return RopeUnit<T, kWidth, kInterleaved>::rotary_units(p.half) + copied;
}

constexpr int kRopeThreads = 256;

template <typename T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(RopeCall p) {
  using Unit = RopeUnit<T, kWidth, kInterleaved>;
  const int units = rope_units<T, kWidth, kInterleaved>(p);
  const int q_groups = rope_groups(p, 0), groups = q_groups + rope_groups(p, 1);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  if (item >= p.tokens * groups * units) return;
  const int unit = static_cast<int>(item % units);
  const int64_t rest = item / units;
  const int group = static_cast<int>(rest % groups);
  const int64_t token = rest / groups;
  const int64_t batch = token / p.seq_len, place = token - batch * p.seq_len;
  const int which = group < q_groups ? 0 : 1;
  const RopeTensor& x = p.tensors[which];
  const int first = (which == 0 ? group : group - q_groups) * p.heads_per_thread;
  const int last = first + p.heads_per_thread < x.heads ? first + p.heads_per_thread : x.heads;
  const T* in =
      static_cast<const T*>(x.in) + batch * x.in_strides[0] + place * x.in_strides[1] + first * x.in_strides[2];
  T* out = static_cast<T*>(x.out) + batch * x.out_strides[0] + place * x.out_strides[1] + first * x.out_strides[2];
  const int turning = Unit::rotary_units(p.half);
  if (unit < turning) {
    const int pair = unit * Unit::kPairs;
    float cos[Unit::kPairs], sin[Unit::kPairs];
    load_table<Unit::kPairs>(p, token, pair, cos, sin);
    for (int head = first; head < last; ++head, in += x.in_strides[2], out += x.out_strides[2]) {
      Unit values;
      values.load(in, p, pair);
      values.rotate(cos, sin);
      values.store(out, p, pair);
    }
  } else {
    const int at = copied_element(p, unit - turning, kWidth);
    for (int head = first; head < last; ++head, in += x.in_strides[2], out += x.out_strides[2]) {
      store_vec(out + at, load_vec<kWidth>(in + at));
    }
  }
}

// whether every access of a call can be 16 bytes wide
template <typename T>
inline bool rope_vectorizes(const RopeCall& p) {
  constexpr int width = kVec16<T>;
  const auto rows = [](const void* data, const int64_t* strides) {
    bool ok = true;
    for (int i = 0; i < 3; ++i) ok = ok && aligned(data, strides[i], sizeof(T), 16);
    return ok;
  };
  bool ok = p.offset % width == 0 && (p.dim - 2 * p.half) % width == 0;
  ok = ok && (p.interleaved ? 2 * p.half : p.half) % width == 0;
  for (const RopeTensor& x : p.tensors) {
    ok = ok && (x.heads == 0 || (rows(x.in, x.in_strides) && rows(x.out, x.out_strides)));
  }
  return ok && aligned(p.cos, p.cos_stride, 4, 16) && aligned(p.sin, p.sin_stride, 4, 16);
}

// one head per thread until the device is full, then more of them share a table row
inline int rope_heads_per_thread(const RopeCall& p, int units) {
  const int64_t rows = p.tokens * (p.tensors[0].heads + p.tensors[1].heads);
  constexpr int64_t kFull = 148 * 2048;
  const int64_t wanted = rows * units / kFull;
  return wanted < 1 ? 1 : wanted > 8 ? 8 : static_cast<int>(wanted);
}

// calls launch(kernel, blocks) with the instance and the grid that fit the call; the caller has work to do
template <typename T, bool kInterleaved, typename Launch>
inline void rope_launch_as(RopeCall& p, const Launch& launch) {
  const auto go = [&](auto kernel, int units) {
    p.heads_per_thread = rope_heads_per_thread(p, units);
    const int64_t groups = rope_groups(p, 0) + rope_groups(p, 1);
    launch(kernel, ceil_div<int64_t>(p.tokens * groups * units, kRopeThreads));
  };
  constexpr int width = kVec16<T>;
  if (rope_vectorizes<T>(p)) {
    go(rope_kernel<T, width, kInterleaved>, rope_units<T, width, kInterleaved>(p));
  } else {
    go(rope_kernel<T, 1, kInterleaved>, rope_units<T, 1, kInterleaved>(p));
  }
}

template <typename T, typename Launch>
inline void rope_launch(RopeCall& p, const Launch& launch) {
  if (p.interleaved) {
    rope_launch_as<T, true>(p, launch);
  } else {
    rope_launch_as<T, false>(p, launch);
  }
}

}  // namespace tilefuse
