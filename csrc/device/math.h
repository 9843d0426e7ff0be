// Arithmetic whose rounding matters, and the fast approximations. The approximations take subnormal
// inputs and results for zero on a GPU; the emulator gives the exact value rounded to fp32.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>

#include "core/half.h"
#include "device/qualifiers.h"

namespace tilewright::device {

template <std::integral T>
__device__ __forceinline__ T min(T a, T b) {
  return b < a ? b : a;
}

template <std::integral T>
__device__ __forceinline__ T max(T a, T b) {
  return a < b ? b : a;
}

// Of a number and a NaN: the number.
__device__ __forceinline__ float min(float a, float b) { return ::fminf(a, b); }
__device__ __forceinline__ float max(float a, float b) { return ::fmaxf(a, b); }

struct SineCosine {
  float sine, cosine;
};

// To about one unit in the last place, everywhere.
__device__ __forceinline__ float exp(float a) { return ::expf(a); }
__device__ __forceinline__ float log(float a) { return ::logf(a); }
__device__ __forceinline__ float log1p(float a) { return ::log1pf(a); }
__device__ __forceinline__ float log2(float a) { return ::log2f(a); }
__device__ __forceinline__ float tanh(float a) { return ::tanhf(a); }
__device__ __forceinline__ float erf(float a) { return ::erff(a); }
__device__ __forceinline__ float erfc(float a) { return ::erfcf(a); }

// log(1 + exp(a)); beyond 20, as in torch, a itself, from which float32 can hardly tell it.
__device__ __forceinline__ float softplus(float a) { return a > 20.0f ? a : log1p(exp(a)); }

#if TILEWRIGHT_EMULATED

inline uint32_t fresh(uint32_t value) { return value; }

inline uint32_t float_bits(float value) { return bits_of(value); }
inline float bits_float(uint32_t bits) { return float_of(bits); }

inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }

inline float rcp_approx(float a) { return 1.0f / a; }
inline float sqrt_approx(float a) { return std::sqrt(a); }
inline float rsqrt_approx(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float exp2_approx(float a) { return float(std::exp2(double(a))); }

inline float min_nan(float a, float b) { return a != a || a < b ? a : b; }
inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }

inline SineCosine sincospi(float a) {
  const double angle = std::remainder(double(a), 2.0) * 3.14159265358979323846;
  return {float(std::sin(angle)), float(std::cos(angle))};
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 0xfu;
    uint32_t byte = uint32_t(bytes >> 8 * (choice & 7u)) & 0xffu;
    if (choice & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << 8 * i;
  }
  return result;
}

inline uint32_t mul_hi(uint32_t a, uint32_t b) { return uint32_t(uint64_t{a} * b >> 32); }

inline int count_bits(uint32_t a) { return __builtin_popcount(a); }

inline uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int byte = 0; byte < 32; byte += 8) c += (a >> byte & 0xffu) * (b >> byte & 0xffu);
  return c;
}

#else

// The same value, which the compiler takes for a new one: what was derived from it before is derived anew
// instead of being kept in registers all the way.
__device__ __forceinline__ uint32_t fresh(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// Round to nearest even, and never fused with a neighbour.
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float sqrt_rn(float a) { return __fsqrt_rn(a); }

// One MUFU instruction each: relative error below 2^-22 (exp2: 2^-22 too, for |a| < 126).
__device__ __forceinline__ float rcp_approx(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ __forceinline__ float sqrt_approx(float a) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ __forceinline__ float rsqrt_approx(float a) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ __forceinline__ float exp2_approx(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// Of a number and a NaN: the NaN.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Of pi times a, to two units in the last place; a large a costs no more than a small one.
__device__ __forceinline__ SineCosine sincospi(float a) {
  SineCosine result;
  ::sincospif(a, &result.sine, &result.cosine);
  return result;
}

// Nibble i of the selector picks byte i of the result out of the bytes a0..a3, b0..b3; its top bit
// replicates that byte's sign instead (PTX ISA, "prmt").
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

__device__ __forceinline__ uint32_t mul_hi(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Those that are set.
__device__ __forceinline__ int count_bits(uint32_t a) { return __popc(a); }

// c plus the sum of the products of a's and b's unsigned bytes (DP4A).
__device__ __forceinline__ uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) { return __dp4a(a, b, c); }

#endif

// 2^a by 12 instructions of the FMA and integer units: for kernels that wait for the special functions, of
// which a multiprocessor does 16 a cycle. Relative error below 2^-22, exact where a is whole; results below
// 2^-125.5 are zero, infinities and NaN as of exp2_approx.
__device__ __forceinline__ float exp2_polynomial(float a) {
  // 3 * 2^22 leaves a sum no bits behind the point; with 126 its low bits are the exponent of 2^(whole - 1),
  // of which -126 makes a zero and 129 an infinity. The other half of the range reduction is exact.
  constexpr float kWhole = 12582912.0f + 126.0f;
  const float bounded = min_nan(max_nan(a, -126.0f), 129.0f);
  const float shifted = add_rn(bounded, kWhole);
  const float rest = add_rn(bounded, -add_rn(shifted, -kWhole));
  // 2 * 2^rest for |rest| <= 1/2: the polynomial of degree 5 of least relative error that is exact at 0.
  float power = 0x1.5bba14p-9f;
  power = fma_rn(power, rest, 0x1.3cea88p-6f);
  power = fma_rn(power, rest, 0x1.c6b752p-4f);
  power = fma_rn(power, rest, 0x1.ebf9bcp-2f);
  power = fma_rn(power, rest, 0x1.62e42ap+0f);
  power = fma_rn(power, rest, 2.0f);
  return mul_rn(power, bits_float(float_bits(shifted) << 23));
}

}  // namespace tilewright::device
