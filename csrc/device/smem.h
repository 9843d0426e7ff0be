// Shared memory: all that a kernel uses is one struct, in the dynamic shared memory of its launch
// (shared_bytes = sizeof of it).
#pragma once

#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include "emulator/runtime.h"
#endif

namespace tilewright::device {

inline constexpr int kSharedAlignment = 128;

template <class S>
__device__ __forceinline__ S& shared_memory() {
  static_assert(alignof(S) <= kSharedAlignment);
#if TILEWRIGHT_EMULATED
  return *static_cast<S*>(emulator::shared_memory(sizeof(S)));
#else
  extern __shared__ __align__(kSharedAlignment) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<S*>(dynamic_shared_memory);
#endif
}

}  // namespace tilewright::device
