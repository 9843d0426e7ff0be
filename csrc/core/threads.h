// Work shared over OpenMP threads. Included by instruction-set files only: it lives in their namespace.
#pragma once

#include <omp.h>

#include <cstdint>

namespace tilewright::TW_ISA {

// Where the next chunk of a thread's share is counted; a cache line each.
struct alignas(64) NextChunk {
  int64_t value;
};

constexpr int kMaxShares = 64;

// Calls prepare(slot) once on every thread that takes part, then body(chunk, slot) for every chunk; bodies
// must not depend on who runs them. No two bodies that run at the same time have the same slot, and slots are
// less than max(threads, 1). Chunks that follow each other make a share. Threads begin with different shares
// and go on with the next where one is done, so a core that another process holds delays one chunk, not its
// share.
template <class Prepare, class Body>
static inline void run_shares(int64_t chunks, int threads, int shares, const Prepare& prepare,
                              const Body& body) {
  if (threads <= 1 || chunks <= 1) {
    if (chunks > 0) prepare(0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk, 0);
    return;
  }
  const auto begin = [&](int share) { return chunks * share / shares; };
  NextChunk next[kMaxShares];
  for (int share = 0; share < shares; ++share) next[share].value = begin(share);
#pragma omp parallel num_threads(threads)
  {
    const int slot = omp_get_thread_num();
    prepare(slot);
    for (int i = 0; i < shares; ++i) {
      const int share = (slot + i) % shares;
      const int64_t end = begin(share + 1);
      int64_t* const at = &next[share].value;
      // Looked at before it is counted: most shares are found done, and a look leaves the line where it is.
      while (__atomic_load_n(at, __ATOMIC_RELAXED) < end) {
        const int64_t chunk = __atomic_fetch_add(at, 1, __ATOMIC_RELAXED);
        if (chunk < end) body(chunk, slot);
      }
    }
  }
}

// A share a thread. Cores of which not all share a cache (an AMD processor's core complexes) then find what
// the call before, or the one before that, left in their own: with one queue, chunks side by side go to
// different cores, and differently every time.
template <class Prepare, class Body>
static inline void parallel_slots(int64_t chunks, int threads, const Prepare& prepare, const Body& body) {
  run_shares(chunks, threads, threads < kMaxShares ? threads : kMaxShares, prepare, body);
}

template <class Body>
static inline void parallel_slots(int64_t chunks, int threads, const Body& body) {
  parallel_slots(chunks, threads, [](int) {}, body);
}

// One queue: for chunks that come with the dearest first, and where neighbours read the same.
template <class Body>
static inline void parallel_queue(int64_t chunks, int threads, const Body& body) {
  run_shares(chunks, threads, 1, [](int) {}, body);
}

template <class Body>
static inline void parallel_chunks(int64_t chunks, int threads, const Body& body) {
  parallel_slots(chunks, threads, [&](int64_t chunk, int) { body(chunk); });
}

}  // namespace tilewright::TW_ISA
