// The tiles of the selective scan's forward pass on a GPU, and which of them suits a call.
#pragma once

#include "core/tune.h"
#include "scan/selective_scan_cuda.h"

namespace tilewright::scan {

// Two channels a thread halve what it reads of B and C for a state, and cost one shuffle.
struct ForwardTuning {
  static constexpr int kChannels = TW_TUNED(SELECTIVE_SCAN_FORWARD_CHANNELS, 2);
  static constexpr int kStates = TW_TUNED(SELECTIVE_SCAN_FORWARD_STATES, 8);
  static constexpr int kStage = 16;
  static constexpr int kItem = TW_TUNED(SELECTIVE_SCAN_FORWARD_ITEM, 8);
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = TW_TUNED(SELECTIVE_SCAN_FORWARD_BLOCKS, 4);
  static constexpr int kPolynomials = TW_TUNED(SELECTIVE_SCAN_FORWARD_POLYNOMIALS, 0);
};

//                    State  channels states lanes max stage item threads blocks constant
using ForwardFew = Tile<float, 1, 4, 1, 4, 16, 8, 128, 4, false>;  // up to 4 states
using ForwardSixteen = SixteenTile<ForwardTuning, true>;
using ForwardUsual = SixteenTile<ForwardTuning, false>;  // 9 to 15
using ForwardAny = Tile<float, 2, 8, 0, kMaxStates, 8, 2, 128, 4, false>;
using ForwardConstant = Tile<float, 1, 8, 0, kMaxStates, 8, 2, 128, 4, true>;
using ForwardComplex = Tile<Complex, 1, 8, 0, kMaxStates, 8, 2, 128, 2, true>;

// Calls body(tile) with an object of the type of tile that suits the call.
template <class Body>
void with_forward_tile(const SelectiveScanParams& p, const Body& body) {
  if (p.weight_dtype == DType::kComplex64) {
    body(ForwardComplex{});
  } else if (!p.variable_B || !p.variable_C) {
    body(ForwardConstant{});
  } else if (p.states <= 4) {
    body(ForwardFew{});
  } else if (p.states == 16) {
    body(ForwardSixteen{});
  } else if (p.states > 8 && p.states < 16) {
    body(ForwardUsual{});
  } else {
    body(ForwardAny{});
  }
}

}  // namespace tilewright::scan
