// What the sparse linear layers share: matrices with any strides, and the function applied to a result.
#pragma once

#include <cstdint>

namespace tilewright::prune {

// A tensor (rows, columns); strides in elements, any.
struct Matrix {
  void* data;  // null: absent
  int64_t row, column;
};

// Applied to x W^T + bias. kGelu is x Phi(x); kGeluTanh its approximation by a tanh.
enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

}  // namespace tilewright::prune
