// Copies past the caches, for CPU kernels that write much more than the caches hold: a cached write would read every
// line first and throw out what the next kernel wants.
#pragma once

#include "common/cpu.h"
#include "common/immintrin.h"

namespace tilefuse {

// bytes of output from which streaming pays
constexpr int64_t kStreamBytes = 2 << 20;

namespace TILEFUSE_ISA {

// Lines that `to` covers only in part are written the ordinary way. Call `stream_done` before others may read.
static inline void stream_copy(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
  uint8_t* out = static_cast<uint8_t*>(to);
  const uint8_t* in = static_cast<const uint8_t*>(from);
  const int64_t misplaced = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & 63);
  const int64_t head = misplaced < bytes ? misplaced : bytes;
  if (head > 0) std::memcpy(out, in, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#else
    for (int64_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j)));
    }
#endif
  }
  if (i < bytes) std::memcpy(out + i, in + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

static inline void stream_done() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace TILEFUSE_ISA
}  // namespace tilefuse
