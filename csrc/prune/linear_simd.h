// What the sparse linear layers' CPU kernels share: rows of matrices as words of 32 bits (a unit each),
// activations, rows of results.
#pragma once

#include "core/integers.h"
#include "core/simd.h"
#include "core/simd_math.h"
#include "core/simd_transpose.h"
#include "core/simd_units.h"
#include "core/threads.h"
#include "prune/linear.h"

namespace tilewright::TW_ISA {
namespace {

using prune::Activation;
using prune::Matrix;

template <class T>
T* element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.row + column * m.column;
}

// Asks for memory that is needed soon; it may reach past the end of what is there.
template <class T>
void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// Elements from[0], from[stride], ... as words, with zeros up to `words` of them.
template <class Units, class T>
void read_words(float* to, const T* from, int64_t stride, int64_t count, int64_t words) {
  int64_t i = 0;
  if constexpr (Units::kPerUnit == 1) {
    if (stride == 1) {
      for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    }
    for (; i < count; ++i) to[i] = widen(from[i * stride]);
    for (; i < words; ++i) to[i] = 0.0f;
  } else {
    T* halves = reinterpret_cast<T*>(to);
    if (stride == 1) {
      std::memcpy(halves, from, size_t(count) * sizeof(T));
      i = count;
    }
    for (; i < count; ++i) halves[i] = from[i * stride];
    if (i < 2 * words) std::memset(halves + i, 0, size_t(2 * words - i) * sizeof(T));
  }
}

// Words of two rows' elements: low[0] | high[0], low[1] | high[1], ...
template <class T>
void pair_rows(float* to, const T* low, const T* high, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(to + i, from_bits(load_halves(&low[i].bits) | load_halves(&high[i].bits) << 16));
  for (; i < count; ++i) {
    const uint16_t halves[2] = {low[i].bits, high[i].bits};
    std::memcpy(to + i, halves, sizeof halves);
  }
}

inline Float activate(Activation activation, Float x) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return max(splat(0.0f), x);  // in this order a NaN stays
    case Activation::kGelu:
      return x * normal_cdf(x);
    case Activation::kGeluTanh: {
      const Float inner = fma(x * x * x, splat(0.044715f), x) * 0.7978845608f;
      return x * sigmoid(inner + inner);
    }
    case Activation::kSilu:
      return x * sigmoid(x);
  }
  return x;
}

// Floats into a row of a matrix; whole vectors are read.
template <class T>
void write_row(T* to, int64_t stride, const float* from, int64_t count) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) store_fast(to + i, load(from + i));
  }
  for (; i < count; ++i) narrow_to(to + i * stride, from[i]);
}

}  // namespace
}  // namespace tilewright::TW_ISA
