// Elementary functions of Float vectors: exp2, exp, log1p of what lies in [0, 1], and what follows from them.
// Subnormal results become zero below AVX-512; NaN gives NaN, and infinities their limits. The polynomials
// are minimax in relative error over their interval.
#pragma once

#include "core/simd.h"

namespace tilewright::TW_ISA {

constexpr float kLog2E = 1.442695041f;
constexpr float kLog2ETail = 1.925963033e-8f;  // log2(e) - kLog2E
constexpr float kLn2 = 0.6931471806f;

#if defined(__AVX512F__)

static inline Float min(Float a, Float b) { return _mm512_min_ps(a, b); }  // the second where either is NaN
static inline Float select_above(Float x, Float bound, Float yes, Float no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), yes);
}

#elif defined(__AVX2__)

static inline Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
static inline Float select_above(Float x, Float bound, Float yes, Float no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_GT_OQ));
}
static inline Float floor(Float x) { return _mm256_floor_ps(x); }
static inline Int truncate(Float x) { return (Int)_mm256_cvttps_epi32(x); }

#else

static inline Float min(Float a, Float b) { return a < b ? a : b; }
static inline Float select_above(Float x, Float bound, Float yes, Float no) { return x > bound ? yes : no; }
static inline Int truncate(Float x) { return __builtin_convertvector(x, Int); }
// For |x| < 2^31.
static inline Float floor(Float x) {
  const Float whole = __builtin_convertvector(truncate(x), Float);
  return whole > x ? whole - 1.0f : whole;
}

#endif

// 2^x for x in [0, 1), exactly 1 at 0; relative error 8.3e-8 and the rounding of five operations.
static inline Float exp2_fraction(Float x) {
  Float p = fma(splat(0.00186713057f), x, splat(0.009017029253f));
  p = fma(p, x, splat(0.05579991388f));
  p = fma(p, x, splat(0.2401644499f));
  p = fma(p, x, splat(0.6931513118f));
  return fma(p, x, splat(1.0f));
}

static inline Float exp2(Float x) {
#if defined(__AVX512F__)
  // The distance to the floor is 0 at an infinity, and scalef takes the floor itself.
  const Float fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(fraction), x);
#else
  x = max(splat(-127.0f), min(splat(128.0f), x));  // in this order a NaN stays
  const Float whole = floor(x);
  const Int scale = (truncate(whole) + 127) << 23;  // 2^-127 is 0, 2^128 infinity
  const Float power = from_bits(scale);
  return exp2_fraction(x - whole) * power;
#endif
}

// e^x; the product x * log2(e) is carried in two parts, so that the error does not grow with |x|.
static inline Float exp(Float x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));
  const Float high = x * kLog2E;
#if defined(__AVX2__)
  const Float low = fma(x, splat(kLog2E), -high) + x * kLog2ETail;
#else
  const Float x_high = from_bits(bits(x) & ~0xfff);  // products of 12-bit halves are exact
  const Float c_high = splat(1.44238281f), c_low = splat(kLog2E) - c_high;
  const Float low = ((x_high * c_high - high) + (x - x_high) * c_high) + x * c_low + x * kLog2ETail;
#endif
  const Float power = exp2(high);
  // An infinity plus a correction of the other sign would be NaN.
  return select_above(power, splat(3.402823466e38f), power, fma(power, low * kLn2, power));
}

// log(1 + x) for x in [0, 1], relative error 7.5e-10 and rounding.
static inline Float log1p_unit(Float x) {
  Float p = fma(splat(0.002030234878f), x, splat(-0.01340749768f));
  p = fma(p, x, splat(0.04147815791f));
  p = fma(p, x, splat(-0.08244167002f));
  p = fma(p, x, splat(0.1241843006f));
  p = fma(p, x, splat(-0.1610568876f));
  p = fma(p, x, splat(0.1989074692f));
  p = fma(p, x, splat(-0.2498727073f));
  p = fma(p, x, splat(0.3333255961f));
  p = fma(p, x, splat(-0.4999998143f));
  p = fma(p, x, splat(0.9999999993f));
  return p * x;
}

// log(1 + e^x), and x itself above 20, as torch's softplus.
static inline Float softplus(Float x) {
  const Float small = log1p_unit(exp(-abs(x)));
  return select_above(x, splat(20.0f), x, select_above(x, splat(0.0f), x + small, small));
}

static inline Float sigmoid(Float x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

static inline Float tanh(Float x) {
  const Float size = abs(x);
  const Float e = exp(size * -2.0f);
  const Float large = (1.0f - e) / (1.0f + e);
  // Below 1/16, x - x^3/3 + 2 x^5/15 - 17 x^7/315: the quotient would cancel.
  const Float square = x * x;
  Float series = fma(square, splat(-17.0f / 315), splat(2.0f / 15));
  series = fma(series, square, splat(-1.0f / 3));
  series = fma(series * square, size, size);
  const Float result = select_above(size, splat(0.0625f), large, series);
  return from_bits(bits(result) | (bits(x) & int32_t(0x80000000)));
}

// Phi(x) = erfc(-x / sqrt(2)) / 2, relative error 1.6e-8 and that of the exponential: with t = 1 / (1 + 0.21
// |x|) the tail is exp(-x^2 / 2) t times a polynomial of t.
static inline Float normal_cdf(Float x) {
  const Float size = abs(x);
  const Float t = splat(1.0f) / fma(size, splat(0.21f), splat(1.0f));
  Float p = fma(splat(-0.07165625728f), t, splat(0.2835884094f));
  p = fma(p, t, splat(-0.3302530944f));
  p = fma(p, t, splat(0.3494006693f));
  p = fma(p, t, splat(-0.0939249918f));
  p = fma(p, t, splat(0.1248726398f));
  p = fma(p, t, splat(0.06919219345f));
  p = fma(p, t, splat(0.08506885171f));
  p = fma(p, t, splat(0.08371157944f));
  const Float tail = exp(x * x * -0.5f) * t * p;
  return select_above(x, splat(0.0f), 1.0f - tail, tail);
}

}  // namespace tilewright::TW_ISA
