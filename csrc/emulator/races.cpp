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
    agents_reads_.clear();
    base_ = 0;
  }
  latest_ = base_ + 1;
  threads_ = threads;
  shared_ = shared;
  bytes_ = bytes;
  found_ = false;
  agents_.clear();
  reading_agents_ = 0;
  if (clocks_.size() < threads) clocks_.resize(threads);
  if (reads_.size() < threads) reads_.resize(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    clocks_[thread].seen.assign(threads, base_);
    clocks_[thread].fenced.clear();
    reads_[thread].fill(base_);
    clocks_[thread].seen[thread] = base_ + 1;
  }
  if (cells_.size() < bytes) cells_.resize(bytes);
}

// ---- Threads -----------------------------------------------------------------------------------

void Races::access(unsigned thread, const void* address, size_t bytes, bool writes, const void* code) {
  const size_t first = size_t(static_cast<const char*>(address) - shared_);
  if (first >= bytes_) return;
  const size_t end = std::min(first + bytes, bytes_);
  const uint32_t now = clocks_[thread].seen[thread];
  for (size_t offset = first; offset < end; ++offset) {
    Cell& cell = cells_[offset];
    if (!is_before(thread, cell.writer, cell.write_time))
      note({offset, thread, cell.writer, writes, true, false, code});
    if (!writes) {
      if (cell.reader[0] != thread || cell.read_time[0] <= base_) {
        cell.reader[1] = cell.reader[0];
        cell.read_time[1] = cell.read_time[0];
        cell.reader[0] = uint16_t(thread);
      }
      cell.read_time[0] = now;
      continue;
    }
    check_readers(thread, thread, offset, cell, code);
    cell.writer = uint16_t(thread);
    cell.write_time = now;
  }
  if (writes) check_agents_reads(thread, thread, first, end, code);
}

// Who writes knows what `thread` knows.
inline void Races::check_readers(unsigned thread, unsigned who, size_t offset, Cell& cell, const void* code) {
  for (int i = 0; i < 2; ++i) {
    if (!has_read(thread, cell.reader[i], cell.read_time[i]))
      note({offset, who, cell.reader[i], true, false, false, code});
    cell.read_time[i] = 0;
  }
}

inline void Races::check_agents_reads(unsigned thread, unsigned who, size_t first, size_t end,
                                      const void* code) {
  for (size_t i = 0; i < reading_agents_; ++i) {
    const Reads& reads = agents_reads_[i];
    for (size_t piece = first / kPiece; piece * kPiece < end; ++piece) {
      if (!is_before(thread, reads.agent, reads.times[piece]))
        note({std::max(first, piece * kPiece), who, reads.agent, true, false, false, code});
    }
  }
}

void Races::note(const Race& race) {
  if (found_) return;
  found_ = true;
  race_ = race;
}

namespace {

void join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other, uint32_t base) {
  if (clock.size() < other.size()) clock.resize(other.size(), base);
  for (size_t u = 0; u < other.size(); ++u) clock[u] = std::max(clock[u], other[u]);
}

}  // namespace

void Races::release(unsigned thread, Clock& clock) {
  Clock& own = clocks_[thread];
  join(clock.seen, own.seen, base_);
  join(clock.fenced, own.fenced, base_);
  latest_ = std::max(latest_, ++own.seen[thread]);
}

void Races::acquire(unsigned thread, const Clock& clock) {
  join(clocks_[thread].seen, clock.seen, base_);
  join(clocks_[thread].fenced, clock.fenced, base_);
}

void Races::meet(uint32_t lanes, unsigned warp) {
  std::array<uint32_t, kWarpLanes> now{};
  for_each_lane(lanes,
                [&](unsigned i) { now[i] = clocks_[warp * kWarpLanes + i].seen[warp * kWarpLanes + i]++; });
  for_each_lane(lanes, [&](unsigned i) {
    std::array<uint32_t, kWarpLanes>& own = reads_[warp * kWarpLanes + i];
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) own[lane] = std::max(own[lane], now[lane]);
    latest_ = std::max(latest_, now[i] + 1);
  });
}

// ---- Agents ------------------------------------------------------------------------------------

unsigned Races::add_agent(const char* what, size_t number) {
  agents_.push_back({what, number, {}});
  for (unsigned thread = 0; thread < threads_; ++thread)
    clocks_[thread].seen.resize(threads_ + agents_.size(), base_);
  return threads_ + unsigned(agents_.size()) - 1;
}

uint32_t Races::begin_operation(unsigned agent, uint64_t number, Site site) {
  agents_[agent - threads_].site = site;
  const uint32_t time = base_ + 1 + uint32_t(number);
  latest_ = std::max(latest_, time);
  return time;
}

bool Races::is_fenced(unsigned thread, const Cell& cell) const {
  if (cell.write_time <= base_ || cell.writer >= threads_) return true;
  const std::vector<uint32_t>& fenced = clocks_[thread].fenced;
  return cell.writer < fenced.size() && fenced[cell.writer] >= cell.write_time;
}

// Whether what was written there was before, as `thread` knows it, and agents see it.
inline void Races::check_agent_sees(unsigned thread, unsigned agent, size_t offset, bool writes) {
  const Cell& cell = cells_[offset];
  if (!is_before(thread, cell.writer, cell.write_time)) {
    note({offset, agent, cell.writer, writes, true, false, nullptr});
  } else if (!is_fenced(thread, cell)) {
    note({offset, agent, cell.writer, writes, true, true, nullptr});
  }
}

Races::Reads& Races::reads_of(unsigned agent) {
  for (size_t i = 0; i < reading_agents_; ++i) {
    if (agents_reads_[i].agent == agent) return agents_reads_[i];
  }
  if (agents_reads_.size() == reading_agents_) agents_reads_.emplace_back();
  Reads& reads = agents_reads_[reading_agents_++];
  reads.agent = agent;
  reads.times.resize(std::max(reads.times.size(), bytes_ / kPiece + 1));
  return reads;
}

void Races::begin_read(unsigned thread, unsigned agent, uint64_t number, size_t offset, size_t bytes,
                       Site site) {
  const uint32_t time = begin_operation(agent, number, site);
  Reads& reads = reads_of(agent);
  const size_t end = std::min(offset + bytes, bytes_);
  for (size_t byte = offset; byte < end; ++byte) check_agent_sees(thread, agent, byte, false);
  for (size_t piece = offset / kPiece; piece * kPiece < end; ++piece) reads.times[piece] = time;
}

void Races::begin_write(unsigned thread, unsigned agent, uint64_t number, size_t offset, size_t bytes,
                        Site site) {
  const uint32_t time = begin_operation(agent, number, site);
  const size_t end = std::min(offset + bytes, bytes_);
  for (size_t byte = offset; byte < end; ++byte) {
    Cell& cell = cells_[byte];
    check_agent_sees(thread, agent, byte, true);
    check_readers(thread, agent, byte, cell, nullptr);
    cell.writer = uint16_t(agent);
    cell.write_time = time;
  }
  check_agents_reads(thread, agent, offset, end, nullptr);
}

void Races::finish(Clock& clock, unsigned agent, uint64_t count) {
  if (clock.seen.size() <= agent) clock.seen.resize(agent + 1, base_);
  clock.seen[agent] = std::max(clock.seen[agent], base_ + uint32_t(count));
}

void Races::fence(unsigned thread) {
  Clock& own = clocks_[thread];
  join(own.fenced, own.seen, base_);
  latest_ = std::max(latest_, ++own.seen[thread]);  // what it writes from now on is behind the fence
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
