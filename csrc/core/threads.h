// Work shared over OpenMP threads. Included by instruction-set files only: it lives in their namespace.
#pragma once

#include <omp.h>

#include <cstdint>

namespace tilewright::TW_ISA {

// Calls body(chunk) for every chunk. Chunks are handed out as threads become free, so a core that another
// process holds delays one chunk, not half of the work; bodies must not depend on who runs them.
template <class Body>
static inline void parallel_chunks(int64_t chunks, int threads, const Body& body) {
  if (threads <= 1 || chunks <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
}

// As parallel_chunks, for bodies that need scratch memory: body(chunk, slot), where no two bodies that run at
// the same time have the same slot, and slots are less than max(threads, 1).
template <class Body>
static inline void parallel_slots(int64_t chunks, int threads, const Body& body) {
  if (threads <= 1 || chunks <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int slot = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk, slot);
  }
}

}  // namespace tilewright::TW_ISA
