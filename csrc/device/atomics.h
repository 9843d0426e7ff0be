// Atomics on global and shared memory, relaxed: they order nothing but themselves. Each returns the
// value it found.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/qualifiers.h"

#if TILEWRIGHT_EMULATED
#include <atomic>

#include "emulator/runtime.h"
#endif

namespace tilewright::device {

template <class T, class... Allowed>
concept OneOf = (std::is_same_v<T, Allowed> || ...);

template <class T>
concept AtomicSummand = OneOf<T, float, double, int32_t, uint32_t, uint64_t>;

template <class T>
concept AtomicOrdered = OneOf<T, int32_t, uint32_t>;

template <class T>
concept AtomicWord = OneOf<T, uint32_t, uint64_t>;

#if TILEWRIGHT_EMULATED

using emulator::Site;

// Replaces *address by next(*address) in one step.
template <class T, class Next>
T atomic_update(T* address, Next next, Site site) {
  emulator::check_aligned(address, sizeof(T), site);
  std::atomic_ref<T> value(*address);
  T found = value.load(std::memory_order_relaxed);
  while (!value.compare_exchange_weak(found, next(found), std::memory_order_relaxed)) {
  }
  return found;
}

template <AtomicSummand T>
T atomic_add(T* address, std::type_identity_t<T> value, Site site = Site::current()) {
  return atomic_update(address, [value](T found) { return T(found + value); }, site);
}

template <AtomicOrdered T>
T atomic_max(T* address, std::type_identity_t<T> value, Site site = Site::current()) {
  return atomic_update(address, [value](T found) { return found < value ? value : found; }, site);
}

template <AtomicOrdered T>
T atomic_min(T* address, std::type_identity_t<T> value, Site site = Site::current()) {
  return atomic_update(address, [value](T found) { return value < found ? value : found; }, site);
}

template <AtomicWord T>
T atomic_exchange(T* address, std::type_identity_t<T> value, Site site = Site::current()) {
  return atomic_update(address, [value](T) { return value; }, site);
}

template <AtomicWord T>
T atomic_cas(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
             Site site = Site::current()) {
  return atomic_update(address, [=](T found) { return found == expected ? value : found; }, site);
}

#else

// CUDA overloads its 64-bit atomics on unsigned long long, which uint64_t is not.
template <class T>
using AtomicType = std::conditional_t<std::is_same_v<T, uint64_t>, unsigned long long, T>;

template <class T>
__device__ __forceinline__ AtomicType<T>* atomic_pointer(T* address) {
  return reinterpret_cast<AtomicType<T>*>(address);
}

template <AtomicSummand T>
__device__ __forceinline__ T atomic_add(T* address, std::type_identity_t<T> value) {
  return T(atomicAdd(atomic_pointer(address), AtomicType<T>(value)));
}

template <AtomicOrdered T>
__device__ __forceinline__ T atomic_max(T* address, std::type_identity_t<T> value) {
  return atomicMax(address, value);
}

template <AtomicOrdered T>
__device__ __forceinline__ T atomic_min(T* address, std::type_identity_t<T> value) {
  return atomicMin(address, value);
}

template <AtomicWord T>
__device__ __forceinline__ T atomic_exchange(T* address, std::type_identity_t<T> value) {
  return T(atomicExch(atomic_pointer(address), AtomicType<T>(value)));
}

// Stores `value` only where it finds `expected`.
template <AtomicWord T>
__device__ __forceinline__ T atomic_cas(T* address, std::type_identity_t<T> expected,
                                        std::type_identity_t<T> value) {
  return T(atomicCAS(atomic_pointer(address), AtomicType<T>(expected), AtomicType<T>(value)));
}

#endif

}  // namespace tilewright::device
