// What the sparse linear layers' CPU kernels share: the units that operands are multiplied in, rows of
// matrices as units, activations, scratch memory.
#pragma once

#include "core/integers.h"
#include "core/simd.h"
#include "core/simd_math.h"
#include "core/simd_transpose.h"
#include "core/threads.h"
#include "prune/linear.h"

namespace tilewright::TW_ISA {
namespace {

using prune::Activation;
using prune::Matrix;

// A word of 32 bits holds an operand's next elements along the sum: one float, or two bf16 where the CPU
// multiplies them in pairs.
struct Singles {
  static constexpr int kPerWord = 1;
  static Float step(Float a, Float b, Float sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPerWord = 2;
  static Float step(Float a, Float b, Float sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

template <class T>
struct UnitsOf {
  using Type = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct UnitsOf<bf16> {
  using Type = Pairs;
};
#endif

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline void narrow_to(float* target, float value) { *target = value; }
inline void narrow_to(bf16* target, float value) { *target = narrow_bf16(value); }
inline void narrow_to(fp16* target, float value) { *target = narrow_fp16(value); }

template <class T>
T* element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.row + column * m.column;
}

// Elements from[0], from[stride], ... as words, with zeros up to `words` of them.
template <class Units, class T>
void read_words(float* to, const T* from, int64_t stride, int64_t count, int64_t words) {
  int64_t i = 0;
  if constexpr (Units::kPerWord == 1) {
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

struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const result = reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return result;
  }
};

}  // namespace
}  // namespace tilewright::TW_ISA
