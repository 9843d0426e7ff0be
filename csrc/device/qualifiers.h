// The words CUDA adds to C++. In the emulator a kernel is a plain function, called once per thread.
#pragma once

#if TILEWRIGHT_EMULATED

#include "emulator/builtins.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#else

#include <cuda_runtime.h>

#endif
