// The tiles of the selective scan's gradient on a GPU, and which of them suits a call.
#pragma once

#include "core/tune.h"
#include "scan/selective_scan_cuda.h"

namespace tilewright::scan {

// The states of a stage are in registers here, and the sums of dB and dC over channels take fewer shuffles
// the more channels a thread sums by itself.
struct BackwardTuning {
  static constexpr int kChannels = TW_TUNED(SELECTIVE_SCAN_BACKWARD_CHANNELS, 4);
  static constexpr int kStates = 4;
  static constexpr int kStage = 8;
  static constexpr int kItem = 8;
  static constexpr int kThreads = TW_TUNED(SELECTIVE_SCAN_BACKWARD_THREADS, 128);
  static constexpr int kBlocks = TW_TUNED(SELECTIVE_SCAN_BACKWARD_BLOCKS, 2);
  static constexpr int kPolynomials = TW_TUNED(SELECTIVE_SCAN_BACKWARD_POLYNOMIALS, 0);
};

//                    State  channels states lanes max stage item threads blocks constant
using BackwardSixteen = SixteenTile<BackwardTuning, true>;
using BackwardUsual = SixteenTile<BackwardTuning, false>;  // 9 to 15
using BackwardAny = Tile<float, 4, 4, 0, 128, 4, 2, 128, 2, false>;
using BackwardMany = Tile<float, 2, 8, 32, kMaxStates, 4, 1, 128, 2, false>;  // beyond 128
using BackwardConstant = Tile<float, 1, 8, 0, kMaxStates, 8, 2, 64, 4, true>;
using BackwardComplex = Tile<Complex, 1, 8, 0, kMaxStates, 4, 1, 64, 4, true>;

// Calls body(tile) with an object of the type of tile that suits the call.
template <class Body>
void with_backward_tile(const SelectiveScanParams& p, const Body& body) {
  if (p.weight_dtype == DType::kComplex64) {
    body(BackwardComplex{});
  } else if (!p.variable_B || !p.variable_C) {
    body(BackwardConstant{});
  } else if (p.states > 128) {
    body(BackwardMany{});
  } else if (p.states == 16) {
    body(BackwardSixteen{});
  } else if (p.states > 8 && p.states < 16) {
    body(BackwardUsual{});
  } else {
    body(BackwardAny{});
  }
}

}  // namespace tilewright::scan
