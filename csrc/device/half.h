// Conversions between fp32 and the storage types of core/half.h. Widening is exact; narrowing rounds
// to nearest even, overflows to infinity and keeps a NaN a NaN (not its payload).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/qualifiers.h"

namespace tilewright::device {

template <class T>
concept Element = std::is_same_v<T, float> || std::is_same_v<T, fp16> || std::is_same_v<T, bf16>;

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(bf16 value) { return bits_float(uint32_t{value.bits} << 16); }

__device__ __forceinline__ float to_float(fp16 value) {
#if TILEWRIGHT_EMULATED
  return widen(value);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

template <Element T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
#if TILEWRIGHT_EMULATED
    if constexpr (std::is_same_v<T, bf16>)
      return narrow_bf16(value);
    else
      return narrow_fp16(value);
#else
    T result;
    if constexpr (std::is_same_v<T, bf16>)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#endif
  }
}

template <Element T>
__device__ __forceinline__ Vector<float, 2> to_float2(Vector<T, 2> pair) {
  return {to_float(pair[0]), to_float(pair[1])};
}

// One packing instruction for two 16-bit results.
template <Element T>
__device__ __forceinline__ Vector<T, 2> from_float2(Vector<float, 2> pair) {
#if !TILEWRIGHT_EMULATED
  if constexpr (!std::is_same_v<T, float>) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, bf16>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair[1]), "f"(pair[0]));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair[1]), "f"(pair[0]));
    }
    Vector<T, 2> result;
    memcpy(&result, &packed, sizeof result);
    return result;
  }
#endif
  return {from_float<T>(pair[0]), from_float<T>(pair[1])};
}

}  // namespace tilewright::device
