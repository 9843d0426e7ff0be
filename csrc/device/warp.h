// Collectives of a warp. Every lane named in the mask calls the same one with the same mask, each lane
// calls with its own bit set, and none of them has exited.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device/qualifiers.h"
#include "device/sync.h"

namespace tilewright::device {

inline constexpr int kWarpSize = 32;

// What the warp moves: any trivially copyable type of one or two registers.
template <class T>
concept WarpValue = std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

#if TILEWRIGHT_EMULATED

using emulator::WarpOp;

inline int lane_id() { return emulator::thread_rank() % kWarpSize; }
inline int warp_id() { return emulator::thread_rank() / kWarpSize; }

template <WarpValue T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <WarpValue T>
T shuffle_as(WarpOp op, T value, uint32_t argument, uint32_t mask, Site site) {
  const uint64_t bits = emulator::warp_collective(op, to_bits(value), argument, mask, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <WarpValue T>
T shfl(T value, int source, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return shuffle_as(WarpOp::kShuffle, value, uint32_t(source), mask, site);
}

template <WarpValue T>
T shfl_xor(T value, int lane_mask, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return shuffle_as(WarpOp::kShuffleXor, value, uint32_t(lane_mask), mask, site);
}

template <WarpValue T>
T shfl_up(T value, int delta, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return shuffle_as(WarpOp::kShuffleUp, value, uint32_t(delta), mask, site);
}

template <WarpValue T>
T shfl_down(T value, int delta, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return shuffle_as(WarpOp::kShuffleDown, value, uint32_t(delta), mask, site);
}

inline uint32_t ballot(bool predicate, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return uint32_t(emulator::warp_collective(WarpOp::kBallot, predicate, 0, mask, site));
}

inline bool any(bool predicate, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return emulator::warp_collective(WarpOp::kAny, predicate, 0, mask, site) != 0;
}

inline bool all(bool predicate, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return emulator::warp_collective(WarpOp::kAll, predicate, 0, mask, site) != 0;
}

inline uint32_t reduce_max(uint32_t value, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return uint32_t(emulator::warp_collective(WarpOp::kReduceMax, value, 0, mask, site));
}

inline uint32_t reduce_min(uint32_t value, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return uint32_t(emulator::warp_collective(WarpOp::kReduceMin, value, 0, mask, site));
}

inline uint32_t reduce_add(uint32_t value, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return uint32_t(emulator::warp_collective(WarpOp::kReduceAdd, value, 0, mask, site));
}

inline uint32_t reduce_or(uint32_t value, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return uint32_t(emulator::warp_collective(WarpOp::kReduceOr, value, 0, mask, site));
}

template <WarpValue T>
uint32_t match_any(T value, uint32_t mask = kFullWarp, Site site = Site::current()) {
  return uint32_t(emulator::warp_collective(WarpOp::kMatchAny, to_bits(value), 0, mask, site));
}

#else

__device__ __forceinline__ int lane_id() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ int warp_id() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / kWarpSize;
}

template <WarpValue T>
using WarpBits = std::conditional_t<sizeof(T) == 4, unsigned int, unsigned long long>;

template <WarpValue T>
__device__ __forceinline__ WarpBits<T> to_bits(T value) {
  WarpBits<T> bits;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <WarpValue T>
__device__ __forceinline__ T from_bits(WarpBits<T> bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// shfl takes the source lane modulo 32; up and down leave a lane whose source is outside the warp its
// own value.
template <WarpValue T>
__device__ __forceinline__ T shfl(T value, int source, uint32_t mask = kFullWarp) {
  return from_bits<T>(__shfl_sync(mask, to_bits(value), source));
}

template <WarpValue T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask, uint32_t mask = kFullWarp) {
  return from_bits<T>(__shfl_xor_sync(mask, to_bits(value), lane_mask));
}

template <WarpValue T>
__device__ __forceinline__ T shfl_up(T value, int delta, uint32_t mask = kFullWarp) {
  return from_bits<T>(__shfl_up_sync(mask, to_bits(value), unsigned(delta)));
}

template <WarpValue T>
__device__ __forceinline__ T shfl_down(T value, int delta, uint32_t mask = kFullWarp) {
  return from_bits<T>(__shfl_down_sync(mask, to_bits(value), unsigned(delta)));
}

__device__ __forceinline__ uint32_t ballot(bool predicate, uint32_t mask = kFullWarp) {
  return __ballot_sync(mask, predicate);
}

__device__ __forceinline__ bool any(bool predicate, uint32_t mask = kFullWarp) {
  return __any_sync(mask, predicate) != 0;
}

__device__ __forceinline__ bool all(bool predicate, uint32_t mask = kFullWarp) {
  return __all_sync(mask, predicate) != 0;
}

// One redux.sync instruction each.
__device__ __forceinline__ uint32_t reduce_max(uint32_t value, uint32_t mask = kFullWarp) {
  return __reduce_max_sync(mask, value);
}

__device__ __forceinline__ uint32_t reduce_min(uint32_t value, uint32_t mask = kFullWarp) {
  return __reduce_min_sync(mask, value);
}

__device__ __forceinline__ uint32_t reduce_add(uint32_t value, uint32_t mask = kFullWarp) {
  return __reduce_add_sync(mask, value);
}

__device__ __forceinline__ uint32_t reduce_or(uint32_t value, uint32_t mask = kFullWarp) {
  return __reduce_or_sync(mask, value);
}

// The lanes of the mask whose value has the same bits.
template <WarpValue T>
__device__ __forceinline__ uint32_t match_any(T value, uint32_t mask = kFullWarp) {
  return __match_any_sync(mask, to_bits(value));
}

#endif

// The sum of all lanes, for all of them, in an order that is the same every time.
__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += shfl_xor(value, distance);
  return value;
}

}  // namespace tilewright::device
