// Flash attention on the CPU, a tile at a time: the part that every op of this family shares.
//
// A tile has up to L "lanes" (queries; keys when the gradients of keys are computed), which run across the vector
// registers, and up to kRows "rows" of the other side. Scores are stored transposed, [row][lane], so that the
// softmax over keys needs no horizontal operation and the rows are read in their natural layout, one broadcast
// element (bf16: one pair) at a time. Two products do everything, forward and backward:
//
//   rows_by_lanes   C[r][lane]  = sum_d B[r][d] A[d][lane]      scores, dP
//   sum_over_rows   O[d][lane] += sum_r B[r][d] P[r][lane]      P V, dS K, and their transposes
//
// bf16 on a CPU with AVX512-BF16 multiplies pairs (vdpbf16ps); everything else is widened to float32.
#pragma once

#include "common/cpu.h"
#include "common/immintrin.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kVectors = 4, kBlock = 6;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kVectors = 2, kBlock = 6;
#else
constexpr int kWidth = 4, kVectors = 2, kBlock = 4;
#endif
constexpr int kRows = 96;
constexpr int32_t kNowhere = INT32_MAX;  // position of a row that nobody sees
constexpr float kInfinity = __builtin_inff();

typedef float vec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline ivec load(const int32_t* p) { return *reinterpret_cast<const ivec*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
static inline vec splat(float x) { return vec{} + x; }
static inline vec max(vec a, vec b) { return a > b ? a : b; }

// e^x for x below about 80, relative error below 2e-7; NaN stays NaN
static inline vec exp(vec x) {
  constexpr float kLog2E = 1.44269504f;
#if defined(__AVX512F__)
  // 2^-160 is 0; the second operand of the maximum is what a NaN gives
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-160.0f), (__m512)(x * kLog2E));
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vec f = (vec)_mm512_sub_ps(t, whole);
#else
  const vec t = (x < -87.0f ? splat(-87.0f) : x) * kLog2E;
  const vec shifted = t + 12582912.0f;  // 1.5 * 2^23 rounds to an integer in the low bits
  const vec f = t - (shifted - 12582912.0f);
#endif
  vec p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, whole);
#else
  const ivec exponent = ((ivec)shifted - 0x4b400000) << 23;
  const vec result = (vec)((ivec)p + exponent);
  return x != x ? x : (x < -87.0f ? splat(0.0f) : result);
#endif
}

static inline vec tanh(vec x) {
  const vec e = exp((x < 0.0f ? x : -x) * 2.0f);
  const vec y = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}

// how operands of type T are multiplied: float32, or pairs of bf16 in a 32-bit word
template <typename T>
struct Operand {
  using type = float;
  static constexpr int per_word = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using type = uint32_t;
  static constexpr int per_word = 2;
};
#endif

static inline int64_t words(int64_t n, int per_word) { return (n + per_word - 1) / per_word; }

static inline vec multiply_add(float b, const float* a, vec c) { return load(a) * b + c; }
#if defined(__AVX512BF16__)
static inline vec multiply_add(uint32_t b, const uint32_t* a, vec c) {
  return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_loadu_si512(a),
                               (__m512bh)_mm512_set1_epi32(static_cast<int>(b)));
}
#endif

// what becomes of C: overwritten, the first term of the sum, or what the finished sum is added to
enum class Into { set, extend, add };

template <int N>
struct Registers {
  static constexpr int value = N;
};

// f(lane, Registers<n>) for lanes [first, last), as many registers of them at a time as there are, up to N
template <int N, typename F>
static inline void by_registers(int first, int last, const F& f) {
  for (; last - first >= N * kWidth; first += N * kWidth) f(first, Registers<N>{});
  if constexpr (N > 1) by_registers<N - 1>(first, last, f);
}

// NR rows and KV registers of C [.][L]: sum over words [begin, end) of rows[r][k] * a[k][lane]
template <int L, int NR, int KV, typename W>
static inline void rows_product(const W* a, const W* const* rows, int64_t begin, int64_t end, float* c) {
  vec acc[NR][KV] = {};
  for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < KV; ++v) acc[r][v] = multiply_add(rows[r][k], a + k * L + v * kWidth, acc[r][v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < KV; ++v) {
      float* to = c + r * L + v * kWidth;
      store(to, begin > 0 ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// NR rows and KV registers of C [.][L]: sum over depth of b[r * row_step + k * depth_step] * a[k][lane]
template <int L, int NR, int KV, Into kInto, typename W>
static inline void block_product(const W* a, const W* b, int64_t row_step, int64_t depth_step, int64_t depth,
                                 float* c) {
  vec acc[NR][KV];
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < KV; ++v) acc[r][v] = kInto == Into::extend ? load(c + r * L + v * kWidth) : vec{};
  for (int64_t k = 0; k < depth; ++k, a += L, b += depth_step) {
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < KV; ++v) acc[r][v] = multiply_add(b[r * row_step], a + v * kWidth, acc[r][v]);
    // gcc would write a second loop for depth_step = 1, and keep what the two share in memory
    asm("" : "+r"(b));
  }
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < KV; ++v) {
      float* to = c + r * L + v * kWidth;
      store(to, kInto == Into::add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// of lanes [first, last)
template <int L, Into kInto, typename W>
static inline void product(const W* a, const W* b, int64_t row_step, int64_t depth_step, int64_t depth, int64_t rows,
                           float* c, int first = 0, int last = L) {
  constexpr int kMost = L / kWidth < kVectors ? L / kWidth : kVectors;
  const auto block = [&](int64_t r, auto count) {
    by_registers<kMost>(first, last, [&](int lane, auto registers) {
      block_product<L, decltype(count)::value, decltype(registers)::value, kInto>(a + lane, b + r * row_step, row_step,
                                                                                  depth_step, depth, c + r * L + lane);
    });
  };
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) block(r, Registers<kBlock>{});
  for (; r + 2 <= rows; r += 2) block(r, Registers<2>{});
  for (; r < rows; ++r) block(r, Registers<1>{});
}

// C[r][lane] = sum_d: lanes packed [depth][L], rows packed [r][depth]
template <int L, typename W>
static inline void rows_by_lanes(const W* lanes, const W* rows, int64_t depth, int64_t count, float* c) {
  product<L, Into::set>(lanes, rows, depth, 1, depth, count, c);
}

// O[d][lane] += sum_r: p packed [count][L], values packed [count][dim]
template <int L, typename W>
static inline void sum_over_rows(const W* p, const W* values, int64_t count, int64_t dim, float* o) {
  product<L, Into::extend>(p, values, 1, dim, count, dim, o);
}

static inline uint32_t pair_of(bf16 low, bf16 high) {
  return static_cast<uint32_t>(low.bits) | (static_cast<uint32_t>(high.bits) << 16);
}

#if defined(__AVX512F__)
// 16 values as float32
static inline vec load_as(const float* from) { return load(from); }
static inline vec load_as(const f16* from) {
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
static inline vec load_as(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// r[i] word j <-> r[j] word i
static inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int low = i / 4 * 4 + i % 4 / 2;
    r[i] = i % 2 == 0 ? _mm512_unpacklo_epi64(t[low], t[low + 2]) : _mm512_unpackhi_epi64(t[low], t[low + 2]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    t[i] = (i & 4) == 0 ? _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88) : _mm512_shuffle_i32x4(r[i - 4], r[i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = (i & 8) == 0 ? _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88) : _mm512_shuffle_i32x4(t[i - 8], t[i], 0xdd);
  }
}
#endif

// the first `lanes` (whole registers) of L vectors x [d] -> [d words][L]; a null pointer is a row of zeros
template <int L, typename T>
static void pack_lanes(const T* const* x, int64_t dim, float* out, int lanes = L) {
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; d + 16 <= dim; d += 16) {
    for (int lane = 0; lane < lanes; lane += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const T* from = x[lane + i];
        r[i] = from == nullptr ? _mm512_setzero_si512() : (__m512i)load_as(from + d);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (d + i) * L + lane, r[i]);
    }
  }
#endif
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t i = d; i < dim; ++i) out[i * L + lane] = x[lane] == nullptr ? 0.0f : to_float(x[lane][i]);
}
#if defined(__AVX512BF16__)
template <int L>
static void pack_lanes(const bf16* const* x, int64_t dim, uint32_t* out, int lanes = L) {
  for (int lane = 0; lane < lanes; lane += 16) {
    for (int64_t d = 0; d < dim; d += 32) {
      const int64_t left = dim - d < 32 ? dim - d : 32;
      const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const bf16* from = x[lane + i];
        r[i] = from == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(there, from + d);
      }
      transpose(r);
      for (int64_t i = 0; i < words(left, 2); ++i) _mm512_storeu_si512(out + (d / 2 + i) * L + lane, r[i]);
    }
  }
}
#endif

// rows for rows_by_lanes: [count][d words]
template <typename T>
static void pack_rows(const T* const* x, int64_t count, int64_t dim, float* out) {
  for (int64_t r = 0; r < count; ++r, out += dim) {
    if (x[r] == nullptr) {
      std::memset(out, 0, dim * sizeof(float));
    } else {
      const T* row = x[r];
      for (int64_t d = 0; d < dim; ++d) out[d] = to_float(row[d]);
    }
  }
}
static inline void pack_rows(const bf16* const* x, int64_t count, int64_t dim, uint32_t* out) {
  const int64_t n = words(dim, 2);
  for (int64_t r = 0; r < count; ++r, out += n) {
    out[n - 1] = 0;
    if (x[r] == nullptr) {
      std::memset(out, 0, n * 4);
    } else {
      std::memcpy(out, x[r], dim * 2);
    }
  }
}

// rows as operands: where they lie if they are made of whole words, packed elsewhere; a null one is `zeros`
template <typename T, typename W>
static inline void word_rows(const T* const* x, int64_t count, int64_t dim, const W* zeros, W* packed, const W** rows) {
  const int64_t n = words(dim, Operand<T>::per_word);
  const bool in_place = sizeof(T) * Operand<T>::per_word == sizeof(W) && dim % Operand<T>::per_word == 0;
  if (!in_place) pack_rows(x, count, dim, packed);
  for (int64_t r = 0; r < count; ++r) {
    rows[r] = !in_place ? packed + r * n : x[r] == nullptr ? zeros : reinterpret_cast<const W*>(x[r]);
  }
}

// rows for sum_over_rows: [row words][dim]
template <typename T>
static void pack_values(const T* const* x, int64_t count, int64_t dim, float* out) {
  pack_rows(x, count, dim, out);
}
static inline void pack_values(const bf16* const* x, int64_t count, int64_t dim, uint32_t* out) {
  for (int64_t r = 0; r < count; r += 2, out += dim) {
    const bf16* low = x[r];
    const bf16* high = r + 1 < count ? x[r + 1] : nullptr;
    if (low != nullptr && high != nullptr) {
      for (int64_t d = 0; d < dim; ++d) out[d] = pair_of(low[d], high[d]);
    } else {
      for (int64_t d = 0; d < dim; ++d)
        out[d] = pair_of(low == nullptr ? bf16{0} : low[d], high == nullptr ? bf16{0} : high[d]);
    }
  }
}

// p [count][L] float32 -> the operand of sum_over_rows; the float32 one is used as it is
template <int L>
static inline const float* pack_weights(const float* p, int64_t, float*, int = L) {
  return p;
}
#if defined(__AVX512BF16__)
template <int L>
static inline const uint32_t* pack_weights(float* p, int64_t count, uint32_t* out, int lanes = L) {
  // element i of the lower row, then of the upper one
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  if (count % 2) std::memset(p + count * L, 0, L * sizeof(float));
  for (int64_t r = 0; r < count; r += 2) {
    for (int lane = 0; lane < lanes; lane += 16) {
      const float* low = p + r * L + lane;
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(low + L), _mm512_loadu_ps(low));
      _mm512_storeu_si512(out + r / 2 * L + lane, _mm512_permutexvar_epi16(order, both));
    }
  }
  return out;
}
#endif

// total [L] += p [words][L]
template <int L>
static inline void add_weights(const float* p, int64_t count, float* total, int lanes) {
  for (int lane = 0; lane < lanes; lane += kWidth) {
    vec sum = {};
    for (int64_t r = 0; r < count; ++r) sum += load(p + r * L + lane);
    store(total + lane, load(total + lane) + sum);
  }
}
#if defined(__AVX512BF16__)
template <int L>
static inline void add_weights(const uint32_t* p, int64_t count, float* total, int lanes) {
  constexpr uint32_t kOnes = 0x3f803f80;
  for (int lane = 0; lane < lanes; lane += kWidth) {
    vec sum = {};
    for (int64_t r = 0; r < count; ++r) sum = multiply_add(kOnes, p + r * L + lane, sum);
    store(total + lane, load(total + lane) + sum);
  }
}
#endif

#if defined(__AVX512F__)
static inline void store_as(float* to, vec x) { store(to, x); }
static inline void store_as(f16* to, vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
// as from_float
static inline void store_as(bf16* to, vec x) {
  const ivec bits = (ivec)x;
  const ivec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const ivec result = x == x ? rounded : bits | 0x400000;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)(result >> 16)));
}
#endif

// x [dim][L] -> L vectors [dim]; a null one is not written
template <int L, typename T>
static void store_lanes(const float* x, int64_t dim, T* const* out, int lanes = L) {
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; d + 16 <= dim; d += 16) {
    for (int lane = 0; lane < lanes; lane += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x + (d + i) * L + lane);
      transpose(r);
      for (int i = 0; i < 16; ++i) {
        if (out[lane + i] != nullptr) store_as(out[lane + i] + d, (vec)r[i]);
      }
    }
  }
#endif
  for (int lane = 0; lane < lanes; ++lane) {
    if (out[lane] == nullptr) continue;
    for (int64_t i = d; i < dim; ++i) out[lane][i] = from_float<T>(x[i * L + lane]);
  }
}

// bump allocator over one aligned block, freed with it
class Scratch {
 public:
  explicit Scratch(size_t bytes) : base_(static_cast<char*>(std::malloc(bytes + 64))) {
    at_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base_) + 63) & ~static_cast<uintptr_t>(63));
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename W>
  W* take(int64_t count) {
    W* p = reinterpret_cast<W*>(at_);
    at_ += (count * sizeof(W) + 63) & ~static_cast<size_t>(63);
    return p;
  }

 private:
  char* base_;
  char* at_;
};

static inline size_t tile_bytes(int lanes, int64_t dim, int64_t dim_v) {
  return 4 * (6 * (kRows + 2) * static_cast<size_t>(lanes) + (4 * lanes + 4 * (kRows + 2)) * (dim + dim_v + 4)) + 8192;
}

// what turns a dot product into a logit
struct Score {
  float scale;
  float softcap;  // 0 = off
  bool alibi;
  int32_t step;  // distance between neighbouring positions, for biases by distance
  // of the head, its bias of distance 0 (null: none), and the furthest distance on either side with one of its own;
  // distances count from rows to lanes
  const float* bias = nullptr;
  int32_t reach = 0;
};

// lanes are queries: which positions each sees, where it stands, its ALiBi slope
template <int L>
struct Queries {
  int32_t low[L], high[L], at[L];
  float slope[L];
};

// Scores [count][L] in place -> logits, -inf where masked. `tanh_out` keeps the soft cap's tanh for the backward.
template <int L>
static void finish_scores(float* s, const int32_t* position, int64_t count, const Queries<L>& q, const Score& score,
                          bool mask, float* tanh_out, int lanes = L) {
  for (int64_t r = 0; r < count; ++r) {
    for (int lane = 0; lane < lanes; lane += kWidth) {
      vec x = load(s + r * L + lane) * score.scale;
      if (score.softcap > 0) {
        const vec t = tanh(x / score.softcap);
        if (tanh_out != nullptr) store(tanh_out + r * L + lane, t);
        x = t * score.softcap;
      }
      const ivec at = ivec{} + position[r];
      if (score.alibi) {
        const ivec offset = at - load(q.at + lane);
        const vec distance = __builtin_convertvector(offset < 0 ? -offset : offset, vec);
        x -= load(q.slope + lane) * (distance * static_cast<float>(score.step));
      }
      if (mask) {
        const ivec seen = (at >= load(q.low + lane)) & (at <= load(q.high + lane));
        x = seen ? x : splat(-kInfinity);
      }
      store(s + r * L + lane, x);
    }
  }
}

// distances from a row to kWidth lanes, which ascend in equal steps; a last few may be kNowhere
struct Distances {
  int64_t first, last;

  Distances(const int32_t* of_lanes, int32_t of_row, int32_t step)
      : first((int64_t{of_lanes[0]} - of_row) * step), last((int64_t{of_lanes[kWidth - 1]} - of_row) * step) {}

  bool below(int32_t reach) const { return last <= -reach || reach == 0; }
  bool above(int32_t reach) const { return first >= reach; }
  // neighbours in memory
  bool adjacent(int32_t reach) const { return last - first == kWidth - 1 && first >= -reach && last <= reach; }
};

static inline int64_t bias_index(int32_t of_lane, int32_t of_row, const Score& score) {
  const int64_t distance = (int64_t{of_lane} - of_row) * score.step;
  return distance < -score.reach ? -score.reach : distance > score.reach ? score.reach : distance;
}

// Adds the bias of each distance to logits [count][L]; a masked one stays -inf, whatever the bias.
template <int L>
static void add_bias(float* s, const int32_t* of_lanes, const int32_t* of_rows, int64_t count, const Score& score,
                     int lanes = L) {
  for (int64_t r = 0; r < count; ++r) {
    for (int lane = 0; lane < lanes; lane += kWidth) {
      const Distances distances(of_lanes + lane, of_rows[r], score.step);
      vec bias;
      if (distances.adjacent(score.reach)) {
        bias = load(score.bias + distances.first);
      } else if (distances.below(score.reach)) {
        bias = splat(score.bias[-score.reach]);
      } else if (distances.above(score.reach)) {
        bias = splat(score.bias[score.reach]);
      } else {
        for (int i = 0; i < kWidth; ++i) bias[i] = score.bias[bias_index(of_lanes[lane + i], of_rows[r], score)];
      }
      const vec x = load(s + r * L + lane);
      store(s + r * L + lane, x == -kInfinity ? x : x + bias);
    }
  }
}

// the rows of a tile that any of the first `lanes` of each register sees, [first, last)
template <int L>
struct Seen {
  static constexpr int kGroups = L / kWidth;
  int first[kGroups], last[kGroups];

  Seen(const Queries<L>& q, const int32_t* position, int64_t count, bool mask, int lanes) {
    for (int g = 0; g < kGroups; ++g) {
      const bool there = g * kWidth < lanes, all = there && !mask;
      first[g] = all ? 0 : static_cast<int>(count);
      last[g] = all ? static_cast<int>(count) : 0;
      if (all || !there) continue;
      int32_t low = INT32_MAX, high = INT32_MIN;
      for (int lane = g * kWidth; lane < (g + 1) * kWidth; ++lane) {
        const bool any = q.low[lane] <= q.high[lane];
        low = any && q.low[lane] < low ? q.low[lane] : low;
        high = any && q.high[lane] > high ? q.high[lane] : high;
      }
      for (int r = 0; r < count; ++r) {
        const bool in = position[r] >= low && position[r] <= high;
        first[g] = in && r < first[g] ? r : first[g];
        last[g] = in ? r + 1 : last[g];
      }
    }
  }

  // lanes that see any of the rows [begin, end)
  void lanes(int begin, int end, int* from, int* to) const {
    *from = L;
    *to = 0;
    for (int g = 0; g < kGroups; ++g) {
      if (first[g] >= end || last[g] <= begin) continue;
      *from = g * kWidth < *from ? g * kWidth : *from;
      *to = (g + 1) * kWidth;
    }
  }

  // the first row after `begin` at which a register's rows begin or end
  int next(int begin, int count) const {
    int end = count;
    for (int g = 0; g < kGroups; ++g) {
      end = first[g] > begin && first[g] < end ? first[g] : end;
      end = last[g] > begin && last[g] < end ? last[g] : end;
    }
    return end;
  }
};

// Forward of one tile of queries over any number of key tiles.
template <typename T, int L>
class Forward {
  using W = typename Operand<T>::type;
  static constexpr int kPer = Operand<T>::per_word;

 public:
  Queries<L> queries;

  Forward(Scratch& scratch, int64_t dim, int64_t dim_v)
      : dim_(dim),
        dim_v_(dim_v),
        q_(scratch.take<W>(words(dim, kPer) * L)),
        k_(scratch.take<W>(words(dim, kPer) * kRows)),
        v_(scratch.take<W>((kRows + 1) * dim_v)),
        zeros_(scratch.take<W>(words(dim, kPer))),
        s_(scratch.take<float>((kRows + 1) * L)),
        p_(scratch.take<W>((kRows + 1) * L)),
        acc_(scratch.take<float>(dim_v * L)) {
    std::memset(zeros_, 0, words(dim, kPer) * sizeof(W));
  }

  // rows of lanes past the tile are null; sinks [L] or null
  void begin(const T* const* q, const float* sinks) {
    lanes_ = L;
    while (lanes_ > 0 && q[lanes_ - 1] == nullptr) --lanes_;
    lanes_ = (lanes_ + kWidth - 1) / kWidth * kWidth;
    pack_lanes<L>(q, dim_, q_, lanes_);
    for (int64_t d = 0; d < dim_v_; ++d) std::memset(acc_ + d * L, 0, lanes_ * sizeof(float));
    for (int lane = 0; lane < L; ++lane) {
      top_[lane] = sinks == nullptr ? -kInfinity : sinks[lane];
      total_[lane] = weight_[lane] = sinks == nullptr || sinks[lane] == -kInfinity ? 0.0f : 1.0f;
    }
  }

  void keys(const T* const* k, const T* const* v, const int32_t* position, int64_t count, const Score& score,
            bool mask) {
    const W* rows[kRows];
    word_rows(k, count, dim_, zeros_, k_, rows);
    const Seen<L> seen(queries, position, count, mask, lanes_);
    scores(seen, rows, v, count);
    finish_scores<L>(s_, position, count, queries, score, mask, nullptr, lanes_);
    if (score.bias != nullptr) add_bias<L>(s_, queries.at, position, count, score, lanes_);
    for (int lane = 0; lane < lanes_; lane += kWidth) {
      const vec old = load(top_ + lane);
      vec top = old;
      for (int64_t r = 0; r < count; ++r) {
        const vec x = load(s_ + r * L + lane);
        top = top > x ? top : x;
      }
      const vec safe = top == -kInfinity ? splat(0.0f) : top;
      vec sum = {};
      for (int64_t r = 0; r < count; ++r) {
        const vec p = exp(load(s_ + r * L + lane) - safe);
        store(s_ + r * L + lane, p);
        sum += p;
      }
      const vec alpha = old == -kInfinity ? splat(0.0f) : exp(old - safe);
      store(top_ + lane, top);
      store(total_ + lane, load(total_ + lane) * alpha + sum);
      bool rescale = false;
      for (int i = 0; i < kWidth; ++i) rescale |= alpha[i] != 1.0f;
      if (!rescale) continue;
      store(weight_ + lane, load(weight_ + lane) * alpha);
      for (int64_t d = 0; d < dim_v_; ++d) store(acc_ + d * L + lane, load(acc_ + d * L + lane) * alpha);
    }
    pack_values(v, count, dim_v_, v_);
    const W* p = pack_weights<L>(s_, count, p_, lanes_);
    add_weights<L>(p, words(count, kPer), weight_, lanes_);
    for (int r = 0; r < count;) {
      // whole words of rows that the same lanes see
      const int next = seen.next(r, static_cast<int>(count));
      const int end = next < count ? (next + kPer - 1) / kPer * kPer : next;
      int from, to;
      seen.lanes(r, end, &from, &to);
      const int64_t word = r / kPer;
      product<L, Into::extend>(p + word * L, v_ + word * dim_v_, 1, dim_v_, words(end, kPer) - word, dim_v_, acc_, from,
                               to);
      r = end;
    }
  }

  // a null row is not written
  void end(T* const* out, float* const* lse, float scale = 1.0f) {
    for (int lane = 0; lane < L; ++lane) {
      if (out[lane] == nullptr) continue;
      const float total = total_[lane];
      inverse_[lane] = total == 0.0f ? 0.0f : scale / weight_[lane];
      *lse[lane] = total == 0.0f ? -kInfinity : top_[lane] + std::log(total);
    }
    for (int64_t d = 0; d < dim_v_; ++d)
      for (int lane = 0; lane < lanes_; lane += kWidth)
        store(acc_ + d * L + lane, load(acc_ + d * L + lane) * load(inverse_ + lane));
    store_lanes<L>(acc_, dim_v_, out, lanes_);
  }

 private:
  // the values' rows are fetched meanwhile
  void scores(const Seen<L>& seen, const W* const* rows, const T* const* v, int64_t count) {
    constexpr int kMost = L / kWidth < kVectors ? L / kWidth : kVectors;
    const int64_t depth = words(dim_, kPer);
    // of float32, sums of sums: one sum of them all would round too often
    const int64_t piece = sizeof(T) == sizeof(float) ? 64 : depth;
    const auto block = [&](int r, auto size) {
      constexpr int kSize = decltype(size)::value;
      int from, to;
      seen.lanes(r, r + kSize, &from, &to);
      for (int i = r; i < r + kSize; ++i) {
        for (int64_t d = 0; d < dim_v_; d += 64 / sizeof(T)) __builtin_prefetch(v[i] + d);
      }
      by_registers<kMost>(from, to, [&](int lane, auto registers) {
        for (int64_t k = 0; k < depth; k += piece) {
          rows_product<L, kSize, decltype(registers)::value>(q_ + lane, rows + r, k,
                                                             k + piece < depth ? k + piece : depth, s_ + r * L + lane);
        }
      });
    };
    int r = 0;
    for (; r + kBlock <= count; r += kBlock) block(r, Registers<kBlock>{});
    for (; r + 2 <= count; r += 2) block(r, Registers<2>{});
    for (; r < count; ++r) block(r, Registers<1>{});
  }

  const int64_t dim_, dim_v_;
  W *q_, *k_, *v_, *zeros_;
  float* s_;
  W* p_;
  float* acc_;
  // of the tile, in whole registers: a short one has less work
  int lanes_ = L;
  // weight: the sum of the weights as they are multiplied with values, which may be rounded
  float top_[L], total_[L], weight_[L], inverse_[L];
};

// p = exp(logit - lse), ds = p (dp - delta) (1 - tanh^2), over [count][L]; lse and delta per lane or per row
template <int L, bool kPerLane>
static void logit_gradient(float* s, float* dp, const float* tanh_in, int64_t count, const float* lse,
                           const float* delta) {
  for (int64_t r = 0; r < count; ++r) {
    for (int lane = 0; lane < L; lane += kWidth) {
      const int64_t i = r * L + lane;
      const vec shift = kPerLane ? load(lse + lane) : splat(lse[r]);
      const vec p = exp(load(s + i) - (shift == -kInfinity ? splat(0.0f) : shift));
      vec ds = p * (load(dp + i) - (kPerLane ? load(delta + lane) : splat(delta[r])));
      if (tanh_in != nullptr) ds *= 1.0f - load(tanh_in + i) * load(tanh_in + i);
      store(s + i, p);
      // a masked key may hold anything
      store(dp + i, p == 0.0f ? splat(0.0f) : ds);
    }
  }
}

// Gradient of one tile of queries.
template <typename T, int L>
class QueryGradient {
  using W = typename Operand<T>::type;
  static constexpr int kPer = Operand<T>::per_word;

 public:
  Queries<L> queries;
  float lse[L], delta[L];

  QueryGradient(Scratch& scratch, int64_t dim, int64_t dim_v)
      : dim_(dim),
        dim_v_(dim_v),
        q_(scratch.take<W>(words(dim, kPer) * L)),
        dout_(scratch.take<W>(words(dim_v, kPer) * L)),
        k_(scratch.take<W>(words(dim, kPer) * kRows)),
        k_values_(scratch.take<W>((kRows + 1) * dim)),
        v_(scratch.take<W>(words(dim_v, kPer) * kRows)),
        s_(scratch.take<float>((kRows + 1) * L)),
        tanh_(scratch.take<float>((kRows + 1) * L)),
        dp_(scratch.take<float>((kRows + 1) * L)),
        p_(scratch.take<W>((kRows + 1) * L)),
        dq_(scratch.take<float>(dim * L)) {}

  void begin(const T* const* q, const T* const* dout) {
    pack_lanes<L>(q, dim_, q_);
    pack_lanes<L>(dout, dim_v_, dout_);
    std::memset(dq_, 0, dim_ * L * sizeof(float));
  }

  void keys(const T* const* k, const T* const* v, const int32_t* position, int64_t count, const Score& score,
            bool mask) {
    score_gradient(k, v, position, count, score, mask, score.softcap > 0 ? tanh_ : nullptr);
    pack_values(k, count, dim_, k_values_);
    sum_over_rows<L>(pack_weights<L>(dp_, count, p_), k_values_, words(count, kPer), dim_, dq_);
  }

  void end(T* const* dq, float scale) {
    for (int lane = 0; lane < L; ++lane) {
      if (dq[lane] == nullptr) continue;
      for (int64_t d = 0; d < dim_; ++d) dq[lane][d] = from_float<T>(dq_[d * L + lane] * scale);
    }
  }

 protected:
  // dp_ [count][L] of a tile of keys: the gradient of the dot products, with a null `kept` of the capped ones
  void score_gradient(const T* const* k, const T* const* v, const int32_t* position, int64_t count, const Score& score,
                      bool mask, float* kept) {
    pack_rows(k, count, dim_, k_);
    pack_rows(v, count, dim_v_, v_);
    rows_by_lanes<L>(q_, k_, words(dim_, kPer), count, s_);
    rows_by_lanes<L>(dout_, v_, words(dim_v_, kPer), count, dp_);
    finish_scores<L>(s_, position, count, queries, score, mask, kept);
    if (score.bias != nullptr) add_bias<L>(s_, queries.at, position, count, score);
    logit_gradient<L, true>(s_, dp_, kept, count, lse, delta);
  }

  const int64_t dim_, dim_v_;
  W *q_, *dout_, *k_, *k_values_, *v_;
  float *s_, *tanh_, *dp_;
  W* p_;
  float* dq_;
};

// Gradient of a head's bias by distance, over any number of tiles of queries.
template <typename T, int L>
class BiasGradient : public QueryGradient<T, L> {
 public:
  using QueryGradient<T, L>::QueryGradient;

  // the sum of distance 0 in a row of zeros, as far as `reach` on either side
  void begin_head(float* sums, int32_t reach) {
    sums_ = sums;
    reach_ = reach;
    below_ = above_ = 0;
  }

  // always masked: a lane without a query would add what it makes of the bias
  void keys(const T* const* k, const T* const* v, const int32_t* position, int64_t count, const Score& score, bool) {
    this->score_gradient(k, v, position, count, score, true, nullptr);
    const int32_t* of_lanes = this->queries.at;
    vec below = {}, above = {};
    for (int64_t r = 0; r < count; ++r) {
      for (int lane = 0; lane < L; lane += kWidth) {
        const Distances distances(of_lanes + lane, position[r], score.step);
        const vec ds = load(this->dp_ + r * L + lane);
        if (distances.adjacent(reach_)) {
          store(sums_ + distances.first, load(sums_ + distances.first) + ds);
        } else if (distances.below(reach_)) {
          below += ds;
        } else if (distances.above(reach_)) {
          above += ds;
        } else {
          for (int i = 0; i < kWidth; ++i) sums_[bias_index(of_lanes[lane + i], position[r], score)] += ds[i];
        }
      }
    }
    for (int i = 0; i < kWidth; ++i) {
      below_ += below[i];
      above_ += above[i];
    }
  }

  void end_head() {
    sums_[-reach_] += static_cast<float>(below_);
    sums_[reach_] += static_cast<float>(above_);
  }

 private:
  float* sums_;
  int32_t reach_;
  // an end collects all distances past it
  double below_, above_;
};

// up to kRows queries against the lanes of KeyGradient
struct QueryRows {
  int32_t low[kRows], high[kRows], at[kRows];
  float lse[kRows], delta[kRows];
  float slope;
};

// Gradients of one tile of keys and values; lanes are keys, `position` their places (kNowhere hides one).
template <typename T, int L>
class KeyGradient {
  using W = typename Operand<T>::type;
  static constexpr int kPer = Operand<T>::per_word;

 public:
  int32_t position[L];

  KeyGradient(Scratch& scratch, int64_t dim, int64_t dim_v)
      : dim_(dim),
        dim_v_(dim_v),
        k_(scratch.take<W>(words(dim, kPer) * L)),
        v_(scratch.take<W>(words(dim_v, kPer) * L)),
        q_(scratch.take<W>(words(dim, kPer) * kRows)),
        q_values_(scratch.take<W>((kRows + 1) * dim)),
        dout_(scratch.take<W>(words(dim_v, kPer) * kRows)),
        dout_values_(scratch.take<W>((kRows + 1) * dim_v)),
        s_(scratch.take<float>((kRows + 1) * L)),
        tanh_(scratch.take<float>((kRows + 1) * L)),
        dp_(scratch.take<float>((kRows + 1) * L)),
        p_(scratch.take<W>((kRows + 1) * L)),
        dk_(scratch.take<float>(dim * L)),
        dv_(scratch.take<float>(dim_v * L)) {}

  void begin(const T* const* k, const T* const* v) {
    pack_lanes<L>(k, dim_, k_);
    pack_lanes<L>(v, dim_v_, v_);
    std::memset(dk_, 0, dim_ * L * sizeof(float));
    std::memset(dv_, 0, dim_v_ * L * sizeof(float));
  }

  void queries(const T* const* q, const T* const* dout, const QueryRows& rows, int64_t count, const Score& score,
               bool mask) {
    pack_rows(q, count, dim_, q_);
    pack_rows(dout, count, dim_v_, dout_);
    rows_by_lanes<L>(k_, q_, words(dim_, kPer), count, s_);
    rows_by_lanes<L>(v_, dout_, words(dim_v_, kPer), count, dp_);
    float* kept = score.softcap > 0 ? tanh_ : nullptr;
    for (int64_t r = 0; r < count; ++r) {
      for (int lane = 0; lane < L; lane += kWidth) {
        vec x = load(s_ + r * L + lane) * score.scale;
        if (kept != nullptr) {
          const vec t = tanh(x / score.softcap);
          store(kept + r * L + lane, t);
          x = t * score.softcap;
        }
        const ivec at = load(position + lane);
        if (score.alibi) {
          const ivec offset = at - rows.at[r];
          const vec distance = __builtin_convertvector(offset < 0 ? -offset : offset, vec);
          x -= rows.slope * (distance * static_cast<float>(score.step));
        }
        if (mask) x = (at >= rows.low[r]) & (at <= rows.high[r]) ? x : splat(-kInfinity);
        store(s_ + r * L + lane, x);
      }
    }
    if (score.bias != nullptr) add_bias<L>(s_, position, rows.at, count, score);
    logit_gradient<L, false>(s_, dp_, kept, count, rows.lse, rows.delta);
    pack_values(dout, count, dim_v_, dout_values_);
    sum_over_rows<L>(pack_weights<L>(s_, count, p_), dout_values_, words(count, kPer), dim_v_, dv_);
    pack_values(q, count, dim_, q_values_);
    sum_over_rows<L>(pack_weights<L>(dp_, count, p_), q_values_, words(count, kPer), dim_, dk_);
  }

  // the outputs are T, or float where others add to them; add_k and add_v are for those others
  template <typename K, typename V>
  void end(K* const* dk, V* const* dv, float scale, bool add_k = false, bool add_v = false) {
    for (int lane = 0; lane < L; ++lane) {
      if (dk[lane] == nullptr) continue;
      for (int64_t d = 0; d < dim_; ++d)
        dk[lane][d] = from_float<K>(dk_[d * L + lane] * scale + (add_k ? to_float(dk[lane][d]) : 0.0f));
      for (int64_t d = 0; d < dim_v_; ++d)
        dv[lane][d] = from_float<V>(dv_[d * L + lane] + (add_v ? to_float(dv[lane][d]) : 0.0f));
    }
  }

 private:
  const int64_t dim_, dim_v_;
  W *k_, *v_, *q_, *q_values_, *dout_, *dout_values_;
  float *s_, *tanh_, *dp_;
  W* p_;
  float *dk_, *dv_;
};

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
