// The functions applied to results, one float64 at a time: what vectors and GPUs are held against.
#pragma once

#include <cmath>

#include "prune/linear.h"

namespace tilewright::TW_ISA {
namespace {

inline double activate(prune::Activation activation, double x) {
  using prune::Activation;
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-0.70710678118654752440 * x);
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
  }
  return x;
}

}  // namespace
}  // namespace tilewright::TW_ISA
