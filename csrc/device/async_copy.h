// Copies from global to shared memory that run beside the thread (PTX ISA, "cp.async"). They land in
// groups: commit closes a group of this thread's copies, wait<N> returns when all but its N youngest
// groups have landed. Other threads see the data after a barrier that follows the wait.
#pragma once

#include <cstdint>

#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include "emulator/runtime.h"
#endif

namespace tilewright::device {

template <int kBytes>
concept AsyncCopyBytes = kBytes == 4 || kBytes == 8 || kBytes == 16;

#if TILEWRIGHT_EMULATED

using emulator::Site;

template <int kBytes>
  requires AsyncCopyBytes<kBytes>
void cp_async(void* shared_destination, const void* source, bool valid = true, Site site = Site::current()) {
  emulator::cp_async(shared_destination, source, kBytes, valid, site);
}

inline void cp_async_commit() { emulator::cp_async_commit(); }

template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0);
  emulator::cp_async_wait(kPending);
}

#else

// Both addresses are multiples of kBytes. An invalid copy reads nothing and stores zeros.
template <int kBytes>
  requires AsyncCopyBytes<kBytes>
__device__ __forceinline__ void cp_async(void* shared_destination, const void* source, bool valid = true) {
  const uint32_t destination = uint32_t(__cvta_generic_to_shared(shared_destination));
  const int bytes_read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes_read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "n"(kBytes), "r"(bytes_read)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kPending >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace tilewright::device
