// The function applied to a linear layer's result, in the epilogue of a kernel.
#pragma once

#include "device/math.h"
#include "device/qualifiers.h"
#include "prune/linear.h"

namespace tilewright::prune {

// 1 / (1 + exp(-x)): exactly to fp32's rounding, or to about 2^-21, which a 16-bit result does not show.
template <bool kExact>
__device__ __forceinline__ float logistic(float x) {
  if constexpr (kExact) return device::div_rn(1.0f, 1.0f + device::exp(-x));
  return device::rcp_approx(1.0f + device::exp2_approx(-1.442695041f * x));
}

template <bool kExact>
__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case Activation::kGelu:
      if constexpr (kExact) return x * (0.5f * device::erfc(-0.7071067812f * x));
      return 0.5f * x * (1.0f + device::erf(0.7071067812f * x));
    case Activation::kGeluTanh:  // 0.5 (1 + tanh u) is the logistic function of 2 u
      return x * logistic<kExact>(x * device::fma_rn(0.07135481627f * x, x, 1.595769122f));
    case Activation::kSilu:
      return x * logistic<kExact>(x);
  }
  return x;
}

}  // namespace tilewright::prune
