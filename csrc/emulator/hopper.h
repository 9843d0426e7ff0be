// What device/mbarrier.h, device/tma.h and device/wgmma.h call when kernels run on a CPU.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "emulator/runtime.h"

namespace tilewright::emulator {

// ---- Barriers in shared memory -----------------------------------------------------------------

void mbarrier_init(uint64_t* word, int arrivals, Site site);
void mbarriers_fence();
// An arrival that announces so many bytes to come by copies.
void mbarrier_arrive(uint64_t* word, int64_t bytes, Site site);
void mbarrier_wait(uint64_t* word, uint32_t parity, Site site);

// ---- Tiles by the copy engine ------------------------------------------------------------------

inline constexpr int kMaxTensorAxes = 5;
inline constexpr int kSwizzleBytes = 128;
using TensorIndex = std::array<int32_t, kMaxTensorAxes>;

// What a real tensor map holds, in as many bytes; the swizzle is always that of 128 bytes.
struct alignas(64) TensorMap {
  const char* data;
  int64_t strides[kMaxTensorAxes];  // bytes
  uint32_t sizes[kMaxTensorAxes];   // less one: 2^32 is allowed
  int32_t box[kMaxTensorAxes];
  int32_t axes, item_bytes;
  uint64_t mark;  // tells a map from other memory
};
static_assert(sizeof(TensorMap) == 128);

// Throws Error(kRuntime) for what cuTensorMapEncodeTiled refuses.
TensorMap encode_tensor_map(const void* data, int item_bytes, int axes, const int64_t* sizes,
                            const int64_t* strides, const int32_t* box);
void tensor_load(void* shared_destination, const TensorMap& map, const TensorIndex& at, uint64_t* mbarrier,
                 Site site);
void tensor_store(const TensorMap& map, const void* shared_source, const TensorIndex& at, Site site);
void tensor_stores_commit();
void tensor_stores_wait(int groups_left_pending);
void check_tensor_map(const TensorMap& map, Site site);

// What the thread has seen of shared memory, copies and products that begin behind it see as well.
void fence_async_proxy();

// ---- Matrix products of a warpgroup ------------------------------------------------------------

// D (64 x columns, fp32) = A (64 x 16) B (16 x columns), plus D if it accumulates. A lane of the warp of rows
// 16 w .. 16 w + 15 holds of D, at [4 j + 2 i + c], row 16 w + 8 i + lane / 4, column 8 j + 2 (lane % 4) + c.
struct MatrixOp {
  int columns;
  bool is_bf16;
  bool a_in_registers;
  bool b_across;  // the rows of B in memory run along its columns ("MN-major")
  bool accumulates;
  uint64_t a, b;  // descriptors

  bool operator==(const MatrixOp&) const = default;
};

void matrix_fence();
void matrix_issue(const MatrixOp& op, float* accumulators, const uint32_t* a, Site site);
void matrix_commit();
void matrix_wait(int groups_left_pending, Site site);

void check_register_count(int registers, Site site);

}  // namespace tilewright::emulator
