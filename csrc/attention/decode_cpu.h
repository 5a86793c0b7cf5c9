// Attention of a few query rows over many keys on the CPU: every key is read once, where it lies, for all rows of its
// head, and dot products run along the head dim. What tiles_cpu.h does for many rows.
//
// Keys are taken a block of kKeys at a time. `Element` is what rows, keys, values and weights are multiplied as, kStep
// of them in one register, and widths are padded to that.
#pragma once

#include "attention/tiles_cpu.h"
#include "common/fp8.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

constexpr int kKeys = 64;
// sums that the registers hold beside their operands
#if defined(__AVX512F__)
constexpr int kSums = 16;
#else
constexpr int kSums = 8;
#endif

static inline float largest_lane(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < kWidth; ++i) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

// out[i] = sum of the lanes of x[i]
static inline void sum_lanes(const vec (&x)[kSums], float* out) {
#if defined(__AVX512F__)
  __m512d pairs[8];
  __m512 fours[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    pairs[i] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[2 * i], pairs[2 * i + 1])),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[2 * i], pairs[2 * i + 1])));
  }
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44), _mm512_shuffle_f32x4(fours[0], fours[1], 0xee));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44), _mm512_shuffle_f32x4(fours[2], fours[3], 0xee));
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#else
  for (int i = 0; i < kSums; ++i) {
    float sum = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) sum += x[i][lane];
    out[i] = sum;
  }
#endif
}

struct Float32Rows {
  using Element = float;
  using Register = vec;
  // keys whose weights are multiplied at once, and registers of sums for one of values
  static constexpr int kPair = 1, kParts = 1, kStep = kWidth;

  static inline Register read(const float* x) { return load(x); }
  static inline Register weight(const float* w) { return splat(*w); }
  static inline vec multiply_add(Register a, Register b, vec c) { return a * b + c; }
  static inline void values(const float* const* v, int64_t d, Register (&out)[kParts]) { out[0] = load(v[0] + d); }
  // kStep sums in the order of their columns
  static inline void in_order(const float* sums, float* out) { store(out, load(sums)); }
  static inline const float* weights(const float* p, int64_t, float*) { return p; }
};

#if defined(__AVX512BF16__)
struct Bfloat16Rows {
  using Element = bf16;
  using Register = __m512i;
  static constexpr int kPair = 2, kParts = 2, kStep = 32;

  static inline Register read(const bf16* x) { return _mm512_loadu_si512(x); }
  static inline Register weight(const bf16* w) {
    int32_t both;
    std::memcpy(&both, w, 4);
    return _mm512_set1_epi32(both);
  }
  static inline vec multiply_add(Register a, Register b, vec c) {
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // columns of two keys side by side, 128 bits of them at a time
  static inline void values(const bf16* const* v, int64_t d, Register (&out)[kParts]) {
    const __m512i a = read(v[0] + d), b = read(v[1] + d);
    out[0] = _mm512_unpacklo_epi16(a, b);
    out[1] = _mm512_unpackhi_epi16(a, b);
  }
  static inline void in_order(const float* sums, float* out) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(out + 8 * i, sums + 4 * i, 4 * sizeof(float));
      std::memcpy(out + 8 * i + 4, sums + 16 + 4 * i, 4 * sizeof(float));
    }
  }
  static inline const bf16* weights(const float* p, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; i += 16) {
      const __m256i packed = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
    }
    return out;
  }
};
#endif

// how a tensor of T is multiplied
template <typename T>
struct RowsOf {
  using type = Float32Rows;
};
#if defined(__AVX512BF16__)
template <>
struct RowsOf<bf16> {
  using type = Bfloat16Rows;
};
#endif

static inline int64_t padded_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <typename E>
static inline void read_codes(const uint8_t* codes, int64_t count, E* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<E>(fp8::decode(codes[i]));
}
#if defined(__AVX512BF16__)
// The upper byte of a bfloat16 follows from the code's exponent, the lower one is the code shifted; what is below the
// smallest exponent has tables of its own.
static inline void read_codes(const uint8_t* codes, int64_t count, bf16* out) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i upper = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0x3c, 0x3c, 0x3d, 0x3d, 0x3e, 0x3e, 0x3f, 0x3f, 0x40, 0x40, 0x41, 0x41, 0x42, 0x42, 0x43, 0x43));
  // 0 to 7 times 2^-9
  const __m512i small_upper =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m512i small_lower = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 0, -0x80, static_cast<char>(0xc0), 0, 0x20, 0x40, 0x60, 0, 0, 0, 0, 0, 0, 0, 0));
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t left = count - i < 64 ? count - i : 64;
    const __mmask64 there = left == 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    const __m512i x = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(there, codes + i));
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi8(0x7f));
    const __mmask64 small = _mm512_cmplt_epu8_mask(magnitude, _mm512_set1_epi8(8));
    const __mmask64 nan = _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f));
    const __m512i exponent = _mm512_and_si512(_mm512_srli_epi16(x, 3), _mm512_set1_epi8(15));
    __m512i high = _mm512_shuffle_epi8(upper, exponent);
    __m512i low = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi8(static_cast<char>(0xf0)));
    high = _mm512_mask_shuffle_epi8(high, small, small_upper, magnitude);
    low = _mm512_mask_shuffle_epi8(low, small, small_lower, magnitude);
    high = _mm512_mask_mov_epi8(high, nan, _mm512_set1_epi8(0x7f));
    // high | (x & 0x80)
    high = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8(-0x80), 0xf8);
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    if (left == 64) {
      _mm512_storeu_si512(out + i, first);
      _mm512_storeu_si512(out + i + 32, second);
    } else {
      _mm512_mask_storeu_epi16(out + i, static_cast<__mmask32>(there), first);
      _mm512_mask_storeu_epi16(out + i + 32, static_cast<__mmask32>(there >> 32), second);
    }
  }
}
#endif

// s [NR][kKeys] = q [NR][width] times keys; `ahead` are fetched meanwhile, into the second-level cache: many more loads
// may be on their way there than to the first
template <typename P, int NR>
static void dot_keys(const typename P::Element* q, int64_t width, const typename P::Element* const* k, int64_t count,
                     const void* const* ahead, int64_t ahead_bytes, float* s) {
  constexpr int kNow = kSums / NR;
  for (int64_t n = 0; n < count; n += kNow) {
    for (int j = 0; j < kNow && ahead != nullptr; ++j) {
      const char* line = static_cast<const char*>(ahead[n + j]);
      for (int64_t i = 0; i < ahead_bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
    }
    vec sums[kSums] = {};
    for (int64_t d = 0; d < width; d += P::kStep) {
      typename P::Register x[NR];
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) x[r] = P::read(q + r * width + d);
#pragma GCC unroll 16
      for (int j = 0; j < kNow; ++j) {
        const typename P::Register y = P::read(k[n + j] + d);
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) sums[r * kNow + j] = P::multiply_add(x[r], y, sums[r * kNow + j]);
      }
    }
    float out[kSums];
    sum_lanes(sums, out);
    for (int r = 0; r < NR; ++r) std::memcpy(s + r * kKeys + n, out + r * kNow, kNow * sizeof(float));
  }
}

// NS registers of values of each key, from column d: acc [NR][width] += w [NR][kKeys] times values
template <typename P, int NR, int NS>
static inline void add_columns(const typename P::Element* w, const typename P::Element* const* v, int64_t count,
                               int64_t d, int64_t width, float* acc) {
  constexpr int kOut = NS * P::kParts;
  vec sums[NR][kOut];
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) sums[r][i] = load(acc + r * width + d + i * kWidth);
  for (int64_t n = 0; n < count; n += P::kPair) {
    typename P::Register x[NR];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) x[r] = P::weight(w + r * kKeys + n);
#pragma GCC unroll 4
    for (int s = 0; s < NS; ++s) {
      typename P::Register y[P::kParts];
      P::values(v + n, d + s * P::kStep, y);
#pragma GCC unroll 2
      for (int part = 0; part < P::kParts; ++part)
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r)
          sums[r][s * P::kParts + part] = P::multiply_add(x[r], y[part], sums[r][s * P::kParts + part]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) store(acc + r * width + d + i * kWidth, sums[r][i]);
}

template <typename P, int NR>
static void add_values(const typename P::Element* w, const typename P::Element* const* v, int64_t count, int64_t width,
                       const void* const* ahead, int64_t ahead_bytes, float* acc) {
  constexpr int kSteps = kSums / 4 / P::kParts;
  int64_t d = 0;
  for (; d + kSteps * P::kStep <= width; d += kSteps * P::kStep) {
    // a share of the lines with each group of columns
    if (ahead != nullptr) {
      const int64_t from = d * ahead_bytes / width / 64 * 64;
      const int64_t to =
          d + 2 * kSteps * P::kStep > width ? ahead_bytes : (d + kSteps * P::kStep) * ahead_bytes / width / 64 * 64;
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = from; i < to; i += 64) __builtin_prefetch(static_cast<const char*>(ahead[n]) + i, 0, 2);
    }
    add_columns<P, NR, kSteps>(w, v, count, d, width, acc);
  }
  for (; d < width; d += P::kStep) add_columns<P, NR, 1>(w, v, count, d, width, acc);
}

// a query row: which positions it sees, where it stands, its ALiBi slope
struct DecodeRow {
  int32_t low, high, at;
  float slope;
};

// a block of keys of one kv head: where its rows are stored, null where there is none
struct DecodeKeys {
  const void *k[kKeys], *v[kKeys];
};

// The softmax of `states` query rows, those of a kv head side by side. Every block of keys is met by the rows of its
// head.
template <typename T>
class Decode {
  using P = typename RowsOf<T>::type;
  using Element = typename P::Element;

 public:
  static constexpr int64_t kRowsAtOnce = 16;

  static size_t bytes(int64_t states, int64_t dim, int64_t dim_v) {
    const int64_t width = padded_to(dim, P::kStep), width_v = padded_to(dim_v, P::kStep);
    return sizeof(Element) * (width * (states + kKeys + 1) + width_v * (kKeys + 1) + kRowsAtOnce * kKeys) +
           sizeof(float) * (states * (width_v + kWidth + 1) + kRowsAtOnce * kKeys) + 1024;
  }

  Decode(Scratch& scratch, int64_t states, int64_t dim, int64_t dim_v, bool fp8)
      : states_(states),
        dim_(dim),
        dim_v_(dim_v),
        width_(padded_to(dim, P::kStep)),
        width_v_(padded_to(dim_v, P::kStep)),
        fp8_(fp8),
        q_(scratch.take<Element>(states * width_)),
        k_(scratch.take<Element>(kKeys * width_)),
        v_(scratch.take<Element>(kKeys * width_v_)),
        nothing_(scratch.take<Element>(width_ + width_v_)),
        w_(scratch.take<Element>(kRowsAtOnce * kKeys)),
        s_(scratch.take<float>(kRowsAtOnce * kKeys)),
        acc_(scratch.take<float>(states * width_v_)),
        total_(scratch.take<float>(states * kWidth)),
        top_(scratch.take<float>(states)) {
    std::memset(static_cast<void*>(q_), 0, states * width_ * sizeof(Element));
    std::memset(static_cast<void*>(k_), 0, kKeys * width_ * sizeof(Element));
    std::memset(static_cast<void*>(v_), 0, kKeys * width_v_ * sizeof(Element));
    std::memset(static_cast<void*>(nothing_), 0, (width_ + width_v_) * sizeof(Element));
  }

  void begin() {
    std::memset(acc_, 0, states_ * width_v_ * sizeof(float));
    std::memset(total_, 0, states_ * kWidth * sizeof(float));
    for (int64_t i = 0; i < states_; ++i) top_[i] = -kInfinity;
  }

  void query(int64_t state, const T* q) {
    Element* to = q_ + state * width_;
    if constexpr (sizeof(T) == sizeof(Element)) {
      std::memcpy(static_cast<void*>(to), q, dim_ * sizeof(T));
    } else {
      for (int64_t d = 0; d < dim_; ++d) to[d] = from_float<Element>(to_float(q[d]));
    }
  }

  // `count` keys for `rows` rows from `state` on, while those of `next` are fetched
  void keys(int64_t state, int64_t rows, const DecodeKeys& keys, const DecodeKeys& next, const int32_t* position,
            int64_t count, const DecodeRow* of, const Score& score, bool mask) {
    const Element *k[kKeys], *v[kKeys];
    const int64_t padded = padded_to(count, 16);
    const int64_t bytes = dim_ * stored(), bytes_v = dim_v_ * stored();
    read(keys.k, count, padded, dim_, width_, k_, k);
    for (int64_t r = 0; r < rows;) {
      const void* const* ahead = r == 0 ? next.k : nullptr;
      const Element* q = q_ + (state + r) * width_;
      float* s = s_ + r * kKeys;
      if (rows - r >= 4) {
        dot_keys<P, 4>(q, width_, k, padded, ahead, bytes, s);
        r += 4;
      } else if (rows - r >= 2) {
        dot_keys<P, 2>(q, width_, k, padded, ahead, bytes, s);
        r += 2;
      } else {
        dot_keys<P, 1>(q, width_, k, padded, ahead, bytes, s);
        r += 1;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      softmax(state + r, s_ + r * kKeys, position, padded, of[r], score, mask || padded != count);
    }
    const Element* w = P::weights(s_, rows * kKeys, w_);
    read(keys.v, count, padded, dim_v_, width_v_, v_, v);
    for (int64_t r = 0; r < rows;) {
      const void* const* ahead = r == 0 ? next.v : nullptr;
      float* acc = acc_ + (state + r) * width_v_;
      if (rows - r >= 4) {
        add_values<P, 4>(w + r * kKeys, v, padded, width_v_, ahead, bytes_v, acc);
        r += 4;
      } else if (rows - r >= 2) {
        add_values<P, 2>(w + r * kKeys, v, padded, width_v_, ahead, bytes_v, acc);
        r += 2;
      } else {
        add_values<P, 1>(w + r * kKeys, v, padded, width_v_, ahead, bytes_v, acc);
        r += 1;
      }
    }
  }

  // the sums of a row as they are, relative to e^top
  void partial(int64_t state, float* acc, float* top, float* total) const {
    std::memcpy(acc, acc_ + state * width_v_, width_v_ * sizeof(float));
    *top = top_[state];
    *total = sum_of(total_ + state * kWidth);
  }

  void end(int64_t state, const float* sink, float scale, T* out, float* lse) const {
    finish(acc_ + state * width_v_, top_[state], sum_of(total_ + state * kWidth), dim_v_, sink, scale, out, lse);
  }

  // a row from its sums
  static void finish(const float* acc, float top, float total, int64_t dim_v, const float* sink, float scale, T* out,
                     float* lse) {
    if (sink != nullptr && *sink != -kInfinity) {
      const float larger = top > *sink ? top : *sink;
      const float shrink = top == larger ? 1.0f : std::exp(top - larger);
      total = total * shrink + (*sink == larger ? 1.0f : std::exp(*sink - larger));
      scale *= shrink;
      top = larger;
    }
    const float factor = total == 0.0f ? 0.0f : scale / total;
    for (int64_t first = 0; first < dim_v; first += P::kStep) {
      float x[P::kStep];
      P::in_order(acc + first, x);
      const int64_t count = dim_v - first < P::kStep ? dim_v - first : P::kStep;
      for (int64_t d = 0; d < count; ++d) out[first + d] = from_float<T>(x[d] * factor);
    }
    *lse = total == 0.0f ? -kInfinity : top + std::log(total);
  }

 private:
  int64_t stored() const { return fp8_ ? 1 : sizeof(T); }

  static float sum_of(const float* lanes) {
    float sum = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) sum += lanes[lane];
    return sum;
  }

  // rows where they lie, or read into `buffer`
  void read(const void* const* from, int64_t count, int64_t padded, int64_t dim, int64_t width, Element* buffer,
            const Element** rows) const {
    for (int64_t n = 0; n < padded; ++n, buffer += width) {
      if (n >= count || from[n] == nullptr) {
        rows[n] = nothing_;
      } else if (fp8_) {
        read_codes(static_cast<const uint8_t*>(from[n]), dim, buffer);
        rows[n] = buffer;
      } else if (sizeof(T) == sizeof(Element) && dim == width) {
        rows[n] = static_cast<const Element*>(from[n]);
      } else {
        const T* row = static_cast<const T*>(from[n]);
        for (int64_t d = 0; d < dim; ++d) buffer[d] = from_float<Element>(to_float(row[d]));
        rows[n] = buffer;
      }
    }
  }

  // products -> weights relative to the row's top, which may grow
  void softmax(int64_t state, float* s, const int32_t* position, int64_t count, const DecodeRow& row,
               const Score& score, bool mask) {
    vec top = splat(-kInfinity);
    for (int64_t n = 0; n < count; n += kWidth) {
      vec x = load(s + n) * score.scale;
      if (score.softcap > 0) x = tanh(x / score.softcap) * score.softcap;
      const ivec at = load(position + n);
      if (score.alibi) {
        const ivec offset = at - row.at;
        x -= row.slope * __builtin_convertvector(offset < 0 ? -offset : offset, vec);
      }
      if (mask) x = (at >= row.low) & (at <= row.high) ? x : splat(-kInfinity);
      store(s + n, x);
      top = top > x ? top : x;
    }
    const float old = top_[state], here = largest_lane(top), now = old > here ? old : here;
    const float safe = now == -kInfinity ? 0.0f : now;
    const float alpha = old == -kInfinity ? 0.0f : exp(splat(old - safe))[0];
    vec sum = load(total_ + state * kWidth) * alpha;
    for (int64_t n = 0; n < count; n += kWidth) {
      const vec p = exp(load(s + n) - safe);
      store(s + n, p);
      sum += p;
    }
    store(total_ + state * kWidth, sum);
    top_[state] = now;
    if (alpha == 1.0f) return;
    float* acc = acc_ + state * width_v_;
    for (int64_t d = 0; d < width_v_; d += kWidth) store(acc + d, load(acc + d) * alpha);
  }

  const int64_t states_, dim_, dim_v_, width_, width_v_;
  const bool fp8_;
  Element *q_, *k_, *v_, *nothing_, *w_;
  float *s_, *acc_, *total_, *top_;
};

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
