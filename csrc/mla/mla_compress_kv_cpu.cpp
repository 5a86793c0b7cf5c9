// Latent rows from the raw down-projection, and the gradients back, on the CPU.
#include "mla/latent_cpu.h"

#include "common/stream_cpu.h"

namespace tilefuse {

struct MlaCompressKvBwdCall {
  LatentCall latent;
  const void* dout;
  int64_t dout_stride;
  void* out;
  // the weight's gradient over each block of tokens, [blocks, R]
  float* partial;
  bool stream;
};

// tokens whose part of the weight's gradient is one sum: fixed, so that the threads' number does not show
constexpr int64_t kTokens = 64;

namespace TILEFUSE_ISA {

namespace {

template <typename T>
void compress_gradient(const MlaCompressKvBwdCall& call, float* scratch, int64_t begin, int64_t end) {
  const LatentCall& latent = call.latent;
  const int64_t rank = latent.rank, rope = 2 * latent.half, width = rank + rope;
  float *x = scratch, *g = x + rank, *turned = g + width, *sine = turned + rope;
  T* image = reinterpret_cast<T*>(sine + latent.half);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t last = (block + 1) * kTokens < latent.tokens ? (block + 1) * kTokens : latent.tokens;
    float* partial = call.partial + block * rank;
    for (int64_t i = 0; i < rank; ++i) partial[i] = 0.0f;
    for (int64_t token = block * kTokens; token < last; ++token) {
      const T* in = static_cast<const T*>(latent.kv_a) + token * latent.kv_stride;
      const T* dout = static_cast<const T*>(call.dout) + token * call.dout_stride;
      for (int64_t i = 0; i < rank; ++i) x[i] = to_float(in[i]);
      const float rstd = rstd_of(x, rank, latent.eps);
      for (int64_t i = 0; i < width; ++i) g[i] = to_float(dout[i]);
      constexpr int64_t kSums = 32;
      float sums[kSums] = {};
      int64_t i = 0;
      for (; i + kSums <= rank; i += kSums) {
        for (int64_t j = 0; j < kSums; ++j) {
          const float normed = x[i + j] * rstd;
          const float scaled = g[i + j] * latent.weight[i + j];
          partial[i + j] += g[i + j] * normed;
          sums[j] += scaled * normed;
          x[i + j] = normed;
          g[i + j] = scaled;
        }
      }
      float dot = 0.0f;
      for (int64_t j = 0; j < kSums; ++j) dot += sums[j];
      for (; i < rank; ++i) {
        x[i] *= rstd;
        partial[i] += g[i] * x[i];
        g[i] *= latent.weight[i];
        dot += g[i] * x[i];
      }
      dot /= static_cast<float>(rank);
      for (i = 0; i < rank; ++i) g[i] = (g[i] - x[i] * dot) * rstd;
      if (rope > 0) {
        const int64_t position = latent.positions.data == nullptr ? token : latent.positions[token];
        const float* cos = latent.cos + position * latent.cos_stride;
        const float* sin = latent.sin + position * latent.sin_stride;
        // the transpose of a rotation turns the other way
        for (i = 0; i < latent.half; ++i) sine[i] = -sin[i];
        if (latent.interleaved) {
          rotate_interleaved(g + rank, turned, cos, sine, latent.half);
        } else {
          rotate_half(g + rank, turned, latent.half, cos, sine, latent.half);
        }
        for (i = 0; i < rope; ++i) g[rank + i] = turned[i];
      }
      T* to = static_cast<T*>(call.out) + token * width;
      store_row<T>(g, width, call.stream ? image : to);
      if (call.stream) stream_copy(to, image, width * static_cast<int64_t>(sizeof(T)));
    }
  }
  if (call.stream) stream_done();
}

}  // namespace

// scratch: 2 R + 3 r floats
void mla_compress_rows(const LatentCall& call, void* out, bool stream, float* scratch, int64_t begin, int64_t end) {
  const int64_t width = call.rank + 2 * call.half;
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    T* image = reinterpret_cast<T*>(scratch + width + 2 * call.half);
    for (int64_t token = begin; token < end; ++token) {
      T* to = static_cast<T*>(out) + token * width;
      latent_row<T>(call, token, scratch, scratch + width);
      store_row<T>(scratch, width, stream ? image : to);
      if (stream) stream_copy(to, image, width * static_cast<int64_t>(sizeof(T)));
    }
  })
  if (stream) stream_done();
}

// blocks [begin, end) of kTokens tokens; scratch: 3 R + 6 r floats
void mla_compress_gradients(const MlaCompressKvBwdCall& call, float* scratch, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.latent.dtype, T, { compress_gradient<T>(call, scratch, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_compress_rows)
TILEFUSE_DISPATCH(mla_compress_gradients)

namespace {

void check_positions(const LatentCall& call, int64_t table_rows) {
  for (int64_t i = 0; call.half > 0 && call.positions.data != nullptr && i < call.tokens; ++i) {
    const int64_t position = call.positions[i];
    if (position < 0 || position >= table_rows) {
      throw std::runtime_error("tilefuse.mla_compress_kv: positions must be in [0, " + std::to_string(table_rows) +
                               "), got " + std::to_string(position));
    }
  }
}

// bytes of output from which it is written past the caches. Smaller ones stay in a last-level cache, where the next
// kernel reads them and the allocator's next block lies.
constexpr int64_t kPastCaches = 4 * kStreamBytes;

bool streams(const Tensor& out) {
  const int64_t itemsize = static_cast<int64_t>(out.element_size());
  return out.size(1) * itemsize % 64 == 0 && out.numel() * itemsize >= kPastCaches;
}

Tensor mla_compress_kv_fwd(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, OptionalTensor positions, double eps,
                           bool interleaved) {
  const std::vector<float> weights = float_weight(weight);
  const LatentCall call = latent_call(kv_a, weights, cos, sin, positions, eps, interleaved);
  check_positions(call, cos.size(0));
  Tensor out = empty_contiguous(kv_a);
  run_parallel(mla_compress_rows, call.tokens, kLatentGrain, call, out.mutable_data_ptr(), streams(out),
               RangeScratch<float>{2 * call.rank + 6 * call.half});
  return out;
}

std::tuple<Tensor, Tensor> mla_compress_kv_bwd(Tensor dout, Tensor kv_a, Tensor weight, Tensor cos, Tensor sin,
                                               OptionalTensor positions, double eps, bool interleaved) {
  const std::vector<float> weights = float_weight(weight);
  MlaCompressKvBwdCall call{};
  call.latent = latent_call(kv_a, weights, cos, sin, positions, eps, interleaved);
  const int64_t rank = call.latent.rank;
  check_positions(call.latent, cos.size(0));
  Tensor out = empty_contiguous(kv_a), dweight = empty_contiguous(weight);
  call.dout = dout.const_data_ptr();
  call.dout_stride = stride_or_zero(dout, 0);
  call.out = out.mutable_data_ptr();
  call.stream = streams(out);
  const int64_t blocks = (call.latent.tokens + kTokens - 1) / kTokens;
  std::vector<float> partial(blocks * rank);
  call.partial = partial.data();
  run_parallel(mla_compress_gradients, blocks, 1, call, RangeScratch<float>{3 * rank + 12 * call.latent.half});
  std::vector<double> total(rank);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < rank; ++i) total[i] += static_cast<double>(partial[block * rank + i]);
  }
  TILEFUSE_BY_DTYPE(dtype_of(weight), T, {
    T* to = static_cast<T*>(dweight.mutable_data_ptr());
    for (int64_t i = 0; i < rank; ++i) to[i] = from_float<T>(static_cast<float>(total[i]));
  })
  return {out, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_compress_kv_fwd", TORCH_BOX(&mla_compress_kv_fwd));
  m.impl("mla_compress_kv_bwd", TORCH_BOX(&mla_compress_kv_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
