// The GPU kernels come next; until then the call says so.
#include "core/check.h"
#include "scan/causal_conv1d_update.h"

namespace tilewright::scan {

void causal_conv1d_update_cuda(const CausalConv1dUpdateParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "causal_conv1d_update: there is no CUDA kernel yet");
}

}  // namespace tilewright::scan
