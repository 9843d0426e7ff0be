// A dense float32 product on the CPU, C = A B + bias, for the projections of a Mamba block: beside a scan
// they are most of its work, and what torch has for them is fast on some processors only.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace tilewright::scan {

// Strides count elements, and may be any.
struct MatmulParams {
  const float *a, *b;
  const float* bias;  // (n), or null
  float* c;
  int64_t m, n, k;
  int64_t a_row, a_k, b_k, b_column;
  int64_t c_row;    // columns of C lie side by side
  void* workspace;  // matmul_workspace_cpu bytes
};

// The product by whichever kernel is for its size, with a workspace of its own.
void matmul(const MatmulParams&, int threads);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(int64_t, matmul_workspace_cpu, (const scan::MatmulParams&, int threads))
TW_DECLARE_CPU(void, matmul_cpu, (const scan::MatmulParams&, int threads))
}  // namespace tilewright
