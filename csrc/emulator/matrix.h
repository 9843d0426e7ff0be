// Matrix products under way. Each warp of a warpgroup works on its own 16 rows, and reads its operands from
// shared memory when it waits for the result: as late as the hardware may.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "emulator/hopper.h"

namespace tilewright::emulator {

inline constexpr unsigned kMatrixWarps = 4;  // of a warpgroup

// Registers that products under way are to change. They hold NaN meanwhile; their values are here.
struct Accumulators {
  float* registers;
  std::vector<float> values;
  uint64_t last;  // number of the last product that adds to them
};

// What a thread has begun.
struct MatrixWork {
  uint64_t issued = 0, done = 0;
  std::vector<uint64_t> groups;  // products issued by the time of each commit
  std::vector<Accumulators> accumulators;
  std::deque<std::array<uint32_t, 4>> a;  // of the products not done, if in registers
  std::deque<float*> targets;             // likewise
  bool fenced = false;

  void forget() {
    issued = done = 0;
    groups.clear();
    accumulators.clear();
    a.clear();
    targets.clear();
    fenced = false;
  }
};

// The products of a warpgroup in order: its threads must all issue the same.
struct MatrixGroup {
  std::deque<MatrixOp> ops;
  uint64_t first = 0;                           // number of ops.front()
  std::array<uint64_t, kMatrixWarps> done{};    // by each warp
  std::array<unsigned, kMatrixWarps> agents{};  // of each warp, for the race detector, from the first on

  void forget() {
    ops.clear();
    first = 0;
    done = {};
    agents = {};
  }
};

}  // namespace tilewright::emulator
