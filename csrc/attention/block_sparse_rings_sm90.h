// How the warps of the Hopper kernel hand tiles to one another.
#pragma once

#include <cstdint>

#include "attention/block_sparse_tiles_sm90.h"
#include "device/mbarrier.h"
#include "device/sync.h"
#include "device/warp.h"
#include "device/wgmma.h"

namespace tilewright::attention::sm90 {

constexpr int kConsumerWarps = kGroups * device::kWarpgroup / device::kWarpSize;

// A place in a ring, and the parity of its turn.
template <int kSlots>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot < kSlots) return;
    slot = 0;
    parity ^= 1;
  }
};

// Gives the slot back: this warp has read all that it wants of it.
__device__ __forceinline__ void release(device::Mbarrier& empty) {
  device::sync_warp();
  if (device::lane_id() == 0) device::mbarrier_arrive(empty);
}

// Where both warpgroups go through the same tiles they begin their products in turns, so that the softmax of
// the one runs beside the products of the other. Warpgroup g waits for its turn at barrier 1 + g, for which
// the other has arrived.
__device__ __forceinline__ void take_turn(int group) {
  device::barrier_sync(1 + group, kGroups * device::kWarpgroup);
}
__device__ __forceinline__ void pass_turn(int group) {
  device::barrier_arrive(1 + (group ^ 1), kGroups * device::kWarpgroup);
}

}  // namespace tilewright::attention::sm90
