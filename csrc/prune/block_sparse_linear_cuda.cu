// The block-sparse linear layer on a GPU: which kernel a call takes. The formulas are in
// block_sparse_linear.h.
#include "device/launch.h"
#include "prune/block_sparse_linear_cuda.h"

namespace tilewright::prune {
namespace {

using namespace blocks;

Product forward_product(const BlockSparseLinearParams& given) {
  const BlockPattern& pattern = given.pattern;
  Product p{};
  p.in = access_to(given.x, given.in, given.dtype);
  p.out = access_to(given.y, given.out, given.dtype);
  p.linear = access_to(given.z, given.out, given.dtype);
  p.bias = given.bias;
  p.first = pattern.first;
  p.part = pattern.column;
  p.order = pattern.order;
  p.lists = pattern.rows;
  p.depth_bits = log2_of(pattern.block_columns);
  p.width_bits = log2_of(pattern.block_rows);
  p.activation = given.activation;
  return p;
}

Product input_product(const BlockSparseLinearParams& given) {
  const BlockPattern& pattern = given.pattern;
  Product p{};
  p.in = access_to(given.y, given.out, given.dtype);
  p.out = access_to(given.dx, given.in, given.dtype);
  p.first = pattern.t_first;
  p.part = pattern.t_row;
  p.block = pattern.t_block;
  p.order = pattern.t_order;
  p.lists = pattern.columns;
  p.depth_bits = log2_of(pattern.block_rows);
  p.width_bits = log2_of(pattern.block_columns);
  return p;
}

void run_product(const BlockSparseLinearParams& given, bool transposed, int device, Stream stream) {
  Product p = transposed ? input_product(given) : forward_product(given);
  p.values = given.values;
  p.tokens = given.tokens;
  p.dtype = given.dtype;
  p.values_vectors = device::is_aligned(given.values, 16);
  if (p.tokens == 0 || p.lists == 0) return;
  if (!transposed && p.tokens <= kFewTokens) return block_sparse_product_few(p, stream);
  if (p.dtype == DType::kFloat32) return block_sparse_product_float32(p, transposed, stream);
  const int64_t blocks = given.pattern.blocks;
  if (block_sparse_product_sm90_fits(p, transposed, blocks, device))
    return block_sparse_product_sm90(p, transposed, blocks, device, stream);
  block_sparse_product_mma(p, transposed, device, stream);
}

void run_weight(const BlockSparseLinearParams& given, int device, Stream stream) {
  const BlockPattern& pattern = given.pattern;
  WeightProduct p{};
  p.dz = access_to(given.y, given.out, given.dtype);
  p.x = access_to(given.x, given.in, given.dtype);
  p.values = given.values;
  p.first = pattern.first;
  p.column = pattern.column;
  p.row = pattern.row;
  p.tokens = given.tokens;
  p.blocks = pattern.blocks;
  p.rows = pattern.rows;
  p.row_bits = log2_of(pattern.block_rows);
  p.column_bits = log2_of(pattern.block_columns);
  p.dtype = given.dtype;
  p.values_vectors = device::is_aligned(given.values, 16);
  if (p.blocks == 0) return;
  if (p.dtype == DType::kFloat32) return block_sparse_weight_float32(p, stream);
  if (block_sparse_weight_sm90_fits(p, device)) return block_sparse_weight_sm90(p, device, stream);
  block_sparse_weight_mma(p, device, stream);
}

}  // namespace

void block_sparse_linear_cuda(const BlockSparseLinearParams& given, BlockSparseCall call, int device,
                              Stream stream) {
  const int64_t most = 0x7fffff00;
  check_value(given.out <= most && given.in <= most, "weight: too many features for a GPU: ", given.out,
              " x ", given.in);
  const device::DeviceGuard guard(device);
  if (call == BlockSparseCall::kWeight) return run_weight(given, device, stream);
  run_product(given, call == BlockSparseCall::kInput, device, stream);
}

}  // namespace tilewright::prune
