// How the CPU kernels of scores and masks read a weight: in short pieces of its rows, which stay in the L1
// cache. Included by instruction-set files only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/integers.h"
#include "core/simd.h"
#include "core/tensor.h"

namespace tilewright::TW_ISA {

constexpr int64_t kSegment = 1024;

// What a dtype is reckoned in, and the integers that order its magnitudes.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class R>
using Key = std::conditional_t<std::is_same_v<R, double>, int64_t, int32_t>;

template <class R>
constexpr Key<R> kInfinityKey = sizeof(R) == 8 ? Key<R>(0x7ffull << 52) : Key<R>(0x7f800000);

static inline int32_t key_of(float x) { return int32_t(bits_of(x) & 0x7fffffffu); }
static inline int64_t key_of(double x) {
  int64_t key;
  std::memcpy(&key, &x, sizeof key);
  return key & INT64_MAX;
}

// At most kSegment elements, `step` apart: where they are if they can be read there, or in the buffer.
template <class T>
static inline const Real<T>* read_segment(const T* from, int64_t step, int64_t count, Real<T>* buffer) {
  if constexpr (std::is_same_v<T, Real<T>>) {
    if (step == 1) return from;
  }
  int64_t i = 0;
  if constexpr (std::is_same_v<Real<T>, float>) {
    for (; step == 1 && i + kLanes <= count; i += kLanes) store(buffer + i, load(from + i));
  }
  for (; i < count; ++i) buffer[i] = widen(from[i * step]);
  return buffer;
}

// Calls body(T{}) for the type of the dtype.
template <class Body>
static inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(bf16{});
    case DType::kFloat16:
      return body(fp16{});
    default:
      return body(double{});
  }
}

// Several threads may find one.
static inline void report_invalid(int32_t* invalid) { __atomic_store_n(invalid, 1, __ATOMIC_RELAXED); }

}  // namespace tilewright::TW_ISA
