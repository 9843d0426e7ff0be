// Who touched which byte of shared memory last, and what every thread knows of the others' time. Two of them
// race on a byte if both touch it, one of them writes, and no chain of barriers and waits puts one before the
// other.
//
// Time is a vector clock a thread (Lamport, Fidge): entry u of thread t's says up to when t has seen what u
// did. A barrier hands on the clocks of those that arrive to those that wait. A shuffle or vote hands on
// less: what lanes read before it they have read (their operands come of it), what they wrote nobody need see
// yet. Of a byte's reads the last two by different threads are kept, so one of three readers can escape
// notice, never a writer.
//
// What works beside the threads (the products of a warp, the copies to an mbarrier, a thread's stores) is an
// agent with entries of its own: it touches memory from the begin of an operation, when the thread that
// begins it must have seen all that it meets, until a thread waits for it, who then knows. All its reads are
// kept, by pieces of 16 bytes. Agents see what threads wrote only behind a fence_async_proxy, which a second
// clock a thread keeps account of.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/runtime.h"

namespace tilewright::emulator {

struct Clock {
  std::vector<uint32_t> seen;
  std::vector<uint32_t> fenced;  // of what is seen, up to when agents see it too; empty until the first fence

  void clear() {
    seen.clear();
    fenced.clear();
  }
};

struct Race {
  size_t offset;           // in shared memory
  unsigned thread, other;  // or agents
  bool writes, other_wrote;
  bool unfenced;     // in order, but an agent need not see it
  const void* code;  // of the thread's access; null: a copy, matrix load or product
};

// What works beside the threads.
struct Agent {
  const char* what;
  size_t number;
  Site site;  // of the last operation begun
};

class Races {
 public:
  // A block begins: all that was noted before is over.
  void begin(unsigned threads, const char* shared, size_t bytes);

  void access(unsigned thread, const void* address, size_t bytes, bool writes, const void* code);

  // What the thread has done so far is handed to those that acquire `clock` after.
  void release(unsigned thread, Clock& clock);
  void acquire(unsigned thread, const Clock& clock);

  // Lanes of one warp meet, but not for the sake of memory.
  void meet(uint32_t lanes, unsigned warp);

  // An agent's operations are numbered from 0 and finish in order. Its bytes are whole pieces.
  unsigned add_agent(const char* what, size_t number);
  void begin_read(unsigned thread, unsigned agent, uint64_t number, size_t offset, size_t bytes, Site site);
  void begin_write(unsigned thread, unsigned agent, uint64_t number, size_t offset, size_t bytes, Site site);
  // So many have been waited for: by a thread, or by whoever acquires the clock.
  void finish(unsigned thread, unsigned agent, uint64_t count) { finish(clocks_[thread], agent, count); }
  void finish(Clock& clock, unsigned agent, uint64_t count);

  // What the thread has seen until now agents see as well.
  void fence(unsigned thread);

  const Race* first() const { return found_ ? &race_ : nullptr; }
  // Null for a thread.
  const Agent* agent(unsigned number) const {
    return number < threads_ ? nullptr : &agents_[number - threads_];
  }

  static constexpr size_t kPiece = 16;

 private:
  struct Cell {
    uint32_t write_time = 0, read_time[2] = {0, 0};
    uint16_t writer = 0, reader[2] = {0, 0};
  };

  // An agent's last read of each piece.
  struct Reads {
    unsigned agent;
    std::vector<uint32_t> times;
  };

  bool is_before(unsigned thread, unsigned other, uint32_t time) const {
    return time <= base_ || other == thread || clocks_[thread].seen[other] >= time;
  }
  bool has_read(unsigned thread, unsigned other, uint32_t time) const {
    return is_before(thread, other, time) ||
           (thread / 32 == other / 32 && reads_[thread][other % 32] >= time);
  }
  bool is_fenced(unsigned thread, const Cell& cell) const;
  uint32_t begin_operation(unsigned agent, uint64_t number, Site site);
  void check_agent_sees(unsigned thread, unsigned agent, size_t offset, bool writes);
  void check_readers(unsigned thread, unsigned who, size_t offset, Cell& cell, const void* code);
  void check_agents_reads(unsigned thread, unsigned who, size_t first, size_t end, const void* code);
  Reads& reads_of(unsigned agent);
  void note(const Race& race);

  unsigned threads_ = 0;
  const char* shared_ = nullptr;
  size_t bytes_ = 0;
  uint32_t base_ = 0;  // no time up to here is of this block
  uint32_t latest_ = 0;
  std::vector<Clock> clocks_;
  std::vector<std::array<uint32_t, 32>> reads_;  // up to when each lane of the own warp has read
  std::vector<Cell> cells_;
  std::vector<Agent> agents_;
  std::vector<Reads> agents_reads_;  // the first `reading_agents_` are of this block
  size_t reading_agents_ = 0;
  Race race_{};
  bool found_ = false;
};

}  // namespace tilewright::emulator
