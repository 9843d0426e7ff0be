// Barriers of a block and of a warp, and the memory fence.
//
// All threads of a warp reach a barrier of the block by the same call: a barrier under a condition that
// splits a warp is an error. Named barriers have ids 1..15; their count is in threads, a multiple of 32.
#pragma once

#include <cstdint>

#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include <atomic>

#include "emulator/runtime.h"
#endif

namespace tilewright::device {

inline constexpr uint32_t kFullWarp = 0xffffffffu;

#if TILEWRIGHT_EMULATED

using emulator::BlockOp;
using emulator::Site;

inline void sync_block(Site site = Site::current()) { emulator::sync_block(BlockOp::kSync, false, site); }

inline bool sync_block_or(bool predicate, Site site = Site::current()) {
  return emulator::sync_block(BlockOp::kOr, predicate, site) != 0;
}

inline bool sync_block_and(bool predicate, Site site = Site::current()) {
  return emulator::sync_block(BlockOp::kAnd, predicate, site) != 0;
}

inline int sync_block_count(bool predicate, Site site = Site::current()) {
  return emulator::sync_block(BlockOp::kCount, predicate, site);
}

inline void sync_warp(uint32_t mask = kFullWarp, Site site = Site::current()) {
  emulator::warp_collective(emulator::WarpOp::kSync, 0, 0, mask, site);
}

inline void barrier_sync(int id, int threads, Site site = Site::current()) {
  emulator::barrier_sync(id, threads, site);
}

inline void barrier_arrive(int id, int threads, Site site = Site::current()) {
  emulator::barrier_arrive(id, threads, site);
}

inline void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

#else

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// The vote of all threads of the block, given to each of them.
__device__ __forceinline__ bool sync_block_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
__device__ __forceinline__ bool sync_block_and(bool predicate) { return __syncthreads_and(predicate) != 0; }
__device__ __forceinline__ int sync_block_count(bool predicate) { return __syncthreads_count(predicate); }

__device__ __forceinline__ void sync_warp(uint32_t mask = kFullWarp) { __syncwarp(mask); }

// PTX ISA, "bar": sync arrives and waits, arrive only arrives.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread wrote before is seen by the whole device before what it writes after.
__device__ __forceinline__ void fence() { __threadfence(); }

#endif

}  // namespace tilewright::device
