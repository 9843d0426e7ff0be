// Transposition of matrices of floats, by squares of kLanes.
#pragma once

#include "core/simd.h"

namespace tilewright::TW_ISA {

#if defined(__AVX512F__)
static inline Float interleave_low(Float a, Float b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline Float interleave_high(Float a, Float b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
static inline Float interleave_low(Float a, Float b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
static inline Float interleave_high(Float a, Float b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
static inline Float interleave_low(Float a, Float b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline Float interleave_high(Float a, Float b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// A square of kLanes: every pass halves the distance of what has to become neighbours.
__attribute__((always_inline)) static inline void transpose_square(float* to, int64_t to_stride,
                                                                   const float* from, int64_t from_stride) {
  Float x[kLanes], y[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, x[i]);
}

// to[j][i] = from[i][j]; both sizes are rounded up to kLanes.
static inline void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                             int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes)
      transpose_square(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
  }
}

}  // namespace tilewright::TW_ISA
