// What the CPU kernels of the rope family share: rotation of a row, and positions resolved and checked.
#pragma once

#include "common/cpu.h"
#include "common/floats_cpu.h"
#include "rope/rope.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

// pairs whose cos and sin are prepared at a time
constexpr int64_t kPairs = 128;

// cos and sin of `n` pairs from `first` for one token, copied to the buffers only if they must change
static inline void token_table(const RopeCall& call, int64_t token, int64_t first, int64_t n, float* cos_buffer,
                               float* sin_buffer, const float** cos, const float** sin) {
  const int64_t row = call.rows != nullptr ? call.rows[token] : token % call.seq_len;
  *cos = call.cos + row * call.cos_stride + first;
  *sin = call.sin + row * call.sin_stride + first;
  if (call.mrope) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t own = call.rows[mrope_axis(call, first + i) * call.tokens + token];
      cos_buffer[i] = call.cos[own * call.cos_stride + first + i];
      sin_buffer[i] = call.sin[own * call.sin_stride + first + i];
    }
    *cos = cos_buffer;
    *sin = sin_buffer;
  }
  if (call.conjugate) {
    for (int64_t i = 0; i < n; ++i) sin_buffer[i] = -(*sin)[i];
    *sin = sin_buffer;
  }
}

#if defined(__AVX512BF16__)

// whole vectors of a row in bfloat16; the number of pairs done
static inline int64_t rotate_half_vectors(const bf16* in, bf16* out, int64_t half, const float* cos, const float* sin,
                                          int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 a = load_bf16(in + i), b = load_bf16(in + half + i);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    store_bf16(out + i, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)));
    store_bf16(out + half + i, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
  }
  return i;
}

#endif

// other types, and where the compiler does as well
template <typename T>
static inline int64_t rotate_half_vectors(const T*, T*, int64_t, const float*, const float*, int64_t) {
  return 0;
}

// in and out may be the same memory: an iteration reads what it writes and nothing else
template <typename T>
static inline void rotate_half(const T* in, T* out, int64_t half, const float* cos, const float* sin, int64_t n) {
  const T* in_b = in + half;
  T* out_b = out + half;
  const int64_t done = rotate_half_vectors(in, out, half, cos, sin, n);
#pragma GCC ivdep
  for (int64_t i = done; i < n; ++i) {
    const float a = to_float(in[i]), b = to_float(in_b[i]);
    out[i] = from_float<T>(a * cos[i] - b * sin[i]);
    out_b[i] = from_float<T>(b * cos[i] + a * sin[i]);
  }
}

template <typename T>
static inline void rotate_interleaved(const T* in, T* out, const float* cos, const float* sin, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float a = to_float(in[2 * i]), b = to_float(in[2 * i + 1]);
    out[2 * i] = from_float<T>(a * cos[i] - b * sin[i]);
    out[2 * i + 1] = from_float<T>(b * cos[i] + a * sin[i]);
  }
}

template <typename T, bool kInterleaved>
static void rotate_tokens(const RopeCall& call, int64_t begin, int64_t end) {
  float cos_buffer[kPairs], sin_buffer[kPairs];
  const int64_t rotary_end = call.offset + 2 * call.half;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / call.seq_len, place = token % call.seq_len;
    for (int64_t first = 0; first < call.half; first += kPairs) {
      const int64_t n = call.half - first < kPairs ? call.half - first : kPairs;
      const float *cos, *sin;
      token_table(call, token, first, n, cos_buffer, sin_buffer, &cos, &sin);
      for (int which = 0; which < 2; ++which) {
        const RopeTensor& x = call.tensors[which];
        const T* in = static_cast<const T*>(x.in) + batch * x.in_strides[0] + place * x.in_strides[1];
        T* out = static_cast<T*>(x.out) + batch * x.out_strides[0] + place * x.out_strides[1];
        const int64_t start = call.offset + (kInterleaved ? 2 * first : first);
        for (int64_t head = 0; head < x.heads; ++head, in += x.in_strides[2], out += x.out_strides[2]) {
          if (kInterleaved) {
            rotate_interleaved(in + start, out + start, cos, sin, n);
          } else {
            rotate_half(in + start, out + start, call.half, cos, sin, n);
          }
          if (first == 0 && in != out) {
            std::memcpy(out, in, call.offset * sizeof(T));
            std::memcpy(out + rotary_end, in + rotary_end, (call.dim - rotary_end) * sizeof(T));
          }
        }
      }
    }
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse

#ifdef TILEFUSE_REGISTER

#include "rope/rope_host.h"

namespace tilefuse {

// Table rows of all tokens. Small calls stay on the stack.
class RopeRows {
 public:
  // raises before anything is written
  RopeRows(const char* op, RopeCall& call) {
    const bool listed = call.positions.data != nullptr;
    if (!listed && call.bounds.data == nullptr) return;
    const int64_t tokens = call.tokens, total = call.mrope ? 3 * tokens : tokens;
    if (total > kSmall) heap_.resize(total);
    int64_t* rows = total > kSmall ? heap_.data() : small_;
    call.rows = rows;
    if (listed) {
      const int64_t* strides = call.position_strides;
      const int64_t batch = tokens == 0 ? 0 : tokens / call.seq_len;
      int64_t i = 0;
      for (int64_t axis = 0; axis < (call.mrope ? 3 : 1); ++axis) {
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t base = axis * strides[0] + b * strides[1];
          for (int64_t s = 0; s < call.seq_len; ++s, ++i) rows[i] = call.positions[base + s * strides[2]];
        }
      }
    } else {
      for (int64_t t = 0; t < tokens; ++t) rows[t] = packed_place(call, t);
    }
    int64_t low = 0, high = 0;
    for (int64_t i = 0; i < total; ++i) {
      low = rows[i] < low ? rows[i] : low;
      high = rows[i] > high ? rows[i] : high;
    }
    if (low < 0 || high >= call.table_rows) {
      const std::string worst = std::to_string(low < 0 ? low : high), limit = std::to_string(call.table_rows);
      throw std::runtime_error(
          std::string("tilefuse.") + op +
          (listed ? ": positions must be in [0, " + limit + "), got " + worst
                  : ": cos must be a table that holds every position, " + worst + " too, got " + limit + " rows"));
    }
  }

  // the call points into this object
  RopeRows(const RopeRows&) = delete;

 private:
  static constexpr int64_t kSmall = 64;
  int64_t small_[kSmall];
  std::vector<int64_t> heap_;
};

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
