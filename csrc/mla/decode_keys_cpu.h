// A call of latent decode on the CPU, and where its keys are.
#pragma once

#include "common/cpu.h"

namespace tilefuse {

struct MlaDecodeCall {
  const void* q;
  int64_t q_batch, q_query, q_head;
  Dtype dtype;
  // strides in bytes
  const uint8_t* cache;
  int64_t page_stride, row_stride, page_size, pages;
  int64_t rank, rope;
  bool fp8, sparse, causal;
  // page numbers, or slots for sparse decode
  Index table;
  int64_t table_batch, table_query, columns;
  Index lengths;
  const float* sinks;
  int64_t batch, queries, heads, splits;
  // keys before its own that a query sees, -1: all
  int64_t left;
  float scale;
  // [b, row, split, R] and [b, row, split]; b counts (sequence, query) pairs for sparse decode
  float* partial;
  float* partial_lse;
  void* out;
  float* lse;
};

// query rows of a tile and keys of a block
constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockKeys = 64;
constexpr int64_t kLanes = 16;

static inline int64_t rows_of(const MlaDecodeCall& call) {
  return call.sparse ? call.heads : call.queries * call.heads;
}
static inline int64_t tiles_of(const MlaDecodeCall& call) { return (rows_of(call) + kTileRows - 1) / kTileRows; }
static inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
// bytes of scratch that one item needs
static inline int64_t scratch_bytes(const MlaDecodeCall& call) {
  const int64_t width = padded(call.rank + call.rope), rank = padded(call.rank);
  return 4 * (kTileRows * width + kBlockKeys * width + kTileRows * rank + 2 * kTileRows * kBlockKeys) + 64;
}

namespace TILEFUSE_ISA {

// Keys of one sequence that any of its rows may see.
struct Span {
  int64_t first, length, size;
};

static inline Span span_of(const MlaDecodeCall& call, int64_t b) {
  Span span{0, call.columns, 0};
  if (!call.sparse) {
    const int64_t capacity = call.columns * call.page_size;
    const int64_t length = call.lengths[b];
    span.length = length < 0 ? 0 : length > capacity ? capacity : length;
    if (call.left >= 0) {
      const int64_t first = span.length - call.queries - call.left;
      span.first = first > 0 ? first : 0;
    }
  }
  const int64_t share = (span.length - span.first + call.splits - 1) / call.splits;
  span.size = (share + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
  if (span.size == 0) span.size = kBlockKeys;
  return span;
}

// The cache rows of a block of keys, and their numbers counted from its first.
struct Block {
  const uint8_t* rows[kBlockKeys];
  int32_t numbers[kBlockKeys];
  int64_t keys;
};

// table: where the sequence's entries begin
static inline void find_keys(const MlaDecodeCall& call, int64_t table, int64_t begin, int64_t end, Block& block) {
  block.keys = 0;
  for (int64_t key = begin; key < end; ++key) {
    const int64_t found = call.table[table + (call.sparse ? key : key / call.page_size)];
    const int64_t page = call.sparse ? found / call.page_size : found;
    const int64_t row = call.sparse ? found % call.page_size : key % call.page_size;
    // an entry outside of the pool is a key that does not exist
    if (found < 0 || page >= call.pages) continue;
    block.rows[block.keys] = call.cache + page * call.page_stride + row * call.row_stride;
    block.numbers[block.keys++] = static_cast<int32_t>(key - begin);
  }
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
