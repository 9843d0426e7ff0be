// How the CUDA kernels of scores and masks read a weight.
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "core/tensor.h"
#include "device/half.h"
#include "device/math.h"
#include "device/qualifiers.h"
#include "prune/linear.h"

namespace tilewright::prune {

constexpr uint32_t kInfinityKey = 0x7f800000u;

// Orders magnitudes, NaN last.
__device__ __forceinline__ uint32_t key_of(float x) { return device::float_bits(x) & 0x7fffffffu; }

template <class T>
__device__ __forceinline__ float read(const Matrix& m, int64_t row, int64_t column) {
  return device::to_float(static_cast<const T*>(m.data)[row * m.row + column * m.column]);
}

// Calls body(T{}) for the type of the dtype.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(bf16{});
    case DType::kFloat16:
      return body(fp16{});
    default:
      return body(float{});
  }
}

}  // namespace tilewright::prune
