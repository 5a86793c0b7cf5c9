// build-flags: -ffp-contract=fast
// Window attention with global tokens on the CPU: local rows as in window_attention with the global keys as a listed
// prefix, then the global rows as a dense attention of few rows.
#include "attention/window_cpu.h"

#include <algorithm>

namespace tilefuse {

struct GlobalAttentionCall {
  // the local part; its dk and dv are float32
  WindowAttentionCall local;
  // projections of the global rows' own attention, and where their gradients go
  HeadRows q, k, v, dq, dk, dv;
  bool own_k, own_v;  // dk / dv of their own, in the tensors' dtype; otherwise added to the local float32 ones
  int64_t batch, length, count;
  const uint8_t* padded;  // nonzero = key_mask is False; [B, S]
  bool causal;
};

namespace TILEFUSE_ISA {

namespace {

struct GlobalTile {
  int64_t b, head, first, count;
};

inline GlobalTile global_tile(const GlobalAttentionCall& call, int64_t task) {
  const int64_t tiles = (call.count + kLanes - 1) / kLanes;
  GlobalTile t;
  t.b = task / (tiles * call.local.heads);
  t.head = task / tiles % call.local.heads;
  t.first = task % tiles * kLanes;
  t.count = t.first + kLanes < call.count ? kLanes : call.count - t.first;
  return t;
}

inline int32_t place_of(const GlobalAttentionCall& call, const GlobalTile& t, int lane) {
  return lane < t.count ? call.local.listed[t.b * call.count + t.first + lane] : -1;
}

template <typename T, typename Engine>
void walk_all_keys(const GlobalAttentionCall& call, const GlobalTile& t, Engine& engine) {
  const int64_t kv = t.head / (call.local.heads / call.local.kv_heads);
  bool partial = call.causal;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t place = place_of(call, t, lane);
    engine.queries.slope[lane] = 0.0f;
    engine.queries.at[lane] = place;
    engine.queries.low[lane] = place < 0 ? 1 : 0;
    engine.queries.high[lane] = place < 0 ? 0 : call.causal ? place : kNowhere - 1;
  }
  const T *k[kRows], *v[kRows];
  int32_t position[kRows];
  for (int64_t n0 = 0; n0 < call.length; n0 += kRows) {
    const int64_t n = n0 + kRows < call.length ? kRows : call.length - n0;
    bool mask = partial;
    for (int64_t r = 0; r < n; ++r) {
      const bool shown = call.padded == nullptr || call.padded[t.b * call.length + n0 + r] == 0;
      mask |= !shown;
      position[r] = shown ? static_cast<int32_t>(n0 + r) : kNowhere;
      k[r] = shown ? row<T>(call.k, t.b, n0 + r, kv) : nullptr;
      v[r] = shown ? row<T>(call.v, t.b, n0 + r, kv) : nullptr;
    }
    engine.keys(k, v, position, n, {call.local.scale, 0.0f, false, 1}, mask);
  }
}

template <typename T>
void global_forward(const GlobalAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.local.dim, call.local.dim_v));
  Forward<T, kLanes> engine(scratch, call.local.dim, call.local.dim_v);
  const T* q[kLanes];
  T* out[kLanes];
  float* lse[kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const GlobalTile t = global_tile(call, task);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t place = place_of(call, t, lane);
      q[lane] = place < 0 ? nullptr : row<T>(call.q, t.b, place, t.head);
      out[lane] = place < 0 ? nullptr : row<T>(call.local.out, t.b, place, t.head);
      lse[lane] = place < 0 ? nullptr : at(call.local.lse, t.b, t.head, place);
    }
    engine.begin(q, nullptr);
    walk_all_keys<T>(call, t, engine);
    engine.end(out, lse);
  }
}

// dq of the global rows; their delta replaces the zero that the local pass left
template <typename T>
void global_query_gradient(const GlobalAttentionCall& call, int64_t begin, int64_t end) {
  const WindowAttentionCall& local = call.local;
  Scratch scratch(tile_bytes(kLanes, local.dim, local.dim_v));
  QueryGradient<T, kLanes> engine(scratch, local.dim, local.dim_v);
  const T *q[kLanes], *dout[kLanes];
  T* dq[kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const GlobalTile t = global_tile(call, task);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t place = place_of(call, t, lane);
      q[lane] = dout[lane] = nullptr;
      dq[lane] = nullptr;
      engine.lse[lane] = engine.delta[lane] = 0.0f;
      if (place < 0) continue;
      q[lane] = row<T>(call.q, t.b, place, t.head);
      dout[lane] = row<T>(local.dout, t.b, place, t.head);
      dq[lane] = row<T>(call.dq, t.b, place, t.head);
      const T* out = row<T>(local.out, t.b, place, t.head);
      float delta = 0.0f;
      for (int64_t j = 0; j < local.dim_v; ++j) delta += to_float(dout[lane][j]) * to_float(out[j]);
      if (local.dlse.data != nullptr) delta -= *at(local.dlse, t.b, t.head, place);
      engine.lse[lane] = *at(local.lse, t.b, t.head, place);
      engine.delta[lane] = *at(local.delta, t.b, t.head, place) = delta;
    }
    engine.begin(q, dout);
    walk_all_keys<T>(call, t, engine);
    engine.end(dq, local.scale);
  }
}

// KO, VO: types of dk and dv
template <typename T, typename KO, typename VO>
void global_key_gradient(const GlobalAttentionCall& call, int64_t begin, int64_t end) {
  const WindowAttentionCall& local = call.local;
  Scratch scratch(tile_bytes(kLanes, local.dim, local.dim_v));
  KeyGradient<T, kLanes> engine(scratch, local.dim, local.dim_v);
  const T *k[kLanes], *v[kLanes], *q[kRows], *dout[kRows];
  KO* dk[kLanes];
  VO* dv[kLanes];
  QueryRows rows;
  rows.slope = 0.0f;
  const int64_t group = local.heads / local.kv_heads, tiles = (call.length + kLanes - 1) / kLanes;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / (tiles * local.kv_heads), kv = task / tiles % local.kv_heads, n0 = task % tiles * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t token = n0 + lane;
      const bool there = token < call.length;
      const bool shown = there && (call.padded == nullptr || call.padded[b * call.length + token] == 0);
      engine.position[lane] = shown ? static_cast<int32_t>(token) : kNowhere;
      k[lane] = shown ? row<T>(call.k, b, token, kv) : nullptr;
      v[lane] = shown ? row<T>(call.v, b, token, kv) : nullptr;
      dk[lane] = there ? row<KO>(call.dk, b, token, kv) : nullptr;
      dv[lane] = there ? row<VO>(call.dv, b, token, kv) : nullptr;
    }
    engine.begin(k, v);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (int64_t g0 = 0; g0 < call.count; g0 += kRows) {
        const int64_t n = g0 + kRows < call.count ? kRows : call.count - g0;
        for (int64_t r = 0; r < n; ++r) {
          const int32_t place = local.listed[b * call.count + g0 + r];
          q[r] = place < 0 ? nullptr : row<T>(call.q, b, place, h);
          dout[r] = place < 0 ? nullptr : row<T>(local.dout, b, place, h);
          rows.at[r] = place;
          rows.low[r] = place < 0 ? 1 : 0;
          rows.high[r] = place < 0 ? 0 : call.causal ? place : kNowhere - 1;
          rows.lse[r] = place < 0 ? 0.0f : *at(local.lse, b, h, place);
          rows.delta[r] = place < 0 ? 0.0f : *at(local.delta, b, h, place);
        }
        engine.queries(q, dout, rows, n, {local.scale, 0.0f, false, 1}, true);
      }
    }
    engine.end(dk, dv, local.scale, !call.own_k, !call.own_v);
  }
}

}  // namespace

void global_attention_pass(const GlobalAttentionCall& call, Pass pass, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.local.dtype, T, {
    switch (pass) {
      case Pass::forward:
        global_forward<T>(call, begin, end);
        break;
      case Pass::query_gradient:
        global_query_gradient<T>(call, begin, end);
        break;
      default:
        if (call.own_k && call.own_v) {
          global_key_gradient<T, T, T>(call, begin, end);
        } else if (call.own_k) {
          global_key_gradient<T, T, float>(call, begin, end);
        } else if (call.own_v) {
          global_key_gradient<T, float, T>(call, begin, end);
        } else {
          global_key_gradient<T, float, float>(call, begin, end);
        }
    }
  })
}

void global_attention_local_pass(const WindowAttentionCall& call, Pass pass, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { run_window_pass<T, float>(call, pass, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(global_attention_pass)
TILEFUSE_DISPATCH(global_attention_local_pass)

namespace {

struct GlobalAttentionSetup {
  WindowAttentionSetup window;
  GlobalAttentionCall call{};
  std::vector<int32_t> positions;
  std::vector<uint8_t> hidden, padded;

  GlobalAttentionSetup(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index,
                       const OptionalTensor& q_global, const OptionalTensor& k_global, const OptionalTensor& v_global,
                       const OptionalTensor& key_mask, int64_t left, int64_t right, int64_t dilation, bool causal,
                       double scale)
      : window(q, k, v, {}, {}, {}, {}, {}, left, right, dilation, scale, 0.0, 0) {
    call.batch = q.size(0);
    call.length = q.size(1);
    call.count = index.size(1);
    call.causal = causal;
    hidden.assign(call.batch * call.length, 0);
    if (key_mask) {
      const uint8_t* mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
      for (int64_t i = 0; i < call.batch * call.length; ++i)
        hidden[i] = mask[i / call.length * key_mask->stride(0) + i % call.length * key_mask->stride(1)] == 0;
      padded = hidden;
    }
    // a repeated, hidden or missing position is no global token
    const Index listed = index_of(index);
    for (int64_t b = 0; b < call.batch; ++b) {
      for (int64_t g = 0; g < call.count; ++g) {
        const int64_t place = listed[b * index.stride(0) + g * index.stride(1)];
        const bool valid = place >= 0 && place < call.length && hidden[b * call.length + place] == 0;
        if (valid) hidden[b * call.length + place] = 1;
        positions.push_back(valid ? static_cast<int32_t>(place) : -1);
      }
      // ascending, so that the order of the list does not matter
      std::sort(positions.begin() + b * call.count, positions.end());
    }
    WindowAttentionCall& local = window.call;
    local.hidden = hidden.data();
    local.hidden_stride = call.length;
    local.listed = positions.data();
    local.prefix = static_cast<int32_t>(call.count);
    local.reach = causal ? 0 : kUnbounded;
    call.padded = key_mask ? padded.data() : nullptr;
    call.q = q_global ? rows_of(*q_global) : local.q;
    call.k = k_global ? rows_of(*k_global) : local.k;
    call.v = v_global ? rows_of(*v_global) : local.v;
    call.own_k = k_global.has_value();
    call.own_v = v_global.has_value();
  }

  void run_local(Pass pass, int64_t tasks) { run_parallel(global_attention_local_pass, tasks, 1, window.call, pass); }

  void run_global(Pass pass, int64_t tasks) {
    call.local = window.call;
    run_parallel(global_attention_pass, call.count > 0 ? tasks : 0, 1, call, pass);
  }
};

std::tuple<Tensor, Tensor> global_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor global_index,
                                                OptionalTensor q_global, OptionalTensor k_global,
                                                OptionalTensor v_global, OptionalTensor key_mask, int64_t left,
                                                int64_t right, int64_t dilation, bool causal, double scale) {
  GlobalAttentionSetup setup(q, k, v, global_index, q_global, k_global, v_global, key_mask, left, right, dilation,
                             causal, scale);
  Tensor out = empty_of(q, with_last(q, v.size(3)));
  Tensor lse = empty_of(q, statistics_shape(q), ScalarType::Float);
  WindowAttentionCall& local = setup.window.call;
  local.out = rows_of(out);
  local.lse = statistics_of(lse);
  setup.run_local(Pass::forward, local.heads * local.query_tiles);
  setup.run_global(Pass::forward, setup.call.batch * local.heads * ((setup.call.count + 63) / 64));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> global_attention_bwd(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor global_index,
    OptionalTensor q_global, OptionalTensor k_global, OptionalTensor v_global, OptionalTensor key_mask, int64_t left,
    int64_t right, int64_t dilation, bool causal, double scale) {
  GlobalAttentionSetup setup(q, k, v, global_index, q_global, k_global, v_global, key_mask, left, right, dilation,
                             causal, scale);
  Tensor dq = empty_of(q, shape_of(q));
  // float32 until everything is added
  Tensor dk = empty_of(k, shape_of(k), ScalarType::Float);
  Tensor dv = empty_of(v, shape_of(v), ScalarType::Float);
  const Tensor none = empty_of(q, {0});
  Tensor dq_global = q_global ? torch::stable::new_zeros(q, shape_of(q)) : none;
  Tensor dk_global = k_global ? torch::stable::new_zeros(k, shape_of(k)) : none;
  Tensor dv_global = v_global ? torch::stable::new_zeros(v, shape_of(v)) : none;
  Tensor delta = empty_of(q, statistics_shape(q), ScalarType::Float);
  WindowAttentionCall& local = setup.window.call;
  local.out = rows_of(out);
  local.dout = rows_of(dout);
  local.dq = rows_of(dq);
  local.dk = rows_of(dk);
  local.dv = rows_of(dv);
  local.lse = statistics_of(lse);
  local.delta = statistics_of(delta);
  if (dlse) local.dlse = statistics_of(*dlse);
  GlobalAttentionCall& call = setup.call;
  call.dq = rows_of(q_global ? dq_global : dq);
  call.dk = rows_of(k_global ? dk_global : dk);
  call.dv = rows_of(v_global ? dv_global : dv);
  setup.run_local(Pass::query_gradient, local.heads * local.query_tiles);
  setup.run_local(Pass::key_gradient, local.kv_heads * local.key_tiles);
  setup.run_local(Pass::prefix_gradient, call.batch * local.kv_heads * ((call.count + 63) / 64));
  setup.run_global(Pass::query_gradient, call.batch * local.heads * ((call.count + 63) / 64));
  setup.run_global(Pass::key_gradient, call.batch * local.kv_heads * ((call.length + 63) / 64));
  return {
      dq,       torch::stable::to(dk, k.scalar_type()), torch::stable::to(dv, v.scalar_type()), dq_global, dk_global,
      dv_global};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("global_attention_fwd", TORCH_BOX(&global_attention_fwd));
  m.impl("global_attention_bwd", TORCH_BOX(&global_attention_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
