// What the kernels of a decode step read: numbers and indices whose dtypes are known at run time. They are
// the same for all threads, so the branches are never split.
#pragma once

#include "core/tensor.h"
#include "device/half.h"

namespace tilewright::scan {

__device__ __forceinline__ float read(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  return dtype == DType::kBFloat16 ? device::to_float(static_cast<const bf16*>(data)[index])
                                   : device::to_float(static_cast<const fp16*>(data)[index]);
}

__device__ __forceinline__ int64_t integer_at(const void* data, int64_t index, bool is_64) {
  return is_64 ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
}

}  // namespace tilewright::scan
