#include "attention/block_sparse.h"
#include "core/check.h"
namespace tilewright::attention {
int64_t block_sparse_bwd_workspace_cuda(const BlockSparseParams&) { return 0; }
void block_sparse_bwd_cuda(const BlockSparseParams&, int, Stream) { fail(ErrorKind::kNotImplemented, "x"); }
void block_sparse_fwd_float32(const BlockSparseParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "x");
}
}  // namespace tilewright::attention
