// What matrix products on a CPU are made of: the units that operands are multiplied in, results narrowed to
// their dtype, scratch memory.
//
// A unit is what one lane of a vector holds in a product: a float, or (Pairs) two bf16 neighbours along the
// axis that is summed over, which one instruction multiplies and adds. Either is moved as a float.
#pragma once

#include "core/simd.h"

namespace tilewright::TW_ISA {
namespace {

struct Singles {
  static constexpr int kPerUnit = 1;
  static Float step(Float a, Float b, Float sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPerUnit = 2;
  static Float step(Float a, Float b, Float sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// The units in which tensors of T are multiplied.
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

inline void narrow_to(double* target, double value) { *target = value; }
inline void narrow_to(float* target, float value) { *target = value; }
inline void narrow_to(bf16* target, float value) { *target = narrow_bf16(value); }
inline void narrow_to(fp16* target, float value) { *target = narrow_fp16(value); }

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
