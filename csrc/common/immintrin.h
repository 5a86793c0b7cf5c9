// x86 intrinsics; nothing elsewhere.
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push
// gcc 12 warns about its own intrinsics' undefined operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
