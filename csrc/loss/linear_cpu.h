// Linear heads over a vocabulary, and statistics of logits, on the CPU: what the ops of this family share. Rows of
// tokens that are ignored are never read: `kept` lists the others, and everything here counts those.
#pragma once

#include "common/cpu.h"

#ifdef TILEFUSE_REGISTER
#include <functional>
#endif

namespace tilefuse {

// one float per id of the vocabulary; without data: none
struct VocabularyValues {
  const void* data;
  Dtype dtype;
};

struct LinearHead {
  Dtype dtype;
  const void *x, *weight;
  int64_t x_stride, weight_stride, hidden, vocabulary;
  const int64_t* kept;
  int64_t count;
  Index target;
  int64_t vocab_start;
  VocabularyValues bias, class_weight;
  float scale, softcap, cooling;  // cooling: 1 / temperature
};

constexpr int64_t kStatsBlock = 4096;  // ids of one set of statistics
constexpr int64_t kStatsColumns = 5, kSmoothedColumns = 7;
constexpr int64_t kPanelIds = 64;
constexpr int64_t kPartTokens = 512;  // tokens that share the packing of a panel
// of the backward: ids of a block at most, and bytes of a block's gradients
constexpr int64_t kBlockIds = 1024, kBlockBytes = 32 << 20;

// tokens in pairs: an odd one has a row of zeros for its partner
static inline int64_t even_count(const LinearHead& head) { return head.count + head.count % 2; }

// ids [T, k] that are not for the statistics, each token's in ascending order with -1 ahead of them; k = 0: none
struct ListedIds {
  Index ids;
  int64_t count;
};

namespace TILEFUSE_ISA {

// the place of a token's first listed id that is `id` or above
static inline int64_t first_listed(const ListedIds& listed, int64_t token, int64_t id) {
  int64_t low = 0, high = listed.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (listed.ids[token * listed.count + middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace TILEFUSE_ISA

// statistics of parts of the tokens times blocks of the vocabulary
struct LinearStats {
  LinearHead head;
  int64_t blocks, columns;
  float* stats;   // [T, blocks, columns]
  float* logits;  // [panels][even_count][64], or nullptr: forgotten
  ListedIds listed;
  float* listed_logits;  // [T, k]
};

// of T tokens, as the op returns them
struct LinearResult {
  float *logp, *lse, *entropy;
  int32_t* argmax;
  float *smoothed, *norm;
  int64_t tokens;
};

// gradients of the logits of ids [first, first + ids), as operands of the two products
struct LinearGradient {
  LinearHead head;
  const float *norm, *entropy, *coefficients;  // [2, T], [T], [4, T]
  int64_t tokens;
  float* logits;         // as LinearStats has them, overwritten; or nullptr: made again
  int64_t logits_first;  // the id that they begin with
  bool made;             // they are gradients already
  int64_t first, ids, width;
  void* by_token;    // [count][width words]
  void* by_id;       // [ids / 64][words of count][64]
  const void* x;     // [H / 64][words of count][64], x as columns
  const void* rows;  // [count][words of H], x as rows
  float* dx;         // [H / 64][count][64], the sums over the ids so far
  float* dbias;      // [V] or nullptr
  void* dweight;     // [V, H]
  float factor;
  ListedIds listed;
  const float* listed_gradients;  // [T, k + 1], those of the listed ids' logits
};

#ifdef TILEFUSE_REGISTER

// a head without its kept tokens
LinearHead linear_head(const Tensor& x, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                       const OptionalTensor& class_weight, int64_t vocab_start, double scale, double softcap,
                       double temperature);

// tokens whose target is not `ignore_index`
std::vector<int64_t> kept_tokens(const Tensor& target, int64_t ignore_index);

// raises in an op's name on a target of a kept token that is not in the vocabulary
void check_targets(const char* op, const Tensor& target, const std::vector<int64_t>& kept, int64_t vocabulary,
                   int64_t ignore_index);

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// [T, blocks, columns], every token marked as ignored
Tensor ignored_stats(const Tensor& target, int64_t blocks, bool smooth);

// [T, blocks, columns]; the others as in LinearStats
Tensor make_stats(const LinearHead& head, const Tensor& target, bool smooth, float* logits,
                  const ListedIds& listed = {}, float* listed_logits = nullptr);

Result merge_stats(const Tensor& stats);

// puts gradients of the logits of ids [first, first + ids) where make_logits puts those
using MakeGradients = std::function<void(int64_t first, int64_t ids, float* gradients)>;

// room for gradients of x, weight and bias; those that are not wanted are of one dim and empty
std::tuple<Tensor, Tensor, Tensor> head_gradients(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                  bool need_x, bool need_weight, bool need_bias);

// Fills what head_gradients made. The call's own memory is filled in. Without `make` the gradients of the logits are
// those of linear_logprobs.
void linear_backward(LinearGradient call, Tensor& dx, Tensor& dweight, Tensor& dbias,
                     const MakeGradients& make = nullptr);

// the kept tokens of a head, as make_logits reads them
std::unique_ptr<float[]> packed_rows(const LinearHead& head);

// logits before the temperature, of the kept tokens and ids [first, first + ids): [panels of 64 ids][even_count][64],
// -inf past the ids
void make_logits(const LinearHead& head, const float* rows, int64_t first, int64_t ids, float* logits);

#endif  // TILEFUSE_REGISTER

}  // namespace tilefuse
