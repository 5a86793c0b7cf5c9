// RMSNorm of each head, then rotary embedding, on the GPU: a warp takes a row (one head of one token).
//
// A row is read once per pass, from the first-level cache after the first one, so that any head dim fits. The gradient
// of the weights is summed in two stages of fixed order: rows of a block in shared memory, then blocks.
#pragma once

#include "rope/rope.cuh"

namespace tilefuse {

constexpr int kNormWarps = 4;
constexpr int kNormThreads = 32 * kNormWarps;

struct QkNormRopeCall {
  RopeCall rope;
  // of q and of k, [dim]
  const void* weight[2];
  Dtype weight_dtype;
  float weight_offset, eps;
  // upstream gradients, strides as in RopeTensor (backward only)
  const void* dout[2];
  int64_t dout_strides[2][3];
  // [blocks, 2, dim] partial gradients of the weights, and rows per block (backward only)
  float* partial;
  int64_t rows_per_block;
};

__device__ __forceinline__ float norm_weight(const QkNormRopeCall& p, int which, int i) {
  float w;
  if (p.weight_dtype == Dtype::f32) {
    w = static_cast<const float*>(p.weight[which])[i];
  } else if (p.weight_dtype == Dtype::bf16) {
    w = to_float(static_cast<const bf16*>(p.weight[which])[i]);
  } else {
    w = to_float(static_cast<const f16*>(p.weight[which])[i]);
  }
  return w + p.weight_offset;
}

// where a row lies: its token, tensor and head
struct NormRow {
  int64_t token, batch, place;
  int which, head;

  __device__ __forceinline__ NormRow(const RopeCall& p, int64_t row) {
    const int heads = p.tensors[0].heads + p.tensors[1].heads;
    token = row / heads;
    const int h = static_cast<int>(row - token * heads);
    batch = token / p.seq_len;
    place = token - batch * p.seq_len;
    which = h < p.tensors[0].heads ? 0 : 1;
    head = which == 0 ? h : h - p.tensors[0].heads;
  }

  __device__ __forceinline__ int64_t at(const int64_t* strides) const {
    return batch * strides[0] + place * strides[1] + head * strides[2];
  }
};

// the units of a row that this lane owns: turned(first pair) in the rotary slice, copied(first element) outside of it
template <typename T, int kWidth, bool kInterleaved, typename Turned, typename Copied>
__device__ __forceinline__ void each_unit(const RopeCall& p, const Turned& turned, const Copied& copied) {
  using Unit = RopeUnit<T, kWidth, kInterleaved>;
  const int turning = Unit::rotary_units(p.half);
  const int units = turning + (p.dim - 2 * p.half) / kWidth;
  for (int unit = threadIdx.x % 32; unit < units; unit += 32) {
    if (unit < turning) {
      turned(unit * Unit::kPairs);
    } else {
      copied(copied_element(p, unit - turning, kWidth));
    }
  }
}

// element of a row that a unit's a[i] is; b[i] is `pair_step` behind it
template <bool kInterleaved>
__device__ __forceinline__ int unit_element(const RopeCall& p, int pair, int i) {
  return p.offset + (kInterleaved ? 2 * (pair + i) : pair + i);
}

template <typename T, int kWidth>
__device__ __forceinline__ float row_rstd(const T* row, const QkNormRopeCall& p) {
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < p.rope.dim / kWidth; i += 32) {
    const Vec<T, kWidth> x = load_vec<kWidth>(row + i * kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = to_float(x[j]);
      sum += value * value;
    }
  }
  return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(p.rope.dim) + p.eps);
}

template <typename T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kNormThreads) qk_norm_rope_kernel(QkNormRopeCall p) {
  using Unit = RopeUnit<T, kWidth, kInterleaved>;
  const RopeCall& r = p.rope;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  if (row >= r.tokens * (r.tensors[0].heads + r.tensors[1].heads)) return;
  const NormRow where(r, row);
  const RopeTensor& x = r.tensors[where.which];
  const T* in = static_cast<const T*>(x.in) + where.at(x.in_strides);
  T* out = static_cast<T*>(x.out) + where.at(x.out_strides);
  const int pair_step = kInterleaved ? 1 : r.half;
  const float rstd = row_rstd<T, kWidth>(in, p);
  each_unit<T, kWidth, kInterleaved>(
      r,
      [&](int pair) {
        Unit values;
        float cos[Unit::kPairs], sin[Unit::kPairs];
        values.load(in, r, pair);
#pragma unroll
        for (int i = 0; i < Unit::kPairs; ++i) {
          const int element = unit_element<kInterleaved>(r, pair, i);
          values.a[i] *= rstd * norm_weight(p, where.which, element);
          values.b[i] *= rstd * norm_weight(p, where.which, element + pair_step);
        }
        // loaded this late, cos and sin leave the weights their registers: nothing spills on sm_100
        load_table<Unit::kPairs>(r, where.token, pair, cos, sin);
        values.rotate(cos, sin);
        values.store(out, r, pair);
      },
      [&](int first) {
        Vec<T, kWidth> values = load_vec<kWidth>(in + first);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          values[i] = from_float<T>(to_float(values[i]) * (rstd * norm_weight(p, where.which, first + i)));
        }
        store_vec(out + first, values);
      });
}

// with g the upstream gradient turned back, n = x * rstd: dweight += g * n, dx = rstd * (g w - n * mean(g w n))
template <typename T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kNormThreads, 1) qk_norm_rope_bwd_kernel(QkNormRopeCall p) {
  using Unit = RopeUnit<T, kWidth, kInterleaved>;
  const RopeCall& r = p.rope;
  const int dim = r.dim, warp = threadIdx.x / 32;
  const int pair_step = kInterleaved ? 1 : r.half;
  // [warps, 2, dim]; every element belongs to one lane of its warp
  TILEFUSE_DYNAMIC_SHARED(float, dweights);
  for (int i = threadIdx.x; i < kNormWarps * 2 * dim; i += kNormThreads) dweights[i] = 0.0f;
  __syncthreads();

  const int64_t rows = r.tokens * (r.tensors[0].heads + r.tensors[1].heads);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.rows_per_block;
  const int64_t end = begin + p.rows_per_block < rows ? begin + p.rows_per_block : rows;
  for (int64_t row = begin + warp; row < end; row += kNormWarps) {
    const NormRow where(r, row);
    const RopeTensor& x = r.tensors[where.which];
    const T* in = static_cast<const T*>(x.in) + where.at(x.in_strides);
    T* out = static_cast<T*>(x.out) + where.at(x.out_strides);
    const T* dout = static_cast<const T*>(p.dout[where.which]) + where.at(p.dout_strides[where.which]);
    float* dweight = dweights + (warp * 2 + where.which) * dim;
    const float rstd = row_rstd<T, kWidth>(in, p);

    // first the lane's share of sum(g w n) and its weight gradients, then with the mean dx
    const auto pass = [&](bool finish, float mean) {
      float sum = 0.0f;
      const auto one = [&](float g, float value, int element) {
        const float normed = value * rstd;
        const float scaled = g * norm_weight(p, where.which, element);
        if (!finish) {
          dweight[element] += g * normed;
          sum += scaled * normed;
        }
        return rstd * (scaled - normed * mean);
      };
      each_unit<T, kWidth, kInterleaved>(
          r,
          [&](int pair) {
            Unit g, values;
            float cos[Unit::kPairs], sin[Unit::kPairs];
            g.load(dout, r, pair);
            values.load(in, r, pair);
            load_table<Unit::kPairs>(r, where.token, pair, cos, sin);
            g.rotate(cos, sin);
#pragma unroll
            for (int i = 0; i < Unit::kPairs; ++i) {
              const int element = unit_element<kInterleaved>(r, pair, i);
              values.a[i] = one(g.a[i], values.a[i], element);
              values.b[i] = one(g.b[i], values.b[i], element + pair_step);
            }
            if (finish) values.store(out, r, pair);
          },
          [&](int first) {
            const Vec<T, kWidth> g = load_vec<kWidth>(dout + first);
            Vec<T, kWidth> values = load_vec<kWidth>(in + first);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              values[i] = from_float<T>(one(to_float(g[i]), to_float(values[i]), first + i));
            }
            if (finish) store_vec(out + first, values);
          });
      return sum;
    };
    const float mean = warp_sum(pass(false, 0.0f)) / static_cast<float>(dim);
    pass(true, mean);
  }

  __syncthreads();
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * dim;
  for (int i = threadIdx.x; i < 2 * dim; i += kNormThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kNormWarps; ++w) sum += dweights[w * 2 * dim + i];
    partial[i] = sum;
  }
}

// out[which][i] = sum over blocks of partial[block][which][i], in the order of the blocks
template <typename W>
__global__ void __launch_bounds__(kNormThreads)
    qk_norm_rope_weight_kernel(const float* partial, int blocks, int dim, W* q_out, W* k_out) {
  const int i = static_cast<int>(blockIdx.x) * kNormThreads + threadIdx.x;
  if (i >= 2 * dim) return;
  float sum = 0.0f;
  for (int block = 0; block < blocks; ++block) sum += partial[static_cast<int64_t>(block) * 2 * dim + i];
  (i < dim ? q_out[i] : k_out[i - dim]) = from_float<W>(sum);
}

// rows of one block of the backward: about a thousand blocks, whole rounds of the warps
inline int64_t norm_rows_per_block(int64_t rows) {
  return round_up<int64_t>(ceil_div<int64_t>(rows, 1024), kNormWarps);
}

template <typename T>
inline bool norm_vectorizes(const QkNormRopeCall& p) {
  bool ok = rope_vectorizes<T>(p.rope) && p.rope.dim % kVec16<T> == 0;
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < 3 && p.dout[which] != nullptr; ++i) {
      ok = ok && aligned(p.dout[which], p.dout_strides[which][i], sizeof(T), 16);
    }
  }
  return ok;
}

// calls launch(kernel, blocks, shared bytes); the backward when p.partial is set
template <typename T, bool kInterleaved, typename Launch>
inline void norm_rope_launch_as(const QkNormRopeCall& p, const Launch& launch) {
  const int64_t rows = p.rope.tokens * (p.rope.tensors[0].heads + p.rope.tensors[1].heads);
  const auto go = [&](auto forward, auto backward) {
    if (p.partial == nullptr) {
      launch(forward, ceil_div<int64_t>(rows, kNormWarps), 0);
    } else {
      launch(backward, ceil_div<int64_t>(rows, p.rows_per_block), kNormWarps * 2 * p.rope.dim * 4);
    }
  };
  constexpr int width = kVec16<T>;
  if (norm_vectorizes<T>(p)) {
    go(qk_norm_rope_kernel<T, width, kInterleaved>, qk_norm_rope_bwd_kernel<T, width, kInterleaved>);
  } else {
    go(qk_norm_rope_kernel<T, 1, kInterleaved>, qk_norm_rope_bwd_kernel<T, 1, kInterleaved>);
  }
}

template <typename T, typename Launch>
inline void norm_rope_launch(const QkNormRopeCall& p, const Launch& launch) {
  if (p.rope.interleaved) {
    norm_rope_launch_as<T, true>(p, launch);
  } else {
    norm_rope_launch_as<T, false>(p, launch);
  }
}

}  // namespace tilefuse
