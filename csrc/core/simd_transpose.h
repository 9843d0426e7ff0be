// Transposition of matrices of floats, by squares of kLanes, and sums of their rows.
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

#if defined(__AVX512F__)
static inline Float pair_sums(Float a, Float b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif defined(__AVX2__)
static inline Float pair_sums(Float a, Float b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#else
static inline Float pair_sums(Float a, Float b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
#endif

// The sums of kLanes rows of kWords floats, which lie one behind the other in kWords vectors.
template <int kWords>
static inline Float row_sums(const float* from, int64_t stride) {
  Float x[kWords];
#pragma GCC unroll 16
  for (int i = 0; i < kWords; ++i) x[i] = load(from + i * stride);
#pragma GCC unroll 4
  for (int left = kWords / 2; left > 0; left /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) x[i] = pair_sums(x[2 * i], x[2 * i + 1]);
  }
  return x[0];
}

// The same for kLanes, half or a quarter as many words.
static inline Float row_sums(const float* from, int64_t stride, int words) {
  if (words == kLanes) return row_sums<kLanes>(from, stride);
  return words == kLanes / 2 ? row_sums<kLanes / 2>(from, stride) : row_sums<kLanes / 4>(from, stride);
}

}  // namespace tilewright::TW_ISA
