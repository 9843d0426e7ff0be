// What device/*.h calls when kernels run on a CPU. A thread block is a set of fibres on one OS thread;
// a fibre runs until it waits, and those that may run again do so in a seeded random order. Every
// misuse that can be seen ends the launch with an Error that says which thread did what, and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "emulator/builtins.h"

namespace tilewright::emulator {

using Site = std::source_location;

// ---- Options: for tests, before a launch -------------------------------------------------------

// The order in which blocks and threads run is a function of the seed alone.
void set_seed(uint64_t seed);

// OS threads that share the blocks of a grid; 0 is the number of cores. No result depends on it
// unless the kernel's blocks race.
void set_threads(int threads);

// What kernels are told that the device has: those that divide their work by it take other ways.
void set_multiprocessors(int count);
int multiprocessors();

// And of which generation it is, as 80 or 90.
void set_compute_capability(int number);
int compute_capability();

// ---- Launch ------------------------------------------------------------------------------------

inline constexpr size_t kMaxSharedBytes = 227 * 1024;

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes;
  void (*run_thread)(const Grid&);  // calls the kernel, as one thread
  void* kernel;
  const void* params;
};

// Runs every block to its end. Throws Error(kRuntime) for the first block, in launch order, that fails.
void run(const Grid& grid);

// ---- Calls from within a kernel ----------------------------------------------------------------

int thread_rank();  // in the block, x fastest

void* shared_memory(size_t bytes);

enum class BlockOp : uint8_t { kSync, kOr, kAnd, kCount };
int sync_block(BlockOp op, bool predicate, Site site);

void barrier_sync(int id, int threads, Site site);
void barrier_arrive(int id, int threads, Site site);

enum class WarpOp : uint8_t {
  kSync,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kAny,
  kAll,
  kReduceMax,
  kReduceMin,
  kReduceAdd,
  kReduceOr,
  kMatchAny,
  kMatrixWait,
  kMma,
  kMmaSparse,
  kLoadMatrices
};
// `value` is the lane's operand, `argument` a shuffle's lane, mask or distance. Returns the lane's result.
uint64_t warp_collective(WarpOp op, uint64_t value, uint32_t argument, uint32_t mask, Site site);

// Fragments of a lane, laid out as device/mma.h says; c is added to.
struct MmaOperands {
  uint32_t a[4], b[2];
  float* c;
};
void mma_m16n8k16(MmaOperands& operands, bool brain_floats, Site site);

// As device/mma_sparse.h says.
struct MmaSparseOperands {
  uint32_t a[4], b[4], metadata;
  float* c;
  Site site;
};
void mma_sparse_m16n8k32(MmaSparseOperands& operands, bool brain_floats, int selector, Site site);

// `row` is an offset in shared memory.
void load_matrices(uint32_t (&registers)[4], uint32_t row, bool transposed, Site site);

void cp_async(void* shared_destination, const void* source, int bytes, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int groups_left_pending);

[[noreturn]] void report_misaligned(const void* address, size_t alignment, Site site);

inline void check_aligned(const void* address, size_t alignment, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) [[unlikely]] {
    report_misaligned(address, alignment, site);
  }
}

}  // namespace tilewright::emulator
