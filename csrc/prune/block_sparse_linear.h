// A linear layer whose weight (out, in) consists of blocks, most of which are absent (BSR), and its gradient:
//
//   z = x W^T + bias,  y = activation(z);   dx = dz W,   dW = dz^T x at the blocks that are there.
//
// Blocks at the lower and right edge of a weight whose sizes are no multiples of the block's stick out; what
// sticks out is zero in `values` and in their gradient.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "prune/linear.h"

namespace tilewright::prune {

// Where the blocks are: numbered along block rows, and once more along block columns for dx. Made and checked
// in Python (prune/block_pattern.py), all of it in one int32 tensor, in this order.
struct BlockPattern {
  const int32_t* first;    // [rows + 1]: blocks first[r] .. first[r + 1] - 1 lie in block row r
  const int32_t* column;   // [blocks]: ascending in a row
  const int32_t* row;      // [blocks]
  const int32_t* order;    // [rows]: the rows, fullest first
  const int32_t* t_first;  // [columns + 1]: the same of the transposed pattern,
  const int32_t* t_row;    // [blocks]: rows ascending in a column,
  const int32_t* t_block;  // [blocks]: and the number of the block there
  const int32_t* t_order;  // [columns]: the columns, fullest first
  int64_t rows, columns, blocks;
  int32_t block_rows, block_columns;  // 8, 16, 32, 64 or 128 each
};

constexpr int64_t pattern_size(int64_t rows, int64_t columns, int64_t blocks) {
  return 2 * (rows + columns) + 2 + 4 * blocks;
}

struct BlockSparseLinearParams {
  BlockPattern pattern;
  void* values;      // [blocks][block_rows][block_columns] of dtype; written by dw
  const void* bias;  // [out] of dtype; null: none
  Matrix x;          // (tokens, in) of dtype; read by fwd and dw
  Matrix y;          // (tokens, out), written by fwd; dx and dw read dz here
  Matrix z;          // (tokens, out), written by fwd: before the activation; may be absent
  Matrix dx;         // (tokens, in), written by dx
  int64_t tokens, out, in;
  Activation activation;
  DType dtype;      // float32, float16, bfloat16; float64 on the CPU
  void* workspace;  // block_sparse_linear_workspace_cpu bytes, 64-byte aligned; none on a GPU
};

enum class BlockSparseCall : int32_t { kForward, kInput, kWeight };  // y; dx; dW

void block_sparse_linear_cuda(const BlockSparseLinearParams&, BlockSparseCall, int device, Stream);

}  // namespace tilewright::prune

namespace tilewright {
TW_DECLARE_CPU(int64_t, block_sparse_linear_workspace_cpu,
               (const prune::BlockSparseLinearParams&, prune::BlockSparseCall, int threads))
TW_DECLARE_CPU(void, block_sparse_linear_cpu,
               (const prune::BlockSparseLinearParams&, prune::BlockSparseCall, int threads))
}  // namespace tilewright
