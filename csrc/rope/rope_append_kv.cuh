// Rotary embedding and the write into a paged cache on the GPU: q as in rope.cuh, k and v to their slots.
#pragma once

#include <type_traits>

#include "common/fp8.h"
#include "rope/rope.cuh"

namespace tilefuse {

struct RopeAppendKvCall {
  RopeCall rope;  // tensors[0] is q, tensors[1] is k without an output
  const void* v;
  int64_t v_strides[3];
  int dim_v;
  void* cache[2];               // of k and v
  int64_t cache_strides[2][3];  // page, place in the page, head
  float scale[2];
  Index slots;
  int64_t slot_strides[2];
  int64_t slot_count, page_size;
};

// e4m3 codes are bytes here
using cache_e4m3 = unsigned char;

// a value of dtype T, in the cache's dtype; the same dtype keeps its bits
template <typename T, typename C>
__device__ __forceinline__ C to_cache(T x, float scale) {
  if constexpr (std::is_same_v<T, C>) {
    return x;
  } else if constexpr (std::is_same_v<C, cache_e4m3>) {
    return fp8::quantize(to_float(x), scale);
  } else {
    return from_float<C>(to_float(x));
  }
}

template <int kWidth, typename T, typename C>
__device__ __forceinline__ void append_copied(const T* in, C* out, float scale) {
  const Vec<T, kWidth> x = load_vec<kWidth>(in);
  Vec<C, kWidth> y;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y.data[i] = to_cache<T, C>(x.data[i], scale);
  store_vec(out, y);
}

template <typename C, typename Unit, int kWidth, bool kInterleaved>
__device__ __forceinline__ void append_turned(const Unit& unit, C* row, const RopeCall& p, int pair, float scale) {
  if constexpr (kInterleaved && kWidth > 1) {
    Vec<C, kWidth> x;
#pragma unroll
    for (int i = 0; i < Unit::kPairs; ++i) {
      x.data[2 * i] = to_cache<float, C>(unit.a[i], scale);
      x.data[2 * i + 1] = to_cache<float, C>(unit.b[i], scale);
    }
    store_vec(row + p.offset + 2 * pair, x);
  } else if constexpr (kInterleaved) {
    row[p.offset + 2 * pair] = to_cache<float, C>(unit.a[0], scale);
    row[p.offset + 2 * pair + 1] = to_cache<float, C>(unit.b[0], scale);
  } else {
    Vec<C, kWidth> x, y;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x.data[i] = to_cache<float, C>(unit.a[i], scale);
      y.data[i] = to_cache<float, C>(unit.b[i], scale);
    }
    store_vec(row + p.offset + pair, x);
    store_vec(row + p.offset + p.half + pair, y);
  }
}

template <typename T, typename C, int kWidth, bool kInterleaved>
__host__ __device__ inline int append_units(const RopeAppendKvCall& a) {
  const int of_row = rope_units<T, kWidth, kInterleaved>(a.rope), of_value = a.dim_v / kWidth;
  return of_row > of_value ? of_row : of_value;
}

template <typename T, typename C, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads, 1) rope_append_kv_kernel(RopeAppendKvCall a) {
  using Unit = RopeUnit<T, kWidth, kInterleaved>;
  const RopeCall& p = a.rope;
  const int units = append_units<T, C, kWidth, kInterleaved>(a), row_units = rope_units<T, kWidth, kInterleaved>(p);
  const int q_heads = p.tensors[0].heads, kv_heads = p.tensors[1].heads, rows = q_heads + 2 * kv_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  if (item >= p.tokens * rows * units) return;
  const int unit = static_cast<int>(item % units);
  const int64_t rest = item / units;
  const int row = static_cast<int>(rest % rows);
  const int64_t token = rest / rows;
  const int64_t batch = token / p.seq_len, place = token - batch * p.seq_len;
  const bool is_v = row >= q_heads + kv_heads;
  if (unit >= (is_v ? a.dim_v / kWidth : row_units)) return;
  const int turning = is_v ? 0 : Unit::rotary_units(p.half), pair = unit * Unit::kPairs;
  if (row < q_heads) {
    const RopeTensor& q = p.tensors[0];
    const T* in =
        static_cast<const T*>(q.in) + batch * q.in_strides[0] + place * q.in_strides[1] + row * q.in_strides[2];
    T* out = static_cast<T*>(q.out) + batch * q.out_strides[0] + place * q.out_strides[1] + row * q.out_strides[2];
    if (unit < turning) {
      float cos[Unit::kPairs], sin[Unit::kPairs];
      load_table<Unit::kPairs>(p, token, pair, cos, sin);
      Unit values;
      values.load(in, p, pair);
      values.rotate(cos, sin);
      values.store(out, p, pair);
    } else {
      const int at = copied_element(p, unit - turning, kWidth);
      store_vec(out + at, load_vec<kWidth>(in + at));
    }
    return;
  }
  const int64_t slot = a.slots[batch * a.slot_strides[0] + place * a.slot_strides[1]];
  if (slot < 0 || slot >= a.slot_count) return;
  const int64_t page = slot / a.page_size, offset = slot - page * a.page_size;
  const int head = row - q_heads - (is_v ? kv_heads : 0);
  const int64_t* from = is_v ? a.v_strides : p.tensors[1].in_strides;
  const int64_t* to = a.cache_strides[is_v];
  const T* in =
      static_cast<const T*>(is_v ? a.v : p.tensors[1].in) + batch * from[0] + place * from[1] + head * from[2];
  C* out = static_cast<C*>(a.cache[is_v]) + page * to[0] + offset * to[1] + head * to[2];
  const float scale = a.scale[is_v];
  if (unit < turning) {
    float cos[Unit::kPairs], sin[Unit::kPairs];
    load_table<Unit::kPairs>(p, token, pair, cos, sin);
    Unit values;
    values.load(in, p, pair);
    values.rotate(cos, sin);
    append_turned<C, Unit, kWidth, kInterleaved>(values, out, p, pair, scale);
  } else {
    const int at = is_v ? unit * kWidth : copied_element(p, unit - turning, kWidth);
    append_copied<kWidth>(in + at, out + at, scale);
  }
}

template <typename T, typename C>
inline bool append_vectorizes(const RopeAppendKvCall& a) {
  constexpr int width = kVec16<T>;
  RopeCall p = a.rope;
  p.tensors[1].out = const_cast<void*>(p.tensors[1].in);
  for (int i = 0; i < 3; ++i) p.tensors[1].out_strides[i] = p.tensors[1].in_strides[i];
  bool ok = rope_vectorizes<T>(p) && a.dim_v % width == 0;
  constexpr int bytes = width * static_cast<int>(sizeof(C)) > 16 ? 16 : width * static_cast<int>(sizeof(C));
  for (int i = 0; i < 3; ++i) {
    ok = ok && aligned(a.v, a.v_strides[i], sizeof(T), 16);
    for (int which = 0; which < 2; ++which)
      ok = ok && aligned(a.cache[which], a.cache_strides[which][i], sizeof(C), bytes);
  }
  return ok;
}

// calls launch(kernel, blocks) with the instance and the grid that fit the call; the caller has work to do
template <typename T, typename C, bool kInterleaved, typename Launch>
inline void append_launch_as(RopeAppendKvCall& a, const Launch& launch) {
  constexpr int width = kVec16<T>;
  const int64_t rows = a.rope.tensors[0].heads + 2 * a.rope.tensors[1].heads;
  const auto blocks = [&](int units) { return ceil_div<int64_t>(a.rope.tokens * rows * units, kRopeThreads); };
  if (append_vectorizes<T, C>(a)) {
    launch(rope_append_kv_kernel<T, C, width, kInterleaved>, blocks(append_units<T, C, width, kInterleaved>(a)));
  } else {
    launch(rope_append_kv_kernel<T, C, 1, kInterleaved>, blocks(append_units<T, C, 1, kInterleaved>(a)));
  }
}

template <typename T, typename C, typename Launch>
inline void append_launch(RopeAppendKvCall& a, const Launch& launch) {
  if (a.rope.interleaved) {
    append_launch_as<T, C, true>(a, launch);
  } else {
    append_launch_as<T, C, false>(a, launch);
  }
}

}  // namespace tilefuse
