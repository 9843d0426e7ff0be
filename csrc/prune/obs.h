// Removing weights while the others of their row make up for it: the optimal brain surgeon's step as
// SparseGPT takes it (Frantar and Alistarh, 2023), on a panel of neighbouring columns.
//
// U is the panel's part of the upper Cholesky factor of the inverse of the inputs' second moments. In each
// row w of the panel, from left to right,
//
//   e[i] = 0 if i is kept, w[i] / U[i][i] if not;   w[j] -= e[i] U[i][j] for j > i;   w[i] = 0 if not kept.
//
// The columns right of the panel take in the errors e by a matrix product, elsewhere. With m > 0 the mask is
// chosen here: at the first of each m columns, the n with the largest (w[i] / U[i][i])^2, of equals the
// first.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::prune {

constexpr int kWidestPanel = 512, kLargestObsGroup = 32;

// Rows of all matrices are contiguous, `_row` apart.
struct ObsParams {
  void* weight;        // (rows, columns) of dtype, changed
  const void* factor;  // (columns, columns) of dtype; its diagonal is above 0
  uint8_t* mask;       // (rows, columns): read, or written if m > 0
  void* errors;        // (rows, columns) of dtype, written
  int64_t weight_row, factor_row, mask_row, errors_row;
  int64_t rows;
  int32_t columns;  // at most kWidestPanel, a multiple of m
  int32_t n, m;
  DType dtype;  // float32; float64 on the CPU
};

void obs_panel_cuda(const ObsParams&, int device, Stream);

}  // namespace tilewright::prune

namespace tilewright {
TW_DECLARE_CPU(void, obs_panel_cpu, (const prune::ObsParams&, int threads))
}  // namespace tilewright
