// Tiles of a tensor, copied to and from shared memory by the copy engine (PTX ISA, "cp.async.bulk.tensor";
// Hopper).
//
// A tensor map, made on the host and passed to the kernel among its parameters, holds the tensor's address,
// sizes and strides and the box that one copy takes. Elements outside of the tensor arrive as zeros. Rows of
// the box have 128 bytes in shared memory, swizzled: of eight rows (1024 bytes), row r has its pieces of 16
// bytes in the order of their number xor r, which is how device/wgmma.h reads them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/check.h"
#include "core/half.h"
#include "device/mbarrier.h"
#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include "emulator/hopper.h"
#else
#include <cuda.h>  // types alone: nothing of libcuda is linked
#endif

namespace tilewright::device {

inline constexpr int kSwizzleBytes = 128;

// Innermost first. Strides in elements, of the innermost 1, of others multiples of 16 bytes, so large that
// rows of the innermost do not overlap.
struct TensorAxis {
  int64_t size, stride;
  int32_t box;
};

template <class T>
concept TileElement = std::is_same_v<T, fp16> || std::is_same_v<T, bf16>;

#if TILEWRIGHT_EMULATED

using emulator::TensorMap;

template <TileElement T, int kAxes>
TensorMap tensor_map(const void* data, const TensorAxis (&axes)[kAxes]) {
  int64_t sizes[kAxes], strides[kAxes];
  int32_t box[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    sizes[i] = axes[i].size;
    strides[i] = axes[i].stride;
    box[i] = axes[i].box;
  }
  return emulator::encode_tensor_map(data, sizeof(T), kAxes, sizes, strides, box);
}

inline void tma_prefetch_map(const TensorMap& map, Site site = Site::current()) {
  emulator::check_tensor_map(map, site);
}

inline void tma_load(void* shared_destination, const TensorMap& map, Mbarrier& barrier, int32_t x, int32_t y,
                     int32_t z, int32_t w, Site site = Site::current()) {
  emulator::tensor_load(shared_destination, map, {x, y, z, w, 0}, &barrier.state, site);
}

inline void tma_store(const TensorMap& map, const void* shared_source, int32_t x, int32_t y, int32_t z,
                      int32_t w, Site site = Site::current()) {
  emulator::tensor_store(map, shared_source, {x, y, z, w, 0}, site);
}

inline void tma_store_commit() { emulator::tensor_stores_commit(); }

template <int kPending>
void tma_store_wait() {
  emulator::tensor_stores_wait(kPending);
}

inline void fence_async_proxy() { emulator::fence_async_proxy(); }

#else

using TensorMap = CUtensorMap;

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

// From the driver that the runtime has loaded, so that the library needs none to be imported.
inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
    cudaGetLastError();
    fail(ErrorKind::kRuntime, "the CUDA driver offers no cuTensorMapEncodeTiled: it is older than 12.0");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

template <TileElement T, int kAxes>
TensorMap tensor_map(const void* data, const TensorAxis (&axes)[kAxes]) {
  static const EncodeTiled encode = find_encode_tiled();
  constexpr CUtensorMapDataType kType =
      std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t sizes[kAxes], strides[kAxes];
  cuuint32_t box[kAxes], steps[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    sizes[i] = cuuint64_t(axes[i].size);
    strides[i] = cuuint64_t(axes[i].stride) * sizeof(T);
    box[i] = cuuint32_t(axes[i].box);
    steps[i] = 1;
  }
  TensorMap map;
  const CUresult status = encode(&map, kType, kAxes, const_cast<void*>(data), sizes, strides + 1, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail(ErrorKind::kRuntime, "cuTensorMapEncodeTiled: error ", int(status));
  return map;
}

__device__ __forceinline__ void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One thread copies the box at these coordinates, innermost first; the barrier counts its bytes.
__device__ __forceinline__ void tma_load(void* shared_destination, const TensorMap& map, Mbarrier& barrier,
                                         int32_t x, int32_t y, int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared_destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// One thread stores the box at these coordinates; what lies outside of the tensor is left out. Its stores run
// beside it, in groups: commit closes a group, wait<N> returns when all but its N youngest groups have read
// shared memory. A thread waits for all of them before it exits.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared_source, int32_t x,
                                          int32_t y, int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_source)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// What this thread wrote to shared memory, or has seen of it behind a barrier, copies of tiles and wgmma that
// begin behind this, or behind a barrier that follows it, see as well.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace tilewright::device
