// The GPU kernels come next; until then the call says so.
#include "core/check.h"
#include "scan/causal_conv1d.h"

namespace tilewright::scan {

int64_t causal_conv1d_workspace_cuda(const CausalConv1dParams&, bool, int) {
  fail(ErrorKind::kNotImplemented, "causal_conv1d: there is no CUDA kernel yet");
}

void causal_conv1d_fwd_cuda(const CausalConv1dParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "causal_conv1d: there is no CUDA kernel yet");
}

void causal_conv1d_bwd_cuda(const CausalConv1dParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "causal_conv1d: there is no CUDA kernel yet");
}

}  // namespace tilewright::scan
