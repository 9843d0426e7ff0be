// The block-sparse linear layer in float64: the formulas, untuned, for gradcheck and for whoever needs them.
#include "core/integers.h"
#include "core/threads.h"
#include "prune/activation.h"
#include "prune/block_sparse_linear.h"

namespace tilewright::TW_ISA {
namespace {

using prune::BlockPattern;
using prune::BlockSparseCall;
using prune::BlockSparseLinearParams;
using prune::Matrix;

double& at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<double*>(m.data)[row * m.row + column * m.column];
}

double& value(const BlockSparseLinearParams& p, int64_t block, int64_t row, int64_t column) {
  const BlockPattern& w = p.pattern;
  return static_cast<double*>(p.values)[(block * w.block_rows + row) * w.block_columns + column];
}

// Row of y, column of x: sums over the blocks of a block row.
void forward_row(const BlockSparseLinearParams& p, int64_t row) {
  const BlockPattern& w = p.pattern;
  const int64_t o = row * w.block_rows, outs = smaller(p.out - o, w.block_rows);
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t j = 0; j < outs; ++j) {
      double sum = p.bias == nullptr ? 0 : static_cast<const double*>(p.bias)[o + j];
      for (int64_t b = w.first[row]; b < w.first[row + 1]; ++b) {
        const int64_t i = int64_t{w.column[b]} * w.block_columns;
        for (int64_t k = 0; k < smaller(p.in - i, w.block_columns); ++k)
          sum += at(p.x, t, i + k) * value(p, b, j, k);
      }
      if (p.z.data != nullptr) at(p.z, t, o + j) = sum;
      at(p.y, t, o + j) = activate(p.activation, sum);
    }
  }
}

void input_column(const BlockSparseLinearParams& p, int64_t column) {
  const BlockPattern& w = p.pattern;
  const int64_t i = column * w.block_columns, ins = smaller(p.in - i, w.block_columns);
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t k = 0; k < ins; ++k) {
      double sum = 0;
      for (int64_t b = w.t_first[column]; b < w.t_first[column + 1]; ++b) {
        const int64_t o = int64_t{w.t_row[b]} * w.block_rows;
        for (int64_t j = 0; j < smaller(p.out - o, w.block_rows); ++j)
          sum += at(p.y, t, o + j) * value(p, w.t_block[b], j, k);
      }
      at(p.dx, t, i + k) = sum;
    }
  }
}

void weight_block(const BlockSparseLinearParams& p, int64_t block) {
  const BlockPattern& w = p.pattern;
  const int64_t o = int64_t{w.row[block]} * w.block_rows, i = int64_t{w.column[block]} * w.block_columns;
  for (int64_t j = 0; j < w.block_rows; ++j) {
    for (int64_t k = 0; k < w.block_columns; ++k) {
      double sum = 0;
      if (o + j < p.out && i + k < p.in) {
        for (int64_t t = 0; t < p.tokens; ++t) sum += at(p.y, t, o + j) * at(p.x, t, i + k);
      }
      value(p, block, j, k) = sum;
    }
  }
}

}  // namespace

void block_sparse_linear_float64_cpu(const BlockSparseLinearParams& p, BlockSparseCall call, int threads) {
  const BlockPattern& w = p.pattern;
  switch (call) {
    case BlockSparseCall::kForward:
      return parallel_chunks(w.rows, threads, [&](int64_t row) { forward_row(p, row); });
    case BlockSparseCall::kInput:
      return parallel_chunks(w.columns, threads, [&](int64_t column) { input_column(p, column); });
    case BlockSparseCall::kWeight:
      return parallel_chunks(w.blocks, threads, [&](int64_t block) { weight_block(p, block); });
  }
}

}  // namespace tilewright::TW_ISA
