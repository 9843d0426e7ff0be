// The GPU kernels come next; until then the call says so.
#include "core/check.h"
#include "scan/selective_state_update.h"

namespace tilewright::scan {

void selective_state_update_cuda(const SelectiveStateUpdateParams&, int, Stream) {
  fail(ErrorKind::kNotImplemented, "selective_state_update: there is no CUDA kernel yet");
}

}  // namespace tilewright::scan
