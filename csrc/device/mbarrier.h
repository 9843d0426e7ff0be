// Barriers in shared memory that count arrivals and the bytes of copies (PTX ISA, "mbarrier"; Hopper).
//
// A barrier counts phases from 0; a phase completes when as many threads have arrived as it was initialised
// with and all bytes announced have come. wait(parity) returns once the phase of that parity has completed:
// a new barrier counts as one whose phase of parity 1 has. What a thread wrote before it arrived, and the
// bytes of the copies, are seen by those that waited.
#pragma once

#include <cstdint>

#include "device/qualifiers.h"
#include "device/smem.h"

#if TILEWRIGHT_EMULATED
#include "emulator/hopper.h"
#endif

namespace tilewright::device {

struct Mbarrier {
  uint64_t state;
};

#if TILEWRIGHT_EMULATED

using emulator::Site;

inline void mbarrier_init(Mbarrier& barrier, int arrivals, Site site = Site::current()) {
  emulator::mbarrier_init(&barrier.state, arrivals, site);
}

inline void fence_mbarrier_init() { emulator::mbarriers_fence(); }

inline void mbarrier_arrive(Mbarrier& barrier, Site site = Site::current()) {
  emulator::mbarrier_arrive(&barrier.state, 0, site);
}

inline void mbarrier_arrive_expect(Mbarrier& barrier, int bytes, Site site = Site::current()) {
  emulator::mbarrier_arrive(&barrier.state, bytes, site);
}

inline void mbarrier_wait(Mbarrier& barrier, uint32_t parity, Site site = Site::current()) {
  emulator::mbarrier_wait(&barrier.state, parity, site);
}

#else

__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}

// By the thread that initialised barriers, before a block barrier after which others use them.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and announces so many bytes of copies to the current phase.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  const SharedAddress address = shared_address(&barrier);
  uint32_t complete;
  do {
    // Suspends the thread for a time that the hardware chooses.
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(address), "r"(parity)
        : "memory");
  } while (complete == 0);
}

#endif

}  // namespace tilewright::device
