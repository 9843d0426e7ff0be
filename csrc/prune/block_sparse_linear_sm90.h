// What the Hopper kernels of the block-sparse linear layer share: a thread that has tiles copied into a ring
// in shared memory, and two warpgroups that multiply them.
#pragma once

#include "device/launch.h"
#include "device/mbarrier.h"
#include "device/tma.h"
#include "device/wgmma.h"
#include "prune/block_sparse_linear_cuda.h"

namespace tilewright::prune::blocks {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kHopperThreads = (1 + kGroups) * device::kWarpgroup;
constexpr int kMultiplyingWarps = kGroups * device::kWarpgroup / device::kWarpSize;
constexpr int kPanel = 64;                                        // elements of a row in shared memory
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // 168 each at first

template <int kSlots>
struct Ring {
  device::Mbarrier full[kSlots], empty[kSlots];
};

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

template <int kSlots>
__device__ __forceinline__ void make_ring(Ring<kSlots>& ring) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      device::mbarrier_init(ring.full[i], 1);
      device::mbarrier_init(ring.empty[i], kMultiplyingWarps);
    }
    device::fence_mbarrier_init();
  }
  device::sync_block();
}

// Gives a slot back: this warp has read it, and its products have.
__device__ __forceinline__ void release(device::Mbarrier& empty) {
  device::sync_warp();
  if (device::lane_id() == 0) device::mbarrier_arrive(empty);
}

// Which of the warpgroups that multiply, or -1.
__device__ __forceinline__ int own_group() {
  return device::warp_id() * device::kWarpSize / device::kWarpgroup - 1;
}

// Whether the copy engine can address so many rows of 16-bit elements, which do not overlap.
inline bool is_addressable(const Access& matrix, int64_t rows) {
  constexpr int64_t kMostStride = (int64_t{1} << 40) / 2, kMostRows = int64_t{1} << 30;
  const Matrix& at = matrix.at;
  const bool stride = rows == 1 || (at.row >= matrix.columns && at.row % 8 == 0 && at.row < kMostStride);
  return at.column == 1 && stride && rows <= kMostRows && device::is_aligned(at.data, 16);
}

template <class T>
device::TensorMap map_of(const void* data, int64_t columns, int64_t rows, int64_t row, int32_t box_rows) {
  const int64_t dense = divide_up(columns, 8) * 8;  // that of an axis of one element does not matter
  return device::tensor_map<T>(
      data, {{columns, 1, kPanel}, {rows, rows == 1 ? dense : row, box_rows}, {1, dense, 1}, {1, dense, 1}});
}

}  // namespace tilewright::prune::blocks
