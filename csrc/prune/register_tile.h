// The register tile of the sparse layers' matrix products: kRows rows of sums times two vectors, or so many
// rows more times one.
#pragma once

#include "core/simd.h"

namespace tilewright::TW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // 16 of 32 registers accumulate
#else
constexpr int kRows = 4;
#endif

struct Operands {
  const float* a;
  int64_t row_step, depth_step;
  const float* b;
  int64_t b_stride;
  int depth;
  const float *later_a, *later_b;  // what comes some blocks on, to be fetched meanwhile
};

template <int kVectors, int kTileRows = kRows>
struct Tile {
  Float sums[kTileRows][kVectors];

  template <class Body>
  __attribute__((always_inline)) void each(const Body& body) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) body(sums[r][v], r, v * kLanes);
    }
  }

  template <class Units>
  __attribute__((always_inline)) void add_product(const Operands& o) {
    const float *a = o.a, *b = o.b, *later_a = o.later_a, *later_b = o.later_b;
    // The rows of a tile are neighbours in a block, one way or the other.
    const int64_t later_step = o.depth_step == 1 ? kTileRows : o.depth_step;
    const int64_t row_step = o.row_step, depth_step = o.depth_step, b_stride = o.b_stride;
    for (int k = o.depth; k > 0; --k, a += depth_step, b += b_stride) {
      Float columns[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        columns[v] = load(b + v * kLanes);
        __builtin_prefetch(later_b + v * kLanes);
      }
      __builtin_prefetch(later_a);
      later_a += later_step;
      later_b += b_stride;
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const Float factor = splat(a[r * row_step]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Units::step(factor, columns[v], sums[r][v]);
      }
    }
  }
};

}  // namespace
}  // namespace tilewright::TW_ISA
