// Rotary embedding and the write into a paged cache on the CPU.
#include "common/fp8.h"
#include "rope/rope_cpu.h"

namespace tilefuse {

enum class CacheDtype : int32_t { f32, bf16, f16, e4m3 };

struct RopeAppendKvCall {
  RopeCall rope;      // tensors[0] is q
  const void* in[2];  // k, v
  int64_t in_strides[2][3];
  void* cache[2];
  int64_t cache_strides[2][3];  // page, place in the page, head
  int64_t heads, dims[2], page_size;
  float scale[2];
  CacheDtype cache_dtype;
  Index slots;
  int64_t slot_strides[2];
};

namespace TILEFUSE_ISA {

namespace {

struct e4m3 {
  uint8_t bits;
};

template <typename C>
inline C to_cache(float x, float) {
  return from_float<C>(x);
}

template <>
inline e4m3 to_cache<e4m3>(float x, float scale) {
  return e4m3{fp8::quantize(x, scale)};
}

template <typename T, typename C>
struct SameType {
  static constexpr bool value = false;
};
template <typename T>
struct SameType<T, T> {
  static constexpr bool value = true;
};

template <typename T, typename C>
inline void convert(const T* in, C* out, int64_t n, float scale) {
  if (SameType<T, C>::value) {
    std::memcpy(static_cast<void*>(out), in, n * sizeof(T));
    return;
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = to_cache<C>(to_float(in[i]), scale);
}

template <typename T, typename C>
void append_token(const RopeAppendKvCall& append, int64_t token, int64_t slot, const float* cos, const float* sin,
                  float* row) {
  const RopeCall& call = append.rope;
  const int64_t batch = token / call.seq_len, place = token % call.seq_len;
  const int64_t page = slot / append.page_size, offset = slot % append.page_size;
  for (int which = 0; which < 2; ++which) {
    const int64_t *from = append.in_strides[which], *to = append.cache_strides[which];
    const T* in = static_cast<const T*>(append.in[which]) + batch * from[0] + place * from[1];
    C* out = static_cast<C*>(append.cache[which]) + page * to[0] + offset * to[1];
    const float scale = append.scale[which];
    for (int64_t head = 0; head < append.heads; ++head, in += from[2], out += to[2]) {
      if (which == 1) {
        convert(in, out, append.dims[1], scale);
        continue;
      }
      const int64_t start = call.offset, width = 2 * call.half, end = start + width;
      for (int64_t i = 0; i < width; ++i) row[i] = to_float(in[start + i]);
      if (call.interleaved) {
        rotate_interleaved(row, row, cos, sin, call.half);
      } else {
        rotate_half(row, row, call.half, cos, sin, call.half);
      }
      convert(in, out, start, scale);
      convert(row, out + start, width, scale);
      convert(in + end, out + end, call.dim - end, scale);
    }
  }
}

template <typename T>
void append_row(const RopeAppendKvCall& append, int64_t token, int64_t slot, const float* cos, const float* sin,
                float* row) {
  switch (append.cache_dtype) {
    case CacheDtype::f32:
      return append_token<T, float>(append, token, slot, cos, sin, row);
    case CacheDtype::bf16:
      return append_token<T, bf16>(append, token, slot, cos, sin, row);
    case CacheDtype::f16:
      return append_token<T, f16>(append, token, slot, cos, sin, row);
    case CacheDtype::e4m3:
      return append_token<T, e4m3>(append, token, slot, cos, sin, row);
  }
}

}  // namespace

// row: as many floats as are rotated
void rope_append_tokens(const RopeAppendKvCall& append, float* row, int64_t begin, int64_t end) {
  const RopeCall& call = append.rope;
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    if (call.interleaved) {
      rotate_tokens<T, true>(call, begin, end);
    } else {
      rotate_tokens<T, false>(call, begin, end);
    }
  })
  for (int64_t token = begin; token < end; ++token) {
    const int64_t at = token / call.seq_len * append.slot_strides[0] + token % call.seq_len * append.slot_strides[1];
    const int64_t slot = append.slots[at];
    if (slot < 0) continue;
    const float *cos, *sin;
    token_table(call, token, 0, call.half, nullptr, nullptr, &cos, &sin);
    TILEFUSE_BY_DTYPE(call.dtype, T, { append_row<T>(append, token, slot, cos, sin, row); })
  }
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(rope_append_tokens)

namespace {

CacheDtype cache_dtype_of(const Tensor& cache) {
  if (cache.scalar_type() == ScalarType::Float8_e4m3fn) return CacheDtype::e4m3;
  switch (dtype_of(cache)) {
    case Dtype::bf16:
      return CacheDtype::bf16;
    case Dtype::f16:
      return CacheDtype::f16;
    default:
      return CacheDtype::f32;
  }
}

Tensor rope_append_kv_fwd(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache,
                          Tensor v_cache, Tensor slot_mapping, bool interleaved, int64_t rotary_offset, double k_scale,
                          double v_scale) {
  Tensor q_out = empty_contiguous(q);
  RopeAppendKvCall append{};
  append.rope = rope_call(q, nullptr, q_out, nullptr, cos, sin, positions, std::nullopt, interleaved, rotary_offset,
                          false, true, {}, false);
  const RopeRows rows("rope_append_kv", append.rope);
  const Tensor* in[2] = {&k, &v};
  const Tensor* cache[2] = {&k_cache, &v_cache};
  for (int which = 0; which < 2; ++which) {
    append.in[which] = in[which]->const_data_ptr();
    set_strides(append.in_strides[which], *in[which]);
    append.cache[which] = cache[which]->mutable_data_ptr();
    for (int i = 0; i < 3; ++i) append.cache_strides[which][i] = cache[which]->stride(i);
    append.dims[which] = in[which]->size(in[which]->dim() - 1);
  }
  append.heads = k.size(k.dim() - 2);
  append.page_size = k_cache.size(1);
  append.scale[0] = static_cast<float>(k_scale);
  append.scale[1] = static_cast<float>(v_scale);
  append.cache_dtype = cache_dtype_of(k_cache);
  append.slots = index_of(slot_mapping);
  const bool packed = slot_mapping.dim() == 1;
  append.slot_strides[0] = packed ? 0 : slot_mapping.stride(0);
  append.slot_strides[1] = slot_mapping.stride(packed ? 0 : 1);
  const int64_t limit = k_cache.size(0) * k_cache.size(1), seq_len = append.rope.seq_len;
  for (int64_t token = 0; token < append.rope.tokens; ++token) {
    const int64_t slot =
        append.slots[token / seq_len * append.slot_strides[0] + token % seq_len * append.slot_strides[1]];
    if (slot >= limit) {
      throw std::runtime_error("tilefuse.rope_append_kv: slot_mapping must be below pages * page_size = " +
                               std::to_string(limit) + ", got " + std::to_string(slot));
    }
  }
  const int64_t work = (append.rope.tensors[0].heads + 2 * append.heads) * append.rope.dim;
  run_parallel(rope_append_tokens, append.rope.tokens, 1 + 32768 / (1 + work), append,
               RangeScratch<float>{2 * append.rope.half});
  return q_out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) { m.impl("rope_append_kv_fwd", TORCH_BOX(&rope_append_kv_fwd)); }

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
