// The host side of a kernel: launch, device properties, copies. Nothing here allocates or synchronises.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "core/check.h"
#include "core/stream.h"
#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include "emulator/runtime.h"
#else
#include <atomic>
#endif

namespace tilewright::device {

inline constexpr size_t kMaxParamsBytes = 32764;

// A kernel is `__global__ void name(const __grid_constant__ Params params)`.
template <class Params>
using Kernel = void (*)(Params);

#if TILEWRIGHT_EMULATED

template <class Params>
void launch(Kernel<Params> kernel, dim3 grid, dim3 block, size_t shared_bytes, Stream,
            const std::type_identity_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParamsBytes);
  const auto run_thread = [](const emulator::Grid& launched) {
    reinterpret_cast<Kernel<Params>>(launched.kernel)(*static_cast<const Params*>(launched.params));
  };
  emulator::run({grid, block, shared_bytes, run_thread, reinterpret_cast<void*>(kernel), &params});
}

inline int multiprocessor_count(int) { return emulator::multiprocessors(); }

inline int compute_capability(int) { return emulator::compute_capability(); }

inline size_t shared_memory_limit(int) { return emulator::kMaxSharedBytes; }

template <class Params>
bool is_native(Kernel<Params>, int capability) {
  return capability == emulator::compute_capability();
}

template <class Params>
int resident_blocks(Kernel<Params>, int, size_t) {
  return 2;
}

inline void copy_to_device(void* destination, const void* source, size_t bytes, Stream) {
  if (bytes != 0) std::memcpy(destination, source, bytes);
}

inline void fill_zero(void* destination, size_t bytes, Stream) {
  if (bytes != 0) std::memset(destination, 0, bytes);
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next library to ask would be blamed for it
  fail(ErrorKind::kRuntime, what, ": ", cudaGetErrorString(status));
}

// What a thread block can have when it asks for it, in bytes.
inline size_t shared_memory_limit(int device) {
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory of the device");
  return size_t(most);
}

// Loads the kernel's code, which only the relaxed mode permits within a graph capture.
template <class Params>
cudaFuncAttributes load_code(Kernel<Params> kernel) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  check_cuda(loaded, "loading a kernel");
  return attributes;
}

inline bool is_captured(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "capture status");
  return status != cudaStreamCaptureStatusNone;
}

// Shared memory beyond 48 KiB has to be asked for, kernel by kernel. It is always all that the device has:
// launches of one kernel may need different amounts, from several threads at once.
template <class Params>
void allow_shared_memory(Kernel<Params> kernel, size_t shared_bytes) {
  constexpr size_t kGrantedUnasked = 48 * 1024;
  if (shared_bytes <= kGrantedUnasked) return;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  const size_t most = shared_memory_limit(device);
  if (shared_bytes > most) {
    fail(ErrorKind::kRuntime, "this needs ", shared_bytes,
         " bytes of shared memory in a thread block, the device has ", most);
  }
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)),
             "shared memory of a kernel");
}

template <class Params>
void launch(Kernel<Params> kernel, dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            const std::type_identity_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParamsBytes);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (is_captured(stream)) load_code(kernel);  // else the launch itself does
  allow_shared_memory(kernel, shared_bytes);
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes,
                              static_cast<cudaStream_t>(stream)),
             "kernel launch");
}

inline int multiprocessor_count(int device) {
  constexpr int kRemembered = 64;
  static std::atomic<int> counts[kRemembered];
  const bool remembered = device >= 0 && device < kRemembered;
  int count = remembered ? counts[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "multiprocessor count");
    if (remembered) counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// 80, 90, ...
inline int compute_capability(int device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
}

// Whether the current device is of this capability and the kernel was compiled for it: code that the driver
// made of an older architecture's PTX is not.
template <class Params>
bool is_native(Kernel<Params> kernel, int capability) {
  const cudaFuncAttributes attributes = load_code(kernel);
  return attributes.binaryVersion == capability && attributes.ptxVersion == capability;
}

// Blocks of the kernel that one multiprocessor of the current device holds at once.
template <class Params>
int resident_blocks(Kernel<Params> kernel, int threads, size_t shared_bytes) {
  load_code(kernel);
  allow_shared_memory(kernel, shared_bytes);
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel),
                                                           threads, shared_bytes),
             "occupancy of a kernel");
  return blocks;
}

// From pageable memory the source is free again on return. From pinned memory, and in a captured graph,
// it is read when the copy runs, so it has to live until then.
inline void copy_to_device(void* destination, const void* source, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check_cuda(
      cudaMemcpyAsync(destination, source, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)),
      "copy to the device");
}

inline void fill_zero(void* destination, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check_cuda(cudaMemsetAsync(destination, 0, bytes, static_cast<cudaStream_t>(stream)), "fill with zero");
}

// Makes a device current, and on the way out again the one it found.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&found_), "current device");
    switched_ = device != found_;
    if (switched_) check_cuda(cudaSetDevice(device), "switch of device");
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(found_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int found_ = 0;
  bool switched_ = false;
};

#endif

}  // namespace tilewright::device
