// Statistics of rows of logits on the CPU.
// build-flags: -ffp-contract=fast
#include "loss/statistics_cpu.h"

namespace tilefuse {
namespace TILEFUSE_ISA {

void add_panel(const float* z, int64_t ids, int64_t first, const float* c, float classes, RunningStats& s) {
  vec x[kVectorsOfPanel], top = splat(-kInfinity);
  for (int64_t v = 0; v < kVectorsOfPanel; ++v) {
    x[v] = load(z + v * kWidth);
    // NaN counts as nothing
    top = max(x[v], top);
  }
  const float largest = largest_of(top);
  if (largest > s.peak || s.argmax < 0.0f) {
    if (largest > s.peak) {
      if (s.peak > -kInfinity) {
        const float down = s.peak - largest, shrunk = std::exp(down);
        s.weighted = (s.weighted + s.total * down) * shrunk;
        s.total *= shrunk;
        // of which lane is no matter
        s.costs[0] += s.classes * down;
      } else {
        // what was there was -inf: distances were from 0
        s.costs[0] -= s.classes * largest;
      }
      s.peak = largest;
    }
    int64_t at = 0;
    while (at < ids - 1 && z[at] != largest) ++at;
    s.argmax = static_cast<float>(first + at);
  }
  const float base = s.peak > -kInfinity ? s.peak : 0.0f;
  for (int64_t v = 0; v < kVectorsOfPanel; ++v) {
    const vec d = x[v] - base;
    const vec e = exp(d);
    s.total += e;
    // -inf times 0
    s.weighted += e * (d < kNothing ? splat(kNothing) : d);
    if (c != nullptr) {
      const vec w = load(c + v * kWidth);
      s.costs += w == 0.0f ? vec{} : w * d;
    }
  }
  s.classes += classes;
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
