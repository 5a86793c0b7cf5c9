// build-flags: -ffp-contract=fast
// Block-sparse attention on the CPU: listed blocks are gathered row by row into full key tiles.
#include "attention/window_cpu.h"

#include <algorithm>

namespace tilefuse {

struct BlockSparseAttentionCall {
  Dtype dtype;
  HeadRows q, k, v, out, dout, dq, dk, dv;
  Statistics lse, dlse, delta;
  // lists of the query blocks (of the key blocks in the key pass), strides 0 where shared
  const int64_t* offsets;
  const int64_t* index;
  int64_t batch_lists, head_lists, entries;
  const uint8_t* key_mask;
  int64_t mask_batch, mask_token;
  int64_t sq, sk, heads, kv_heads, dim, dim_v, block, rows, columns;
  bool causal;
  float scale;
};

namespace TILEFUSE_ISA {

namespace {

inline bool shown(const BlockSparseAttentionCall& call, int64_t b, int64_t token) {
  return call.key_mask == nullptr || call.key_mask[b * call.mask_batch + token * call.mask_token] != 0;
}

inline const int64_t* list_of(const BlockSparseAttentionCall& call, int64_t b, int64_t h, int64_t i, int64_t* count) {
  const int64_t* at = call.offsets + b * call.batch_lists + h * call.head_lists + i;
  const int64_t start = at[0] < 0 ? 0 : at[0] > call.entries ? call.entries : at[0];
  const int64_t stop = at[1] < start ? start : at[1] > call.entries ? call.entries : at[1];
  *count = stop - start;
  return call.index + start;
}

// a task is up to kLanes rows of one block of one head
struct SparseTile {
  int64_t b, head, i, first, count;
};

inline SparseTile sparse_tile(const BlockSparseAttentionCall& call, int64_t task, int64_t heads, int64_t blocks,
                              int64_t tokens) {
  const int64_t pieces = (call.block + kLanes - 1) / kLanes;
  SparseTile t;
  t.b = task / (heads * blocks * pieces);
  t.head = task / (blocks * pieces) % heads;
  t.i = task / pieces % blocks;
  t.first = t.i * call.block + task % pieces * kLanes;
  int64_t stop = (t.i + 1) * call.block < tokens ? (t.i + 1) * call.block : tokens;
  if (t.first + kLanes < stop) stop = t.first + kLanes;
  t.count = stop - t.first;
  return t;
}

template <typename T, typename Engine>
void walk_lists(const BlockSparseAttentionCall& call, const SparseTile& t, Engine& engine) {
  const int64_t kv = t.head / (call.heads / call.kv_heads), delta = call.sk - call.sq;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t place = static_cast<int32_t>(t.first + lane + delta);
    engine.queries.at[lane] = place;
    engine.queries.low[lane] = lane < t.count ? 0 : 1;
    engine.queries.high[lane] = lane >= t.count ? 0 : call.causal ? place : kNowhere - 1;
  }
  const T *k[kRows], *v[kRows];
  int32_t position[kRows];
  int64_t n = 0, listed;
  bool mask = false;
  const auto flush = [&] {
    if (n > 0) engine.keys(k, v, position, n, {call.scale, 0.0f, false, 1}, mask);
    n = 0;
    mask = false;
  };
  const int64_t* blocks = list_of(call, t.b, t.head, t.i, &listed);
  for (int64_t e = 0; e < listed; ++e) {
    if (blocks[e] < 0 || blocks[e] >= call.columns) continue;
    const int64_t stop = (blocks[e] + 1) * call.block < call.sk ? (blocks[e] + 1) * call.block : call.sk;
    for (int64_t token = blocks[e] * call.block; token < stop; ++token) {
      const bool there = shown(call, t.b, token);
      k[n] = there ? row<T>(call.k, t.b, token, kv) : nullptr;
      v[n] = there ? row<T>(call.v, t.b, token, kv) : nullptr;
      position[n] = there ? static_cast<int32_t>(token) : kNowhere;
      mask |= !there || (call.causal && token > t.first + delta);
      if (++n == kRows) flush();
    }
  }
  flush();
}

template <typename T>
void sparse_forward(const BlockSparseAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  Forward<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T* q[kLanes];
  T* out[kLanes];
  float* lse[kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const SparseTile t = sparse_tile(call, task, call.heads, call.rows, call.sq);
    if (t.count <= 0) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool there = lane < t.count;
      q[lane] = there ? row<T>(call.q, t.b, t.first + lane, t.head) : nullptr;
      out[lane] = there ? row<T>(call.out, t.b, t.first + lane, t.head) : nullptr;
      lse[lane] = there ? at(call.lse, t.b, t.head, t.first + lane) : nullptr;
    }
    engine.begin(q, nullptr);
    walk_lists<T>(call, t, engine);
    engine.end(out, lse);
  }
}

template <typename T>
void sparse_query_gradient(const BlockSparseAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  QueryGradient<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T *q[kLanes], *dout[kLanes];
  T* dq[kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const SparseTile t = sparse_tile(call, task, call.heads, call.rows, call.sq);
    if (t.count <= 0) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      q[lane] = dout[lane] = nullptr;
      dq[lane] = nullptr;
      engine.lse[lane] = engine.delta[lane] = 0.0f;
      if (lane >= t.count) continue;
      const int64_t token = t.first + lane;
      q[lane] = row<T>(call.q, t.b, token, t.head);
      dout[lane] = row<T>(call.dout, t.b, token, t.head);
      dq[lane] = row<T>(call.dq, t.b, token, t.head);
      const T* out = row<T>(call.out, t.b, token, t.head);
      float delta = 0.0f;
      for (int64_t j = 0; j < call.dim_v; ++j) delta += to_float(dout[lane][j]) * to_float(out[j]);
      if (call.dlse.data != nullptr) delta -= *at(call.dlse, t.b, t.head, token);
      engine.lse[lane] = *at(call.lse, t.b, t.head, token);
      engine.delta[lane] = *at(call.delta, t.b, t.head, token) = delta;
    }
    engine.begin(q, dout);
    walk_lists<T>(call, t, engine);
    engine.end(dq, call.scale);
  }
}

template <typename T>
void sparse_key_gradient(const BlockSparseAttentionCall& call, int64_t begin, int64_t end) {
  Scratch scratch(tile_bytes(kLanes, call.dim, call.dim_v));
  KeyGradient<T, kLanes> engine(scratch, call.dim, call.dim_v);
  const T *k[kLanes], *v[kLanes], *q[kRows], *dout[kRows];
  T *dk[kLanes], *dv[kLanes];
  QueryRows rows;
  const int64_t group = call.heads / call.kv_heads, delta = call.sk - call.sq;
  for (int64_t task = begin; task < end; ++task) {
    const SparseTile t = sparse_tile(call, task, call.kv_heads, call.columns, call.sk);
    if (t.count <= 0) continue;
    bool whole = t.count == kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t token = t.first + lane;
      const bool there = lane < t.count, seen = there && shown(call, t.b, token);
      whole &= seen;
      engine.position[lane] = seen ? static_cast<int32_t>(token) : kNowhere;
      k[lane] = seen ? row<T>(call.k, t.b, token, t.head) : nullptr;
      v[lane] = seen ? row<T>(call.v, t.b, token, t.head) : nullptr;
      dk[lane] = there ? row<T>(call.dk, t.b, token, t.head) : nullptr;
      dv[lane] = there ? row<T>(call.dv, t.b, token, t.head) : nullptr;
    }
    engine.begin(k, v);
    rows.slope = 0.0f;
    for (int64_t h = t.head * group; h < (t.head + 1) * group; ++h) {
      int64_t n = 0, listed;
      bool mask = !whole;
      const auto flush = [&] {
        if (n > 0) engine.queries(q, dout, rows, n, {call.scale, 0.0f, false, 1}, mask);
        n = 0;
        mask = !whole;
      };
      const int64_t* blocks = list_of(call, t.b, h, t.i, &listed);
      for (int64_t e = 0; e < listed; ++e) {
        const int64_t stop = (blocks[e] + 1) * call.block < call.sq ? (blocks[e] + 1) * call.block : call.sq;
        for (int64_t token = blocks[e] * call.block; token < stop; ++token) {
          q[n] = row<T>(call.q, t.b, token, h);
          dout[n] = row<T>(call.dout, t.b, token, h);
          rows.at[n] = static_cast<int32_t>(token + delta);
          rows.low[n] = 0;
          rows.high[n] = call.causal ? rows.at[n] : kNowhere - 1;
          rows.lse[n] = *at(call.lse, t.b, h, token);
          rows.delta[n] = *at(call.delta, t.b, h, token);
          mask |= call.causal && t.first + kLanes - 1 > token + delta;
          if (++n == kRows) flush();
        }
      }
      flush();
    }
    engine.end(dk, dv, call.scale);
  }
}

}  // namespace

void block_sparse_attention_pass(const BlockSparseAttentionCall& call, Pass pass, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, {
    switch (pass) {
      case Pass::forward:
        sparse_forward<T>(call, begin, end);
        break;
      case Pass::query_gradient:
        sparse_query_gradient<T>(call, begin, end);
        break;
      default:
        sparse_key_gradient<T>(call, begin, end);
    }
  })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(block_sparse_attention_pass)

namespace {

void run(const BlockSparseAttentionCall& call, Pass pass, int64_t blocks, int64_t heads, int64_t batch) {
  run_parallel(block_sparse_attention_pass, batch * heads * blocks * ((call.block + 63) / 64), 1, call, pass);
}

std::vector<int64_t> read_values(const Tensor& t) {
  const Index index = index_of(t);
  std::vector<int64_t> values;
  const int64_t a = t.dim() == 3 ? t.size(0) : 1, b = t.dim() == 3 ? t.size(1) : 1, c = t.size(t.dim() - 1);
  const int64_t stride = t.stride(t.dim() - 1);
  values.reserve(a * b * c);
  for (int64_t i = 0; i < a; ++i)
    for (int64_t j = 0; j < b; ++j)
      for (int64_t l = 0; l < c; ++l) {
        values.push_back(index[(t.dim() == 3 ? i * t.stride(0) + j * t.stride(1) : 0) + l * stride]);
      }
  return values;
}

struct BlockSparseAttentionSetup {
  BlockSparseAttentionCall call{};
  std::vector<int64_t> offsets, index;
  int64_t batch, lists_b, lists_h;

  BlockSparseAttentionSetup(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_offsets,
                            const Tensor& col_index, const OptionalTensor& key_mask, int64_t block_size, bool causal,
                            double scale)
      : offsets(read_values(row_offsets)), index(read_values(col_index)) {
    call.dtype = dtype_of(q);
    call.q = rows_of(q);
    call.k = rows_of(k);
    call.v = rows_of(v);
    batch = q.size(0);
    call.sq = q.size(1);
    call.sk = k.size(1);
    call.heads = q.size(2);
    call.kv_heads = k.size(2);
    call.dim = q.size(3);
    call.dim_v = v.size(3);
    call.block = block_size;
    call.rows = (call.sq + block_size - 1) / block_size;
    call.columns = (call.sk + block_size - 1) / block_size;
    call.causal = causal;
    call.scale = static_cast<float>(scale);
    if (key_mask) {
      call.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
      call.mask_batch = key_mask->stride(0);
      call.mask_token = key_mask->stride(1);
    }
    lists_b = row_offsets.size(0);
    lists_h = row_offsets.size(1);
    set_lists(call.rows);
  }

  // lists per key block: rows ascending, repeats kept
  void transpose() {
    const int64_t lists = lists_b * lists_h;
    std::vector<int64_t> turned(lists * (call.columns + 1), 0), rows;
    int64_t written = 0;
    std::vector<int64_t> count(call.columns + 1);
    for (int64_t list = 0; list < lists; ++list) {
      const int64_t* of_list = offsets.data() + list * (call.rows + 1);
      const auto each = [&](const auto& visit) {
        for (int64_t i = 0; i < call.rows; ++i) {
          const int64_t start = of_list[i] < 0 ? 0 : of_list[i] > call.entries ? call.entries : of_list[i];
          const int64_t stop = of_list[i + 1] > call.entries ? call.entries : of_list[i + 1];
          for (int64_t e = start; e < stop; ++e)
            if (index[e] >= 0 && index[e] < call.columns) visit(i, index[e]);
        }
      };
      std::fill(count.begin(), count.end(), 0);
      each([&](int64_t, int64_t column) { ++count[column]; });
      int64_t* of_columns = turned.data() + list * (call.columns + 1);
      for (int64_t j = 0; j < call.columns; ++j) {
        of_columns[j] = written;
        written += count[j];
        count[j] = of_columns[j];
      }
      of_columns[call.columns] = written;
      rows.resize(written);
      each([&](int64_t i, int64_t column) { rows[count[column]++] = i; });
    }
    offsets = turned;
    index = rows;
    set_lists(call.columns);
  }

 private:
  void set_lists(int64_t rows) {
    call.offsets = offsets.data();
    call.index = index.data();
    call.entries = static_cast<int64_t>(index.size());
    call.batch_lists = lists_b == 1 ? 0 : lists_h * (rows + 1);
    call.head_lists = lists_h == 1 ? 0 : rows + 1;
  }
};

std::tuple<Tensor, Tensor> block_sparse_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor row_offsets,
                                                      Tensor col_index, OptionalTensor key_mask, int64_t block_size,
                                                      bool causal, double scale) {
  BlockSparseAttentionSetup setup(q, k, v, row_offsets, col_index, key_mask, block_size, causal, scale);
  Tensor out = empty_of(q, with_last(q, v.size(3)));
  Tensor lse = empty_of(q, statistics_shape(q), ScalarType::Float);
  setup.call.out = rows_of(out);
  setup.call.lse = statistics_of(lse);
  run(setup.call, Pass::forward, setup.call.rows, setup.call.heads, setup.batch);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k,
                                                              Tensor v, Tensor out, Tensor lse, Tensor row_offsets,
                                                              Tensor col_index, OptionalTensor key_mask,
                                                              int64_t block_size, bool causal, double scale) {
  BlockSparseAttentionSetup setup(q, k, v, row_offsets, col_index, key_mask, block_size, causal, scale);
  Tensor dq = empty_of(q, shape_of(q)), dk = empty_of(k, shape_of(k));
  Tensor dv = empty_of(v, shape_of(v));
  Tensor delta = empty_of(q, statistics_shape(q), ScalarType::Float);
  BlockSparseAttentionCall& call = setup.call;
  call.out = rows_of(out);
  call.dout = rows_of(dout);
  call.lse = statistics_of(lse);
  call.delta = statistics_of(delta);
  if (dlse) call.dlse = statistics_of(*dlse);
  call.dq = rows_of(dq);
  call.dk = rows_of(dk);
  call.dv = rows_of(dv);
  run(call, Pass::query_gradient, call.rows, call.heads, setup.batch);
  setup.transpose();
  run(call, Pass::key_gradient, call.columns, call.kv_heads, setup.batch);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("block_sparse_attention_fwd", TORCH_BOX(&block_sparse_attention_fwd));
  m.impl("block_sparse_attention_bwd", TORCH_BOX(&block_sparse_attention_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
