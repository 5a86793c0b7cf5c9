// Banded attention on the CPU: what window_attention and the local rows of global_attention share.
//
// The same geometry as triton_kernels/attention/window_attention.py: a query tile meets prefix keys (the first
// tokens, or listed global ones), then its band; a dilated window is one plain window per residue class, whose token
// n is r + d * n.
#pragma once

#include "attention/tiles_cpu.h"

#ifdef TILEFUSE_REGISTER
#include <algorithm>
#endif

namespace tilefuse {

constexpr int32_t kUnbounded = 1 << 29;

// a [B, S, H, D] or packed [T, H, D] tensor
struct HeadRows {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct Statistics {
  float* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

// what one run over the tasks of a call computes
enum class Pass : int { forward, query_gradient, key_gradient, prefix_gradient, bias_gradient };

struct WindowSequence {
  int64_t batch;   // into tensors with a batch dimension
  int64_t q0, k0;  // first tokens
  int32_t sq, sk;
  int64_t query_tiles, key_tiles;  // tiles of the sequences before this one
};

struct WindowAttentionCall {
  Dtype dtype;
  HeadRows q, k, v, out, dout, dq, dk, dv;
  Statistics lse, dlse, delta;
  const float* sinks = nullptr;
  const float* slopes = nullptr;
  // bias by distance [heads, 2 * bias_reach + 1], query minus key, and the same mirrored
  const float *bias = nullptr, *mirrored = nullptr;
  int32_t bias_reach = 0;
  // its gradient, [bias_parts, heads, 2 * bias_reach + 1]: a part is of bias_tiles tiles of queries
  float* dbias = nullptr;
  int64_t bias_parts = 0, bias_tiles = 0;
  const WindowSequence* sequences = nullptr;
  int64_t sequence_count = 0, query_tiles = 0, key_tiles = 0;
  int64_t heads = 0, kv_heads = 0, dim = 0, dim_v = 0;
  int32_t left = 0, right = 0, dilation = 1;
  float scale = 1, softcap = 0;
  // prefix keys: tokens 0.. of each sequence, or `listed` ones (-1 = none), [B, prefix]
  int32_t prefix = 0, reach = 0;
  const int32_t* listed = nullptr;
  // nonzero: not in the band, neither as key nor as query; [B, S]
  const uint8_t* hidden = nullptr;
  int64_t hidden_stride = 0;
};

inline int64_t tiles_per_class(int64_t tokens, int64_t dilation, int64_t block) {
  const int64_t per_class = (tokens + dilation - 1) / dilation;
  return (per_class + block - 1) / block;
}

namespace TILEFUSE_ISA {

constexpr int kLanes = 64;

template <typename T>
static inline T* row(const HeadRows& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

static inline float* at(const Statistics& x, int64_t batch, int64_t head, int64_t token) {
  return x.data + batch * x.batch + head * x.head + token * x.token;
}

static inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// one residue class of one sequence; its query n stands at its key n + shift
struct Class {
  int32_t residue, first, rows, keys, shift;
};

static inline Class residue_class(const WindowSequence& s, int32_t residue, int32_t d) {
  const int32_t delta = s.sk - s.sq;
  const int32_t first = ((residue - delta) % d + d) % d;
  return {residue, first, most(s.sq - first + d - 1, 0) / d, most(s.sk - residue + d - 1, 0) / d,
          (first + delta - residue) / d};
}

static inline const WindowSequence& sequence_of(const WindowAttentionCall& call, int64_t tile, bool of_keys) {
  int64_t low = 0, high = call.sequence_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const WindowSequence& s = call.sequences[middle];
    if ((of_keys ? s.key_tiles : s.query_tiles) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return call.sequences[low];
}

static inline bool is_hidden(const WindowAttentionCall& call, const WindowSequence& s, int64_t token) {
  return call.hidden != nullptr && call.hidden[s.batch * call.hidden_stride + token] != 0;
}

// token of a prefix key, or -1
static inline int32_t prefix_token(const WindowAttentionCall& call, const WindowSequence& s, int32_t p) {
  if (call.listed != nullptr) return call.listed[s.batch * call.prefix + p];
  return p < s.sk ? p : -1;
}

// of one head; distances count from keys to queries, or the other way
static inline Score score_of(const WindowAttentionCall& call, int64_t head, int32_t step, bool mirrored = false) {
  Score score{call.scale, call.softcap, call.slopes != nullptr, step};
  if (call.bias != nullptr) {
    score.bias = (mirrored ? call.mirrored : call.bias) + head * (2 * call.bias_reach + 1) + call.bias_reach;
    score.reach = call.bias_reach;
  }
  return score;
}

// a tile of queries, and the walk over its keys that forward and backward share
struct QueryTile {
  const WindowSequence* sequence;
  Class c;
  int32_t m0, count;
  int64_t head;
};

static inline QueryTile query_tile(const WindowAttentionCall& call, int64_t task) {
  const int64_t head = task / call.query_tiles, tile = task % call.query_tiles;
  const WindowSequence& s = sequence_of(call, tile, false);
  const int64_t per_class = tiles_per_class(s.sq, call.dilation, kLanes);
  const int64_t local = tile - s.query_tiles;
  const Class c = residue_class(s, static_cast<int32_t>(local / per_class), call.dilation);
  const int32_t m0 = static_cast<int32_t>(local % per_class) * kLanes;
  return {&s, c, m0, least(kLanes, c.rows - m0), head};
}

template <typename T, typename Engine>
static void walk_keys(const WindowAttentionCall& call, const QueryTile& t, Engine& engine) {
  const WindowSequence& s = *t.sequence;
  const Class& c = t.c;
  const int64_t kv = t.head / (call.heads / call.kv_heads);
  const T *k[kRows], *v[kRows];
  int32_t position[kRows];
  Queries<kLanes>& queries = engine.queries;
  const int32_t d = call.dilation, delta = s.sk - s.sq;
  int32_t begin = 0;
  bool live[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t m = t.m0 + lane;
    live[lane] = lane < t.count && !is_hidden(call, s, c.first + static_cast<int64_t>(m) * d);
    queries.slope[lane] = call.slopes == nullptr ? 0.0f : call.slopes[t.head];
  }
  if (call.prefix > 0) {
    const int32_t last = c.first + (t.m0 + t.count - 1) * d + delta;
    for (int lane = 0; lane < kLanes; ++lane) {
      queries.at[lane] = c.first + (t.m0 + lane) * d + delta;
      queries.low[lane] = live[lane] ? 0 : 1;
      queries.high[lane] = live[lane] ? queries.at[lane] + call.reach : 0;
    }
    const int32_t stop = call.listed != nullptr ? call.prefix : least(least(call.prefix, s.sk), last + call.reach + 1);
    if (call.listed == nullptr) begin = ceil_div(most(call.prefix - c.residue, 0), d);
    for (int32_t p0 = 0; p0 < stop; p0 += kRows) {
      const int32_t n = least(kRows, stop - p0);
      for (int32_t r = 0; r < n; ++r) {
        const int32_t token = prefix_token(call, s, p0 + r);
        position[r] = token < 0 ? kNowhere : token;
        k[r] = token < 0 ? nullptr : row<T>(call.k, s.batch, s.k0 + token, kv);
        v[r] = token < 0 ? nullptr : row<T>(call.v, s.batch, s.k0 + token, kv);
      }
      engine.keys(k, v, position, n, score_of(call, t.head, 1), true);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t place = t.m0 + lane + c.shift;
    queries.at[lane] = place;
    queries.low[lane] = live[lane] ? place - call.left : 1;
    queries.high[lane] = live[lane] ? place + call.right : 0;
  }
  const int32_t first = t.m0 + c.shift, last = t.m0 + t.count - 1 + c.shift;
  const int32_t stop = least(c.keys, last + call.right + 1);
  for (int32_t n0 = most(begin, first - call.left); n0 < stop; n0 += kRows) {
    const int32_t n = least(kRows, stop - n0);
    for (int32_t r = 0; r < n; ++r) {
      const int64_t token = c.residue + static_cast<int64_t>(n0 + r) * d;
      const bool hidden = is_hidden(call, s, token);
      position[r] = hidden ? kNowhere : n0 + r;
      k[r] = hidden ? nullptr : row<T>(call.k, s.batch, s.k0 + token, kv);
      v[r] = hidden ? nullptr : row<T>(call.v, s.batch, s.k0 + token, kv);
    }
    const bool full = call.hidden == nullptr && n0 >= last - call.left && n0 + n - 1 <= first + call.right;
    engine.keys(k, v, position, n, score_of(call, t.head, d), !full);
  }
}

template <typename T>
static void window_forward(const WindowAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  Forward<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T* q[kLanes];
  T* out[kLanes];
  float *lse[kLanes], sinks[kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const QueryTile t = query_tile(call, task);
    if (t.count <= 0) continue;
    const WindowSequence& s = *t.sequence;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t token = s.q0 + t.c.first + static_cast<int64_t>(t.m0 + lane) * call.dilation;
      const bool there = lane < t.count;
      q[lane] = there ? row<T>(call.q, s.batch, token, t.head) : nullptr;
      out[lane] = there ? row<T>(call.out, s.batch, token, t.head) : nullptr;
      lse[lane] = there ? at(call.lse, s.batch, t.head, token) : nullptr;
      sinks[lane] = call.sinks == nullptr ? 0.0f : call.sinks[t.head];
    }
    engine.begin(q, call.sinks == nullptr ? nullptr : sinks);
    walk_keys<T>(call, t, engine);
    engine.end(out, lse);
  }
}

// Rows of q and dout of a tile, and the engine's lse and delta = sum(dout * out) - dlse; null and 0 where a lane has no
// query.
template <typename T, typename Engine>
static void load_query_tile(const WindowAttentionCall& call, const QueryTile& t, const T** q, const T** dout,
                            Engine& engine) {
  const WindowSequence& s = *t.sequence;
  for (int lane = 0; lane < kLanes; ++lane) {
    q[lane] = dout[lane] = nullptr;
    engine.lse[lane] = engine.delta[lane] = 0.0f;
    if (lane >= t.count) continue;
    const int64_t local = t.c.first + static_cast<int64_t>(t.m0 + lane) * call.dilation, token = s.q0 + local;
    float delta = 0.0f;
    if (!is_hidden(call, s, local)) {
      q[lane] = row<T>(call.q, s.batch, token, t.head);
      dout[lane] = row<T>(call.dout, s.batch, token, t.head);
      const T* out = row<T>(call.out, s.batch, token, t.head);
      for (int64_t j = 0; j < call.dim_v; ++j) delta += to_float(dout[lane][j]) * to_float(out[j]);
      if (call.dlse.data != nullptr) delta -= *at(call.dlse, s.batch, t.head, token);
    }
    engine.lse[lane] = *at(call.lse, s.batch, t.head, token);
    engine.delta[lane] = delta;
  }
}

// dq, and delta for the second pass
template <typename T>
static void window_query_gradient(const WindowAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  QueryGradient<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T *q[kLanes], *dout[kLanes];
  T* dq[kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const QueryTile t = query_tile(call, task);
    if (t.count <= 0) continue;
    const WindowSequence& s = *t.sequence;
    load_query_tile<T>(call, t, q, dout, engine);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t token = s.q0 + t.c.first + static_cast<int64_t>(t.m0 + lane) * call.dilation;
      dq[lane] = lane < t.count ? row<T>(call.dq, s.batch, token, t.head) : nullptr;
      if (lane < t.count) *at(call.delta, s.batch, t.head, token) = engine.delta[lane];
    }
    engine.begin(q, dout);
    walk_keys<T>(call, t, engine);
    engine.end(dq, call.scale);
  }
}

// the bias's gradient from one part of a head's queries
template <typename T>
static void window_bias_gradient(const WindowAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  BiasGradient<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T *q[kLanes], *dout[kLanes];
  const int64_t length = 2 * static_cast<int64_t>(call.bias_reach) + 1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / call.heads, head = task % call.heads;
    float* sums = call.dbias + task * length;
    std::memset(sums, 0, length * sizeof(float));
    engine.begin_head(sums + call.bias_reach, call.bias_reach);
    const int64_t first = part * call.bias_tiles, past = first + call.bias_tiles;
    for (int64_t tile = first; tile < past && tile < call.query_tiles; ++tile) {
      const QueryTile t = query_tile(call, head * call.query_tiles + tile);
      if (t.count <= 0) continue;
      load_query_tile<T>(call, t, q, dout, engine);
      engine.begin(q, dout);
      walk_keys<T>(call, t, engine);
    }
    engine.end_head();
  }
}

// queries [m0, m0 + count) of one class against the lanes; false if none is live
template <typename T>
static void load_query_rows(const WindowAttentionCall& call, const WindowSequence& s, int64_t head, int32_t first,
                            int32_t step, int32_t m0, int32_t count, const T** q, const T** dout, QueryRows& rows,
                            bool* live) {
  rows.slope = call.slopes == nullptr ? 0.0f : call.slopes[head];
  for (int32_t r = 0; r < count; ++r) {
    const int64_t local = first + static_cast<int64_t>(m0 + r) * step, token = s.q0 + local;
    live[r] = !is_hidden(call, s, local);
    q[r] = live[r] ? row<T>(call.q, s.batch, token, head) : nullptr;
    dout[r] = live[r] ? row<T>(call.dout, s.batch, token, head) : nullptr;
    rows.lse[r] = *at(call.lse, s.batch, head, token);
    rows.delta[r] = *at(call.delta, s.batch, head, token);
  }
}

// dk and dv of the band: every key tile on its own, the query heads of a group one after the other
template <typename T, typename O>
static void window_key_gradient(const WindowAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  KeyGradient<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T *k[kLanes], *v[kLanes], *q[kRows], *dout[kRows];
  O *dk[kLanes], *dv[kLanes];
  bool live[kRows];
  QueryRows rows;
  const int64_t group = call.heads / call.kv_heads;
  const int32_t d = call.dilation;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kv = task / call.key_tiles, tile = task % call.key_tiles;
    const WindowSequence& s = sequence_of(call, tile, true);
    const int64_t per_class = tiles_per_class(s.sk, d, kLanes), local = tile - s.key_tiles;
    const Class c = residue_class(s, static_cast<int32_t>(local / per_class), d);
    int32_t n0 = static_cast<int32_t>(local % per_class) * kLanes;
    // the first tokens' gradients are the prefix pass's
    if (call.listed == nullptr) n0 += ceil_div(most(call.prefix - c.residue, 0), d);
    const int32_t count = least(kLanes, c.keys - n0);
    if (count <= 0) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      k[lane] = v[lane] = nullptr;
      dk[lane] = dv[lane] = nullptr;
      engine.position[lane] = kNowhere;
      if (lane >= count) continue;
      const int64_t token = c.residue + static_cast<int64_t>(n0 + lane) * d;
      dk[lane] = row<O>(call.dk, s.batch, s.k0 + token, kv);
      dv[lane] = row<O>(call.dv, s.batch, s.k0 + token, kv);
      if (is_hidden(call, s, token)) continue;
      engine.position[lane] = n0 + lane;
      k[lane] = row<T>(call.k, s.batch, s.k0 + token, kv);
      v[lane] = row<T>(call.v, s.batch, s.k0 + token, kv);
    }
    engine.begin(k, v);
    const int32_t n1 = n0 + count - 1;
    const int32_t from = most(0, n0 - c.shift - call.right), stop = least(c.rows, n1 - c.shift + call.left + 1);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (int32_t m0 = from; m0 < stop; m0 += kRows) {
        const int32_t m = least(kRows, stop - m0);
        load_query_rows(call, s, h, c.first, d, m0, m, q, dout, rows, live);
        for (int32_t r = 0; r < m; ++r) {
          const int32_t place = m0 + r + c.shift;
          rows.at[r] = place;
          rows.low[r] = live[r] ? place - call.left : 1;
          rows.high[r] = live[r] ? place + call.right : 0;
        }
        const bool full = call.hidden == nullptr && count == kLanes && n0 >= m0 + m - 1 + c.shift - call.left &&
                          n1 <= m0 + c.shift + call.right;
        engine.queries(q, dout, rows, m, score_of(call, h, d, true), !full);
      }
    }
    engine.end(dk, dv, call.scale);
  }
}

// dk and dv of the prefix keys, which every query may see: one task per sequence, kv head and tile of keys
template <typename T, typename O>
static void window_prefix_gradient(const WindowAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  KeyGradient<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T *k[kLanes], *v[kLanes], *q[kRows], *dout[kRows];
  O *dk[kLanes], *dv[kLanes];
  bool live[kRows];
  QueryRows rows;
  const int64_t group = call.heads / call.kv_heads, tiles = (call.prefix + kLanes - 1) / kLanes;
  for (int64_t task = begin; task < end; ++task) {
    const WindowSequence& s = call.sequences[task / tiles / call.kv_heads];
    const int64_t kv = task / tiles % call.kv_heads;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t p = static_cast<int32_t>(task % tiles) * kLanes + lane;
      const int32_t token = p < call.prefix ? prefix_token(call, s, p) : -1;
      const bool there = token >= 0;
      engine.position[lane] = there ? token : kNowhere;
      k[lane] = there ? row<T>(call.k, s.batch, s.k0 + token, kv) : nullptr;
      v[lane] = there ? row<T>(call.v, s.batch, s.k0 + token, kv) : nullptr;
      dk[lane] = there ? row<O>(call.dk, s.batch, s.k0 + token, kv) : nullptr;
      dv[lane] = there ? row<O>(call.dv, s.batch, s.k0 + token, kv) : nullptr;
    }
    engine.begin(k, v);
    const int32_t delta = s.sk - s.sq;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (int32_t m0 = 0; m0 < s.sq; m0 += kRows) {
        const int32_t m = least(kRows, s.sq - m0);
        load_query_rows(call, s, h, 0, 1, m0, m, q, dout, rows, live);
        for (int32_t r = 0; r < m; ++r) {
          rows.at[r] = m0 + r + delta;
          rows.low[r] = live[r] ? 0 : 1;
          rows.high[r] = live[r] ? rows.at[r] + call.reach : 0;
        }
        engine.queries(q, dout, rows, m, score_of(call, h, 1, true), true);
      }
    }
    engine.end(dk, dv, call.scale);
  }
}

// O: type of dk and dv
template <typename T, typename O>
static void run_window_pass(const WindowAttentionCall& call, Pass pass, int64_t begin, int64_t end) {
  switch (pass) {
    case Pass::forward:
      return window_forward<T>(call, begin, end);
    case Pass::query_gradient:
      return window_query_gradient<T>(call, begin, end);
    case Pass::key_gradient:
      return window_key_gradient<T, O>(call, begin, end);
    case Pass::prefix_gradient:
      return window_prefix_gradient<T, O>(call, begin, end);
    case Pass::bias_gradient:
      return window_bias_gradient<T>(call, begin, end);
  }
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

inline HeadRows rows_of(const Tensor& t) {
  const bool packed = t.dim() == 3;
  return {const_cast<void*>(t.const_data_ptr()), packed ? 0 : t.stride(0), t.stride(packed ? 0 : 1),
          t.stride(packed ? 1 : 2)};
}

// [B, H, S] or [H, T] float32
inline Statistics statistics_of(const Tensor& t) {
  const bool packed = t.dim() == 2;
  return {static_cast<float*>(const_cast<void*>(t.const_data_ptr())), packed ? 0 : t.stride(0),
          t.stride(packed ? 0 : 1), t.stride(packed ? 1 : 2)};
}

inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.push_back(t.size(i));
  shape.push_back(last);
  return shape;
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

// [B, H, S] or [H, T] for a [B, S, H, D] or [T, H, D] tensor
inline std::vector<int64_t> statistics_shape(const Tensor& q) {
  if (q.dim() == 3) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

// any float dtype to float32; small vectors such as sinks
inline std::vector<float> read_floats(const Tensor& t) {
  std::vector<float> values(t.size(0));
  const int64_t stride = t.stride(0);
  for (size_t i = 0; i < values.size(); ++i) {
    if (t.scalar_type() == ScalarType::Double) {
      values[i] = static_cast<float>(static_cast<const double*>(t.const_data_ptr())[i * stride]);
    } else {
      TILEFUSE_BY_DTYPE(dtype_of(t), E,
                        { values[i] = to_float(static_cast<const E*>(t.const_data_ptr())[i * stride]); })
    }
  }
  return values;
}

inline void write_floats(Tensor& t, const std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (t.scalar_type() == ScalarType::Double) {
      static_cast<double*>(t.mutable_data_ptr())[i] = values[i];
    } else {
      TILEFUSE_BY_DTYPE(dtype_of(t), E, { static_cast<E*>(t.mutable_data_ptr())[i] = from_float<E>(values[i]); })
    }
  }
}

// [H, L] of any strides, float32 or float64, to float32
inline std::vector<float> read_table(const Tensor& t) {
  std::vector<float> values(t.size(0) * t.size(1));
  const auto fill = [&](const auto* data) {
    for (int64_t h = 0, i = 0; h < t.size(0); ++h)
      for (int64_t j = 0; j < t.size(1); ++j, ++i)
        values[i] = static_cast<float>(data[h * t.stride(0) + j * t.stride(1)]);
  };
  if (t.scalar_type() == ScalarType::Double) {
    fill(static_cast<const double*>(t.const_data_ptr()));
  } else {
    fill(static_cast<const float*>(t.const_data_ptr()));
  }
  return values;
}

inline std::vector<int64_t> read_offsets(const Tensor& t, int64_t limit) {
  std::vector<int64_t> values(t.size(0));
  const Index index = index_of(t);
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t x = index[static_cast<int64_t>(i) * t.stride(0)];
    values[i] = x < 0 ? 0 : x > limit ? limit : x;
  }
  return values;
}

inline int32_t bounded(int64_t window) {
  return window < 0 || window > kUnbounded ? kUnbounded : static_cast<int32_t>(window);
}

// the call without its outputs; the vectors own what it points to
struct WindowAttentionSetup {
  WindowAttentionCall call;
  std::vector<WindowSequence> sequences;
  std::vector<float> sinks, slopes, bias, mirrored;

  WindowAttentionSetup(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks_in,
                       const OptionalTensor& slopes_in, const OptionalTensor& cu_q, const OptionalTensor& cu_k,
                       const OptionalTensor& bias_in, int64_t left, int64_t right, int64_t dilation, double scale,
                       double softcap, int64_t prefix) {
    const int64_t rank = q.dim();
    call.dtype = dtype_of(q);
    call.q = rows_of(q);
    call.k = rows_of(k);
    call.v = rows_of(v);
    call.heads = q.size(rank - 2);
    call.kv_heads = k.size(rank - 2);
    call.dim = q.size(rank - 1);
    call.dim_v = v.size(rank - 1);
    call.left = bounded(left);
    call.right = bounded(right);
    call.dilation = bounded(dilation);
    call.scale = static_cast<float>(scale);
    call.softcap = static_cast<float>(softcap);
    call.prefix = static_cast<int32_t>(prefix < k.size(rank - 3) ? prefix : k.size(rank - 3));
    call.reach = right < 0 ? kUnbounded : bounded(right * dilation);
    if (sinks_in) sinks = read_floats(*sinks_in);
    if (slopes_in) slopes = read_floats(*slopes_in);
    call.sinks = sinks_in ? sinks.data() : nullptr;
    call.slopes = slopes_in ? slopes.data() : nullptr;
    if (bias_in) {
      bias = read_table(*bias_in);
      mirrored = bias;
      for (int64_t h = 0, length = bias_in->size(1); h < call.heads; ++h)
        std::reverse(mirrored.begin() + h * length, mirrored.begin() + (h + 1) * length);
      call.bias = bias.data();
      call.mirrored = mirrored.data();
      call.bias_reach = bounded(bias_in->size(1) / 2);
    }
    if (rank == 3) {
      const std::vector<int64_t> of_q = read_offsets(*cu_q, q.size(0)), of_k = read_offsets(*cu_k, k.size(0));
      for (size_t b = 0; b + 1 < of_q.size(); ++b)
        add(0, of_q[b], of_k[b], of_q[b + 1] - of_q[b], of_k[b + 1] - of_k[b]);
    } else {
      for (int64_t b = 0; b < q.size(0); ++b) add(b, 0, 0, q.size(1), k.size(1));
    }
    call.sequences = sequences.data();
    call.sequence_count = static_cast<int64_t>(sequences.size());
  }

 private:
  void add(int64_t batch, int64_t q0, int64_t k0, int64_t sq, int64_t sk) {
    sq = sq < 0 ? 0 : sq;
    sk = sk < 0 ? 0 : sk;
    sequences.push_back(
        {batch, q0, k0, static_cast<int32_t>(sq), static_cast<int32_t>(sk), call.query_tiles, call.key_tiles});
    call.query_tiles += call.dilation * tiles_per_class(sq, call.dilation, 64);
    call.key_tiles += call.dilation * tiles_per_class(sk, call.dilation, 64);
  }
};

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
