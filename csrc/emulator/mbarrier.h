// Barriers in shared memory that count arrivals and bytes, and the copies of tiles.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "emulator/hopper.h"
#include "emulator/races.h"

namespace tilewright::emulator {

struct Lane;

// A tile on its way. One that is loaded: its place in shared memory holds NaN from the copy's begin until a
// thread that waits for the barrier sees the phase complete.
struct TensorCopy {
  TensorMap map;
  TensorIndex at;
  char* tile;
};

// The stores a thread has begun, in groups as it committed them. They read shared memory when they are waited
// for.
struct TensorStores {
  std::deque<TensorCopy> copies{};  // that have not been waited for
  std::vector<uint64_t> groups{};   // stores begun by the time of each commit
  uint64_t begun = 0, done = 0;
  unsigned agent = 0;  // for the race detector, from the first store on
};

struct Mbarrier {
  size_t offset;      // in shared memory
  unsigned count;     // arrivals that a phase takes
  unsigned missing;   // of these, in the current phase
  int64_t bytes = 0;  // announced in the current phase, less those of the copies begun
  uint64_t phase = 0;
  bool fenced = false;  // copies may find it
  std::vector<TensorCopy> copies{};
  std::vector<Lane*> waiting{};
  Clock arrived{}, passed{};  // of all who arrived; of those up to the last phase's end
  unsigned agent = 0;         // its copies, for the race detector, from the first on
};

std::string describe_mbarrier(const Mbarrier& barrier);

}  // namespace tilewright::emulator
