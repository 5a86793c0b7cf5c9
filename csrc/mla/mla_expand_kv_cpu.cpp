// Keys and values of all heads from latent rows, on the CPU: the product writes both where they belong.
// build-flags: -ffp-contract=fast
#include "mla/product_cpu.h"

#include "common/stream_cpu.h"

namespace tilefuse {

struct MlaExpandKvInputs {
  const void *latent, *weight;
  int64_t latent_stride, weight_stride;
  Dtype dtype;
  int64_t tokens, heads, rank, nope, v_dim, rope;
};

struct MlaExpandKvCall : MlaExpandKvInputs {
  bool stream;
  // [blocks of tokens, words of R, tokens of a block], 4 bytes each
  void* packed;
  void *k, *v;
};

struct MlaExpandKvBwdCall : MlaExpandKvInputs {
  const void *dk, *dv;
  int64_t k_token, k_head, v_token, v_head;
  // tokens of one item of work
  int64_t block_tokens;
  void *dlatent, *dweight;
};

// most tokens whose sums one item of work keeps
constexpr int64_t kMostTokens = 288;

namespace TILEFUSE_ISA {

namespace {

template <typename T>
void pack_tokens(const MlaExpandKvCall& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const int64_t depth = words(call.rank, Operand<T>::per_word);
  for (int64_t block = begin; block < end; ++block) {
    const T* rows[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) {
      const int64_t token = block * kColumns + i;
      rows[i] = token < call.tokens ? static_cast<const T*>(call.latent) + token * call.latent_stride : nullptr;
    }
    pack_lanes<kColumns>(rows, call.rank, static_cast<W*>(call.packed) + block * depth * kColumns);
  }
}

// c [count][tokens of the block] -> out [token][count], rows `stride` apart
template <typename T>
inline void store_transposed(const float* c, int64_t count, int64_t tokens, T* out, int64_t stride) {
  int64_t r = 0;
  if constexpr (sizeof(T) == 2) {
    // two columns of the result at a time
    uint32_t pairs[kResultRows / 2 * kColumns];
    for (; r + 2 <= count; r += 2) {
      for (int64_t t = 0; t < kColumns; ++t) {
        pairs[r / 2 * kColumns + t] = from_float<T>(c[r * kColumns + t]).bits |
                                      static_cast<uint32_t>(from_float<T>(c[(r + 1) * kColumns + t]).bits) << 16;
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      char* to = reinterpret_cast<char*>(out + t * stride);
      for (int64_t i = 0; i < r / 2; ++i) std::memcpy(to + 4 * i, pairs + i * kColumns + t, 4);
    }
  }
  for (; r < count; ++r) {
    for (int64_t t = 0; t < tokens; ++t) out[t * stride + r] = from_float<T>(c[r * kColumns + t]);
  }
}

template <typename T>
void expand_heads(const MlaExpandKvCall& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const int64_t depth = words(call.rank, Operand<T>::per_word);
  const int64_t blocks = (call.tokens + kColumns - 1) / kColumns;
  const int64_t key_width = call.nope + call.rope;
  Scratch scratch(4 * (depth + kColumns) * kResultRows + kColumns * (key_width + call.v_dim) * sizeof(T) + 512);
  W* rows = scratch.take<W>(depth * kResultRows);
  float* c = scratch.take<float>(kResultRows * kColumns);
  // rows of the result are finished here, and written as a whole
  T* finished = scratch.take<T>(kColumns * (key_width > call.v_dim ? key_width : call.v_dim));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, first = task % blocks * kColumns;
    const int64_t tokens = call.tokens - first < kColumns ? call.tokens - first : kColumns;
    const W* columns = static_cast<const W*>(call.packed) + task % blocks * depth * kColumns;
    const T* weight = static_cast<const T*>(call.weight) + head * (call.nope + call.v_dim) * call.weight_stride;
    for (int side = 0; side < 2; ++side) {
      const int64_t width = side == 0 ? call.nope : call.v_dim, row = side == 0 ? key_width : call.v_dim;
      for (int64_t r0 = 0; r0 < width; r0 += kResultRows) {
        const int64_t count = width - r0 < kResultRows ? width - r0 : kResultRows;
        const T* first_row = weight + ((side == 0 ? 0 : call.nope) + r0) * call.weight_stride;
        int64_t step;
        const W* at = word_rows(first_row, call.weight_stride, call.rank, count, rows, &step);
        multiply(columns, at, step, 1, depth, count, c);
        store_transposed(c, count, tokens, finished + r0, row);
      }
      T* out = static_cast<T*>(side == 0 ? call.k : call.v) + (first * call.heads + head) * row;
      const T* shared = static_cast<const T*>(call.latent) + first * call.latent_stride + call.rank;
      for (int64_t t = 0; t < tokens; ++t) {
        T* from = finished + t * row;
        if (side == 0) {
          std::memcpy(static_cast<void*>(from + call.nope), static_cast<const void*>(shared + t * call.latent_stride),
                      call.rope * sizeof(T));
        }
        if (call.stream) {
          stream_copy(out + t * call.heads * row, from, row * static_cast<int64_t>(sizeof(T)));
        } else {
          std::memcpy(static_cast<void*>(out + t * call.heads * row), static_cast<const void*>(from), row * sizeof(T));
        }
      }
    }
  }
  if (call.stream) stream_done();
}

// one panel of columns of a block of tokens' gradient, summed over the heads in order, and a share of the part that all
// heads read
template <typename T>
void expand_latent_gradient(const MlaExpandKvBwdCall& call, int64_t begin, int64_t end) {
  using W = typename Operand<T>::type;
  const int64_t panels = (call.rank + kColumns - 1) / kColumns, width = call.rank + call.rope;
  const int64_t widest = words(call.nope > call.v_dim ? call.nope : call.v_dim, Operand<T>::per_word);
  Scratch scratch(4 * (widest * (kColumns + kResultRows) + kColumns * call.block_tokens + call.rope) + 512);
  W* columns = scratch.take<W>(widest * kColumns);
  W* rows = scratch.take<W>(widest * kResultRows);
  float* c = scratch.take<float>(kColumns * call.block_tokens);
  float* shared = scratch.take<float>(call.rope);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task / panels * call.block_tokens, panel = task % panels;
    const int64_t tokens = call.tokens - first < call.block_tokens ? call.tokens - first : call.block_tokens;
    T* out = static_cast<T*>(call.dlatent) + first * width;
    for (int64_t t = panel * tokens / panels; t < (panel + 1) * tokens / panels && call.rope > 0; ++t) {
      const T* dk = static_cast<const T*>(call.dk) + (first + t) * call.k_token + call.nope;
      std::memset(shared, 0, call.rope * sizeof(float));
      for (int64_t h = 0; h < call.heads; ++h, dk += call.k_head) {
        for (int64_t i = 0; i < call.rope; ++i) shared[i] += to_float(dk[i]);
      }
      for (int64_t i = 0; i < call.rope; ++i) out[t * width + call.rank + i] = from_float<T>(shared[i]);
    }
    const int64_t r0 = panel * kColumns, n = call.rank - r0 < kColumns ? call.rank - r0 : kColumns;
    const T* weight = static_cast<const T*>(call.weight) + r0;
    bool add = false;
    for (int64_t h = 0; h < call.heads; ++h) {
      for (int side = 0; side < 2; ++side) {
        const int64_t depth = side == 0 ? call.nope : call.v_dim;
        const int64_t stride = side == 0 ? call.k_token : call.v_token;
        const T* dkv = side == 0 ? static_cast<const T*>(call.dk) + h * call.k_head
                                 : static_cast<const T*>(call.dv) + h * call.v_head;
        dkv += first * stride;
        if (depth == 0) continue;
        pack_panel(weight, call.weight_stride, depth, n, columns);
        weight += depth * call.weight_stride;
        for (int64_t t = 0; t < tokens; t += kResultRows) {
          const int64_t count = tokens - t < kResultRows ? tokens - t : kResultRows;
          int64_t step;
          const W* at = word_rows(dkv + t * stride, stride, depth, count, rows, &step);
          multiply(columns, at, step, 1, words(depth, Operand<T>::per_word), count, c + t * kColumns, add);
        }
        add = true;
      }
    }
    if (!add) std::memset(c, 0, tokens * kColumns * sizeof(float));
    store_panel(c, tokens, n, out + r0, width);
  }
}

// rows of the weight's gradient that belong to one head's keys or values, in kPanels panels of columns
template <typename T>
void expand_weight_gradient(const MlaExpandKvBwdCall& call, int64_t begin, int64_t end) {
  const int64_t widest = call.nope > call.v_dim ? call.nope : call.v_dim;
  constexpr int64_t wide = kPanels * kColumns;
  const int64_t groups = (call.rank + wide - 1) / wide;
  Scratch scratch(TokenSums<T>::bytes(widest));
  TokenSums<T> sums(scratch, widest);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / (2 * groups), r0 = task / 2 % groups * wide, side = task % 2;
    const int64_t n = call.rank - r0 < wide ? call.rank - r0 : wide;
    TokenRows<T> x{static_cast<const T*>(call.dk) + head * call.k_head, call.k_token, call.nope};
    if (side == 1) x = {static_cast<const T*>(call.dv) + head * call.v_head, call.v_token, call.v_dim};
    const TokenRows<T> y{static_cast<const T*>(call.latent) + r0, call.latent_stride, n};
    const int64_t row = head * (call.nope + call.v_dim) + (side == 0 ? 0 : call.nope);
    sums.run(x, y, call.tokens, static_cast<T*>(call.dweight) + row * call.rank + r0, call.rank);
  }
}

}  // namespace

void mla_expand_pack(const MlaExpandKvCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { pack_tokens<T>(call, begin, end); })
}

void mla_expand_heads(const MlaExpandKvCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { expand_heads<T>(call, begin, end); })
}

void mla_expand_latent_gradient(const MlaExpandKvBwdCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { expand_latent_gradient<T>(call, begin, end); })
}

void mla_expand_weight_gradient(const MlaExpandKvBwdCall& call, int64_t begin, int64_t end) {
  TILEFUSE_BY_DTYPE(call.dtype, T, { expand_weight_gradient<T>(call, begin, end); })
}

}  // namespace TILEFUSE_ISA

#ifdef TILEFUSE_REGISTER

TILEFUSE_DISPATCH(mla_expand_pack)
TILEFUSE_DISPATCH(mla_expand_heads)
TILEFUSE_DISPATCH(mla_expand_latent_gradient)
TILEFUSE_DISPATCH(mla_expand_weight_gradient)

namespace {

void set_inputs(MlaExpandKvInputs& call, const Tensor& latent, const Tensor& w_ukv, int64_t kv_lora_rank,
                int64_t nope_dim, int64_t v_dim) {
  call.latent = latent.const_data_ptr();
  call.weight = w_ukv.const_data_ptr();
  call.latent_stride = stride_or_zero(latent, 0);
  call.weight_stride = stride_or_zero(w_ukv, 0);
  call.dtype = dtype_of(latent);
  call.tokens = latent.size(0);
  call.heads = w_ukv.size(0) / (nope_dim + v_dim);
  call.rank = kv_lora_rank;
  call.nope = nope_dim;
  call.v_dim = v_dim;
  call.rope = latent.size(1) - kv_lora_rank;
}

std::tuple<Tensor, Tensor> mla_expand_kv_fwd(Tensor latent, Tensor w_ukv, int64_t kv_lora_rank, int64_t nope_dim,
                                             int64_t v_dim) {
  MlaExpandKvCall call{};
  set_inputs(call, latent, w_ukv, kv_lora_rank, nope_dim, v_dim);
  Tensor k = empty_of(latent, {call.tokens, call.heads, nope_dim + call.rope});
  Tensor v = empty_of(latent, {call.tokens, call.heads, v_dim});
  if (call.tokens == 0 || call.heads == 0) return {k, v};
  call.k = k.mutable_data_ptr();
  call.v = v.mutable_data_ptr();
  const int64_t itemsize = static_cast<int64_t>(latent.element_size());
  const bool lines = k.size(2) * itemsize % 64 == 0 && v_dim * itemsize % 64 == 0;
  call.stream = lines && (k.numel() + v.numel()) * itemsize >= kStreamBytes;
  const int64_t blocks = (call.tokens + baseline::kColumns - 1) / baseline::kColumns;
  std::vector<float> packed(blocks * call.rank * baseline::kColumns);
  call.packed = packed.data();
  run_parallel(mla_expand_pack, blocks, 1, call);
  run_parallel(mla_expand_heads, call.heads * blocks, 1, call);
  return {k, v};
}

std::tuple<Tensor, Tensor> mla_expand_kv_bwd(Tensor dk, Tensor dv, Tensor latent, Tensor w_ukv, int64_t kv_lora_rank,
                                             int64_t nope_dim, int64_t v_dim) {
  MlaExpandKvBwdCall call{};
  set_inputs(call, latent, w_ukv, kv_lora_rank, nope_dim, v_dim);
  call.dk = dk.const_data_ptr();
  call.dv = dv.const_data_ptr();
  call.k_token = stride_or_zero(dk, 0);
  call.k_head = stride_or_zero(dk, 1);
  call.v_token = stride_or_zero(dv, 0);
  call.v_head = stride_or_zero(dv, 1);
  Tensor dlatent = empty_contiguous(latent), dweight = empty_contiguous(w_ukv);
  call.dlatent = dlatent.mutable_data_ptr();
  call.dweight = dweight.mutable_data_ptr();
  constexpr int64_t kColumns = baseline::kColumns, kGroup = baseline::kPanels * kColumns;
  const int64_t blocks = (call.tokens + kMostTokens - 1) / kMostTokens, panels = (call.rank + kColumns - 1) / kColumns;
  // blocks alike, of whole blocks of the product
  call.block_tokens = blocks == 0 ? 0 : ((call.tokens + blocks - 1) / blocks + 5) / 6 * 6;
  const int64_t groups = (call.rank + kGroup - 1) / kGroup;
  run_parallel(mla_expand_latent_gradient, blocks * panels, 1, call);
  run_parallel(mla_expand_weight_gradient, call.heads * groups * 2, 1, call);
  return {dlatent, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tilefuse_cpu, CPU, m) {
  m.impl("mla_expand_kv_fwd", TORCH_BOX(&mla_expand_kv_fwd));
  m.impl("mla_expand_kv_bwd", TORCH_BOX(&mla_expand_kv_bwd));
}

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
