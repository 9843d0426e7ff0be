// The one place where a call goes to the CPU or to the GPU.
#pragma once

#include "core/check.h"

// Evaluates exactly one of the two calls. What a build lacks is an error, never a fallback. (A macro, because
// the call that is not taken may name a function that this build does not contain.)
#if TILEWRIGHT_EMULATED
#define TW_RUN(on_gpu, cpu_call, cuda_call) ((void)(on_gpu), cuda_call)
#elif TILEWRIGHT_CUDA
#define TW_RUN(on_gpu, cpu_call, cuda_call) ((on_gpu) ? (cuda_call) : (cpu_call))
#else
#define TW_RUN(on_gpu, cpu_call, cuda_call) ((on_gpu) ? ::tilewright::no_cuda_in_build() : (cpu_call))
#endif

namespace tilewright {

[[noreturn]] inline void no_cuda_in_build() {
  fail(ErrorKind::kNotImplemented,
       "this build of tilewright holds no CUDA kernels: move the tensors to the CPU, or install a build made "
       "with "
       "nvcc present (TILEWRIGHT_CUDA=ON)");
}

}  // namespace tilewright
