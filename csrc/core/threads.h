// Work shared over OpenMP threads. Included by instruction-set files only: it lives in their namespace.
#pragma once

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

}  // namespace tilewright::TW_ISA
