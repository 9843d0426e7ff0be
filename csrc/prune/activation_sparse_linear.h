// A linear layer that reads the weights of those inputs only that a token keeps, for few tokens:
//
//   y_t = bias + sum over kept i of x_ti W_i,   W_i: row i of the weight's transpose (in, out).
//
// The choice of inputs and the product are two calls, for what needs the choice itself; a step is both.
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "prune/linear.h"

namespace tilewright::prune {

// Of each token, the `count` inputs with the largest |x| * scale, NaN above all numbers and among equal ones
// the first (WINA: scale is the norm of the input's weights); or, where a threshold is given, those that are
// not |x| <= threshold (TEAL). Products and comparisons in float32; in float64 for x of float64.
struct KeepInputsParams {
  Matrix x;               // (tokens, in)
  const void* scale;      // [in], float32 or float64; null: threshold decides
  const void* threshold;  // [1], of the same dtype; read if scale is null
  uint8_t* keep;          // [tokens][in], 0 or 1; overwritten
  int64_t tokens, in, count;
  DType dtype;      // of x: float32, float16, bfloat16; float64 on the CPU
  void* workspace;  // select_rows_workspace(in, threads) bytes; none on a GPU
};

constexpr int64_t kMaxActiveTokens = 8;  // of one call

struct ActivationSparseLinearParams {
  Matrix x;             // (tokens, in)
  const uint8_t* keep;  // [tokens][in], 0 or 1
  const void* weight;   // [in][out] of dtype: transposed, so that an input that is left out skips a whole row
  int64_t weight_row;   // elements from one row to the next
  const void* bias;     // [out] of dtype; null: none
  void* y;              // [tokens][out] of dtype; overwritten
  int64_t tokens, in, out;  // at most kMaxActiveTokens tokens
  DType dtype;              // float32, float16, bfloat16; float64 on the CPU
  void* workspace;          // activation_sparse_linear_workspace(_cuda) bytes, 64-byte aligned
};

// The kernels of a few tokens are those of 1, 2, 4 or 8, with tokens that are zero.
constexpr int64_t padded_tokens(int64_t tokens) {
  return tokens <= 2 ? tokens : tokens <= 4 ? 4 : kMaxActiveTokens;
}

// Rows whose products make one partial sum, for there to be enough work for all threads.
constexpr int64_t active_rows_per_sum(int64_t tokens) { return tokens <= 1 ? 256 : 512; }

// On a CPU: the numbers of the rows that are read, and the partial sums.
constexpr int64_t activation_sparse_linear_workspace(int64_t tokens, int64_t in, int64_t out, int64_t item) {
  const int64_t rows = divide_up(in * 4, 64) * 64, sums = divide_up(in, active_rows_per_sum(tokens));
  return rows + sums * padded_tokens(tokens) * out * (item == 8 ? 8 : 4);
}

// On a GPU: how many rows are read, their numbers, the tokens' values at them, and the partial sums. The
// number of partial sums depends on the device.
int64_t activation_sparse_linear_workspace_cuda(int64_t tokens, int64_t in, int64_t out, int device);

void keep_inputs_cuda(const KeepInputsParams&, int device, Stream);
void activation_sparse_linear_cuda(const ActivationSparseLinearParams&, int device, Stream);

}  // namespace tilewright::prune

namespace tilewright {
TW_DECLARE_CPU(void, keep_inputs_cpu, (const prune::KeepInputsParams&, int threads))
TW_DECLARE_CPU(void, activation_sparse_linear_cpu, (const prune::ActivationSparseLinearParams&, int threads))
}  // namespace tilewright
