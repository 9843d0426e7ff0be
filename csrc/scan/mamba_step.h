// One token of every sequence through a whole Mamba layer (decoding), its two states moved on in place:
//
//   x, z = W_in h                      dt, B, C = W_x u, each of the three through an RMS norm if asked
//   u = silu(conv(x))                  y = scan step (u, W_dt dt, -exp(A_log), B, C, D, z, dt_bias)
//                                      out = W_out y
//
// The convolution and the scan step are the kernels of causal_conv1d_update and selective_state_update; the
// products with few tokens are this op's own. What lies between them is rounded to the layer's dtype, as if
// the steps were called one by one.
//
// Roofline: the weights are read once, (2 M + M + rank + 2 N + rank) dim numbers for model width M, two FLOPs
// a token each: bound by memory as long as tokens are few.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "scan/causal_conv1d_update.h"
#include "scan/selective_state_update.h"

namespace tilewright::scan {

// out[t][r] = bias[r] + sum_k x[t][k] weight[r][k] for a few tokens t, all of one dtype; sums are float32, or
// float64 where the dtype is.
struct TokenLinearParams {
  const void *x, *weight, *bias;  // (tokens, columns), inner stride 1; (rows, columns); (rows), or null
  void* out;                      // (tokens, rows), inner stride 1
  int64_t x_row, weight_row, weight_column, bias_row, out_row;  // strides in elements
  int64_t tokens, rows, columns;
  DType dtype;
};

// Each token's segments [0, sizes[0]), ... of x, divided by the root of their mean square + eps and
// multiplied by their weights, in place.
struct SegmentNormParams {
  void* x;  // (tokens, row), inner stride 1
  struct Segment {
    const void* weight;  // null: ones
    int64_t stride, size;
    DType dtype;
  } segments[3];
  int64_t x_row, tokens;
  double eps;
  DType dtype;
};

struct MambaStepParams {
  TokenLinearParams in, dt_B_C, dt, out;
  SegmentNormParams norms;
  CausalConv1dUpdateParams conv;
  SelectiveStateUpdateParams scan;
  bool has_norms;
};

// Elements of the layer's dtype that a token needs between the parts: x and z, u, (dt, B, C), W_dt dt, y.
constexpr int64_t mamba_step_workspace(int64_t dim, int64_t rank, int64_t states) {
  return 5 * dim + rank + 2 * states;
}

void token_linear_cuda(const TokenLinearParams&, int device, Stream);
void segment_norm_cuda(const SegmentNormParams&, int device, Stream);

void mamba_step_cpu(const MambaStepParams&, int threads);
void mamba_step_cuda(const MambaStepParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(void, token_linear_cpu, (const scan::TokenLinearParams&, int threads))
TW_DECLARE_CPU(void, segment_norm_cpu, (const scan::SegmentNormParams&, int threads))
}  // namespace tilewright
