// The 16-bit floats as storage types, and their exact conversions in plain C++. Kernels on a GPU
// convert through device/half.h, vector code through core/simd.h; this file is what both must equal.
#pragma once

#include <cstdint>
#include <cstring>

namespace tilewright {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// `static inline` throughout: these functions are compiled under several instruction sets, and a
// shared weak symbol would let the widest one run on a machine that lacks it.
static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(bf16 value) { return float_of(uint32_t{value.bits} << 16); }

static inline float widen(fp16 value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | magnitude << 13);  // inf, NaN
  // 2^112 moves the exponent from fp16's bias to fp32's; the product is exact, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

// Round to nearest, ties to even; a NaN stays a NaN.
static inline bf16 narrow_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

static inline fp16 narrow_fp16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to inf
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 leaves that multiple, rounded to
    // nearest even, in the low mantissa bits.
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return {uint16_t(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13)};
}

}  // namespace tilewright
