// Who touched which byte of shared memory last, and what every thread knows of the others' time. Two threads
// race on a byte if both touch it, one of them writes, and no chain of barriers puts one before the other.
//
// Time is a vector clock a thread (Lamport, Fidge): entry u of thread t's says up to when t has seen what u
// did. A barrier hands on the clocks of those that arrive to those that wait. A shuffle or vote hands on
// less: what lanes read before it they have read (their operands come of it), what they wrote nobody need see
// yet. Of a byte's reads the last two by different threads are kept, so one of three readers can escape
// notice, never a writer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tilewright::emulator {

using Clock = std::vector<uint32_t>;

struct Race {
  size_t offset;  // in shared memory
  unsigned thread, other;
  bool writes, other_wrote;
  const void* code;  // of the thread's access; null: a copy or matrix load
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

  const Race* first() const { return found_ ? &race_ : nullptr; }

 private:
  struct Cell {
    uint32_t write_time = 0, read_time[2] = {0, 0};
    uint16_t writer = 0, reader[2] = {0, 0};
  };

  bool is_before(unsigned thread, unsigned other, uint32_t time) const {
    return time <= base_ || other == thread || clocks_[thread][other] >= time;
  }
  bool has_read(unsigned thread, unsigned other, uint32_t time) const {
    return is_before(thread, other, time) ||
           (thread / 32 == other / 32 && reads_[thread][other % 32] >= time);
  }
  void note(size_t offset, unsigned thread, unsigned other, bool writes, bool other_wrote, const void* code);

  unsigned threads_ = 0;
  const char* shared_ = nullptr;
  size_t bytes_ = 0;
  uint32_t base_ = 0;  // no time up to here is of this block
  uint32_t latest_ = 0;
  std::vector<Clock> clocks_;
  std::vector<std::array<uint32_t, 32>> reads_;  // up to when each lane of the own warp has read
  std::vector<Cell> cells_;
  Race race_{};
  bool found_ = false;
};

}  // namespace tilewright::emulator
