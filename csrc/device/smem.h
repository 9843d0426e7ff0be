// Shared memory: all that a kernel uses is one struct, in the dynamic shared memory of its launch
// (shared_bytes = sizeof of it).
#pragma once

#include <cstdint>
#include <cstring>

#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include "emulator/runtime.h"
#endif

namespace tilewright::device {

// The swizzle of tiles (device/tma.h) is a function of the lowest ten bits of their addresses.
inline constexpr int kSharedAlignment = 1024;

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

// A 32-bit address in shared memory, for lookups whose index arithmetic should stay in one register.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
#if TILEWRIGHT_EMULATED
  return SharedAddress(static_cast<const char*>(pointer) -
                       static_cast<const char*>(emulator::shared_memory(1)));
#else
  return SharedAddress(__cvta_generic_to_shared(pointer));
#endif
}

// A 4-byte element; the memory was written before the last barrier and stays as it is.
template <class T>
__device__ __forceinline__ T load_shared(SharedAddress address) {
  static_assert(sizeof(T) == 4);
  T value;
#if TILEWRIGHT_EMULATED
  std::memcpy(&value, static_cast<const char*>(emulator::shared_memory(address + sizeof(T))) + address,
              sizeof(T));
#else
  uint32_t word;
  asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  memcpy(&value, &word, sizeof value);
#endif
  return value;
}

}  // namespace tilewright::device
