// The race detector, and the calls by which it sees: kernels are compiled with -fsanitize=thread, which puts
// a call before every access to memory, and linked without that sanitizer's runtime. Here is another one.
#include "emulator/races.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "emulator/block.h"

namespace tilewright::emulator {

void Races::begin(unsigned threads, const char* shared, size_t bytes) {
  base_ = latest_;
  if (base_ > UINT32_MAX / 2) {
    cells_.clear();
    base_ = 0;
  }
  latest_ = base_ + 1;
  threads_ = threads;
  shared_ = shared;
  bytes_ = bytes;
  found_ = false;
  if (clocks_.size() < threads) clocks_.resize(threads);
  if (reads_.size() < threads) reads_.resize(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    clocks_[thread].assign(threads, base_);
    reads_[thread].fill(base_);
    clocks_[thread][thread] = base_ + 1;
  }
  if (cells_.size() < bytes) cells_.resize(bytes);
}

void Races::access(unsigned thread, const void* address, size_t bytes, bool writes, const void* code) {
  const size_t first = size_t(static_cast<const char*>(address) - shared_);
  if (first >= bytes_) return;
  const uint32_t now = clocks_[thread][thread];
  for (size_t offset = first; offset < std::min(first + bytes, bytes_); ++offset) {
    Cell& cell = cells_[offset];
    if (!is_before(thread, cell.writer, cell.write_time))
      note(offset, thread, cell.writer, writes, true, code);
    if (!writes) {
      if (cell.reader[0] != thread || cell.read_time[0] <= base_) {
        cell.reader[1] = cell.reader[0];
        cell.read_time[1] = cell.read_time[0];
        cell.reader[0] = uint16_t(thread);
      }
      cell.read_time[0] = now;
      continue;
    }
    for (int i = 0; i < 2; ++i) {
      if (!has_read(thread, cell.reader[i], cell.read_time[i]))
        note(offset, thread, cell.reader[i], true, false, code);
      cell.read_time[i] = 0;
    }
    cell.writer = uint16_t(thread);
    cell.write_time = now;
  }
}

void Races::note(size_t offset, unsigned thread, unsigned other, bool writes, bool other_wrote,
                 const void* code) {
  if (found_) return;
  found_ = true;
  race_ = {offset, thread, other, writes, other_wrote, code};
}

void Races::release(unsigned thread, Clock& clock) {
  clock.resize(threads_, base_);
  Clock& own = clocks_[thread];
  for (unsigned u = 0; u < threads_; ++u) clock[u] = std::max(clock[u], own[u]);
  latest_ = std::max(latest_, ++own[thread]);
}

void Races::acquire(unsigned thread, const Clock& clock) {
  if (clock.empty()) return;
  Clock& own = clocks_[thread];
  for (unsigned u = 0; u < threads_; ++u) own[u] = std::max(own[u], clock[u]);
}

void Races::meet(uint32_t lanes, unsigned warp) {
  std::array<uint32_t, kWarpLanes> now{};
  for_each_lane(lanes, [&](unsigned i) { now[i] = clocks_[warp * kWarpLanes + i][warp * kWarpLanes + i]++; });
  for_each_lane(lanes, [&](unsigned i) {
    std::array<uint32_t, kWarpLanes>& own = reads_[warp * kWarpLanes + i];
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) own[lane] = std::max(own[lane], now[lane]);
    latest_ = std::max(latest_, now[i] + 1);
  });
}

namespace {

void seen(const void* address, size_t bytes, bool writes, const void* code) {
  if (running_block != nullptr) running_block->note_access(address, bytes, writes, code);
}

}  // namespace

}  // namespace tilewright::emulator

// ---- What the compiler calls (names and meanings: LLVM's and GCC's interface of ThreadSanitizer) ----

using tilewright::emulator::seen;

#define TW_ACCESS(bytes)                                                                               \
  void __tsan_read##bytes(void* at) { seen(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { seen(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { seen(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { seen(at, bytes, true, __builtin_return_address(0)); }

// Atomic accesses do not race with each other, and order nothing.
#define TW_ATOMIC(bits, T)                                                                                  \
  T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile T* at, T x, int) { __atomic_store_n(at, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_exchange(volatile T* at, T x, int) {                                              \
    return __atomic_exchange_n(at, x, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                         \
  T __tsan_atomic##bits##_fetch_add(volatile T* at, T x, int) {                                             \
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                         \
  T __tsan_atomic##bits##_fetch_sub(volatile T* at, T x, int) {                                             \
    return __atomic_fetch_sub(at, x, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                         \
  T __tsan_atomic##bits##_fetch_or(volatile T* at, T x, int) {                                              \
    return __atomic_fetch_or(at, x, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* expected, T x, int, int) {           \
    return __atomic_compare_exchange_n(at, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }                                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* at, T* expected, T x, int, int) {             \
    return __atomic_compare_exchange_n(at, expected, x, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }

extern "C" {

TW_ACCESS(1)
TW_ACCESS(2)
TW_ACCESS(4)
TW_ACCESS(8)
TW_ACCESS(16)

void __tsan_read_range(void* at, unsigned long bytes) { seen(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, unsigned long bytes) { seen(at, bytes, true, __builtin_return_address(0)); }

TW_ATOMIC(8, uint8_t)
TW_ATOMIC(32, uint32_t)
TW_ATOMIC(64, uint64_t)

void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
