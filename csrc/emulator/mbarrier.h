// Barriers in shared memory that count arrivals and bytes, and the copies of tiles that they wait for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/hopper.h"

namespace tilewright::emulator {

struct Lane;

// A tile on its way: its place in shared memory holds NaN from the copy's begin until a thread that waits
// for the barrier sees the phase complete.
struct TensorCopy {
  TensorMap map;
  TensorIndex at;
  char* destination;
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
};

std::string describe_mbarrier(const Mbarrier& barrier);

}  // namespace tilewright::emulator
