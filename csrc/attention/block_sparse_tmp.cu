#include "attention/block_sparse.h"
#include "core/check.h"
namespace tilewright::attention {
void block_sparse_bwd_float32(const BlockSparseParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "x");
}
void block_sparse_fwd_float32(const BlockSparseParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "x");
}
}  // namespace tilewright::attention
