// What the CPU kernels of the rope family share: the call in plain values, and positions resolved and checked.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu.h"

namespace tilefuse {

// one tensor that a call rotates; batch, sequence and head strides in elements
struct RopeTensor {
  const void* in;
  void* out;
  int64_t in_strides[3];
  int64_t out_strides[3];
  int64_t heads;
};

struct RopeCall {
  RopeTensor tensors[2];
  int count;
  Dtype dtype;
  int64_t tokens, seq_len, dim, half, offset;
  const float* cos;
  const float* sin;
  int64_t cos_stride, sin_stride;
  // table row of every token (of every axis under mrope), or null: the row is the place in the sequence
  const int64_t* rows;
  bool interleaved, conjugate, mrope, mrope_interleaved;
  int64_t section[3];
};

namespace TILEFUSE_ISA {

// pairs whose cos and sin are prepared at a time
constexpr int64_t kPairs = 128;

static inline int mrope_axis(const RopeCall& call, int64_t pair) {
  if (call.mrope_interleaved) {
    if (pair % 3 == 1 && pair < 3 * call.section[1]) return 1;
    if (pair % 3 == 2 && pair < 3 * call.section[2]) return 2;
    return 0;
  }
  return (pair >= call.section[0]) + (pair >= call.section[0] + call.section[1]);
}

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

// in and out may be the same memory: an iteration reads what it writes and nothing else
template <typename T>
static inline void rotate_half(const T* in, T* out, int64_t half, const float* cos, const float* sin, int64_t n) {
  const T* in_b = in + half;
  T* out_b = out + half;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
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
      for (int which = 0; which < call.count; ++which) {
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

#ifdef TILEFUSE_REGISTER

using torch::stable::Tensor;

// int32 or int64 values
struct IndexData {
  const void* data;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

inline IndexData index_data(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == torch::headeronly::ScalarType::Long};
}

// Table rows of all tokens. Small calls stay on the stack.
class RopeRows {
 public:
  // raises before anything is written
  RopeRows(const char* op, RopeCall& call, int64_t batch, int64_t table_rows, const std::optional<Tensor>& positions,
           const std::optional<Tensor>& cu_seqlens) {
    if (!positions && !cu_seqlens) return;
    const int64_t tokens = call.tokens, seq_len = call.seq_len;
    const bool mrope = call.mrope;
    const int64_t total = mrope ? 3 * tokens : tokens;
    if (total > kSmall) heap_.resize(total);
    int64_t* rows = total > kSmall ? heap_.data() : small_;
    call.rows = rows;
    int64_t low = 0, high = 0;
    if (positions) {
      const IndexData data = index_data(*positions);
      const int64_t lead = mrope ? 1 : 0;
      const int64_t axis_stride = mrope ? positions->stride(0) : 0;
      const bool packed = positions->dim() == 1 + lead;
      const int64_t batch_stride = packed ? 0 : positions->stride(lead);
      const int64_t stride = positions->stride(packed ? lead : lead + 1);
      int64_t i = 0;
      for (int64_t axis = 0; axis < (mrope ? 3 : 1); ++axis) {
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t base = axis * axis_stride + b * batch_stride;
          for (int64_t s = 0; s < seq_len; ++s, ++i) {
            rows[i] = data[base + s * stride];
            low = rows[i] < low ? rows[i] : low;
            high = rows[i] > high ? rows[i] : high;
          }
        }
      }
    } else {
      const IndexData bounds = index_data(*cu_seqlens);
      const int64_t stride = cu_seqlens->stride(0), count = cu_seqlens->size(0);
      for (int64_t t = 0; t < tokens; ++t) {
        // number of boundaries at or before the token
        int64_t first = 0, last = count;
        while (first < last) {
          const int64_t middle = (first + last) / 2;
          if (bounds[middle * stride] <= t) {
            first = middle + 1;
          } else {
            last = middle;
          }
        }
        rows[t] = t - (first > 0 ? bounds[(first - 1) * stride] : 0);
        low = rows[t] < low ? rows[t] : low;
        high = rows[t] > high ? rows[t] : high;
      }
    }
    if (low < 0 || high >= table_rows) {
      const std::string worst = std::to_string(low < 0 ? low : high), limit = std::to_string(table_rows);
      throw std::runtime_error(
          std::string("tilefuse.") + op +
          (positions ? ": positions must be in [0, " + limit + "), got " + worst
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

inline void set_strides(int64_t* strides, const Tensor& t) {
  const bool packed = t.dim() == 3;
  strides[0] = packed ? 0 : t.stride(0);
  strides[1] = t.stride(packed ? 0 : 1);
  strides[2] = t.stride(packed ? 1 : 2);
}

inline RopeTensor rope_tensor(const Tensor& in, const Tensor& out) {
  RopeTensor tensor;
  tensor.in = in.const_data_ptr();
  tensor.out = out.mutable_data_ptr();
  set_strides(tensor.in_strides, in);
  set_strides(tensor.out_strides, out);
  tensor.heads = in.size(in.dim() - 2);
  return tensor;
}

// Fresh memory of a large output costs more in page faults than the kernel does; huge pages cut their number by 512.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHuge = 2 << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  // a hint: where it is refused the small pages do
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// a contiguous tensor like `t`, without the cost of a dispatcher call
inline Tensor empty_contiguous(const Tensor& t) {
  const auto sizes = t.sizes();
  int64_t strides[8];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  int32_t dtype, device_type;
  aoti_torch_get_dtype(t.get(), &dtype);
  aoti_torch_get_device_type(t.get(), &device_type);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         dtype, device_type, t.get_device_index(), &handle));
  Tensor out(handle);
  prefer_huge_pages(out.mutable_data_ptr(), stride * static_cast<int64_t>(out.element_size()));
  return out;
}

// pairs of each axis; absent without mrope
using Section = std::optional<std::vector<int64_t>>;

// fills the call and resolves its positions, which live in the returned object; raises before anything is written
inline RopeRows rope_call(const char* op, RopeCall& call, const Tensor& q, const Tensor* k, const Tensor& q_out,
                          const Tensor* k_out, const Tensor& cos, const Tensor& sin,
                          const std::optional<Tensor>& positions, const std::optional<Tensor>& cu_seqlens,
                          bool interleaved, int64_t rotary_offset, bool conjugate, const Section& section,
                          bool mrope_interleaved) {
  const int64_t rank = q.dim();
  const int64_t batch = rank == 4 ? q.size(0) : 1;
  call.count = k == nullptr ? 1 : 2;
  call.tensors[0] = rope_tensor(q, q_out);
  if (k != nullptr) call.tensors[1] = rope_tensor(*k, *k_out);
  call.dtype = dtype_of(q);
  call.seq_len = q.size(rank - 3);
  call.tokens = batch * call.seq_len;
  call.dim = q.size(rank - 1);
  call.half = cos.size(1);
  call.offset = rotary_offset;
  call.cos = static_cast<const float*>(cos.const_data_ptr());
  call.sin = static_cast<const float*>(sin.const_data_ptr());
  call.cos_stride = cos.stride(0);
  call.sin_stride = sin.stride(0);
  call.interleaved = interleaved;
  call.conjugate = conjugate;
  call.mrope = section.has_value();
  call.mrope_interleaved = mrope_interleaved;
  for (size_t i = 0; section && i < section->size() && i < 3; ++i) call.section[i] = (*section)[i];
  return RopeRows(op, call, batch, cos.size(0), positions, cu_seqlens);
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
