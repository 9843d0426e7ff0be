// The stream a kernel is launched on: a cudaStream_t by another name, so that headers shared with
// CPU code need no CUDA. Ignored on the CPU.
#pragma once

namespace tilewright {

using Stream = void*;

}  // namespace tilewright
