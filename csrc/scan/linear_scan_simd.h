// Vectors of real and complex numbers for linear scans: conversions from memory, the arithmetic of the
// recurrence, and moves between lanes. Scalars have the same functions, so that a formula is written once.
#pragma once

#include "core/half.h"
#include "core/simd.h"

namespace tilewright::TW_ISA {

struct Cx64 {
  float re, im;
};
struct Cx128 {
  double re, im;
};
// kLanes complex numbers.
struct CxLanes {
  Float re, im;
};

template <class C>
concept IsComplex = requires(C c) { c.re, c.im; };

// What a stored T is computed in, alone and kLanes at a time. float64 and complex128 have no vectors.
template <class T>
struct Numbers {
  using Scalar = float;
  using Lanes = Float;
  static constexpr bool kHasLanes = true;
};
template <>
struct Numbers<double> {
  using Scalar = double;
  static constexpr bool kHasLanes = false;
};
template <>
struct Numbers<Cx64> {
  using Scalar = Cx64;
  using Lanes = CxLanes;
  static constexpr bool kHasLanes = true;
};
template <>
struct Numbers<Cx128> {
  using Scalar = Cx128;
  static constexpr bool kHasLanes = false;
};

// ---- arithmetic ----

// Rounded like the vectors' fma: once where there is a fused unit, twice elsewhere.
static inline float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
static inline double fma(double a, double b, double c) { return a * b + c; }

template <class R>
static inline R plus(R a, R b) {
  return a + b;
}
template <class R>
static inline R times(R a, R b) {
  return a * b;
}
template <class R>
static inline R conjugate(R a) {
  return a;
}
// a b + c
template <class R>
static inline R times_plus(R a, R b, R c) {
  return fma(a, b, c);
}

template <IsComplex C>
static inline C plus(C a, C b) {
  return {a.re + b.re, a.im + b.im};
}
template <IsComplex C>
static inline C times(C a, C b) {
  return {fma(a.re, b.re, -(a.im * b.im)), fma(a.re, b.im, a.im * b.re)};
}
template <IsComplex C>
static inline C conjugate(C a) {
  return {a.re, -a.im};
}
template <IsComplex C>
static inline C times_plus(C a, C b, C c) {
  return {fma(a.re, b.re, fma(-a.im, b.im, c.re)), fma(a.re, b.im, fma(a.im, b.re, c.im))};
}

static inline bool is_nan(float x) { return x != x; }
static inline bool is_nan(Cx64 x) { return x.re != x.re || x.im != x.im; }
static inline bool is_finite(float x) { return x - x == 0; }
static inline bool is_finite(Cx64 x) { return is_finite(x.re) && is_finite(x.im); }

// ---- memory ----

static inline float to_scalar(float x) { return x; }
static inline float to_scalar(bf16 x) { return widen(x); }
static inline float to_scalar(fp16 x) { return widen(x); }
static inline double to_scalar(double x) { return x; }
static inline Cx64 to_scalar(Cx64 x) { return x; }
static inline Cx128 to_scalar(Cx128 x) { return x; }

static inline void store_scalar(float* p, float x) { *p = x; }
static inline void store_scalar(bf16* p, float x) { *p = narrow_bf16(x); }
static inline void store_scalar(fp16* p, float x) { *p = narrow_fp16(x); }
static inline void store_scalar(double* p, double x) { *p = x; }
static inline void store_scalar(Cx64* p, Cx64 x) { *p = x; }
static inline void store_scalar(Cx128* p, Cx128 x) { *p = x; }

#if defined(__AVX512F__)
static inline CxLanes deinterleave(Float low, Float high) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}
static inline void interleave(CxLanes x, Float& low, Float& high) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  low = _mm512_permutex2var_ps(x.re, first, x.im);
  high = _mm512_permutex2var_ps(x.re, second, x.im);
}
#elif defined(__AVX2__)
static inline Float swap_middle_pairs(Float x) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}
static inline CxLanes deinterleave(Float low, Float high) {
  return {swap_middle_pairs(_mm256_shuffle_ps(low, high, 0x88)),
          swap_middle_pairs(_mm256_shuffle_ps(low, high, 0xdd))};
}
static inline void interleave(CxLanes x, Float& low, Float& high) {
  const Float first = _mm256_unpacklo_ps(x.re, x.im), second = _mm256_unpackhi_ps(x.re, x.im);
  low = _mm256_permute2f128_ps(first, second, 0x20);
  high = _mm256_permute2f128_ps(first, second, 0x31);
}
#else
static inline CxLanes deinterleave(Float low, Float high) {
  return {Float{low[0], low[2], high[0], high[2]}, Float{low[1], low[3], high[1], high[3]}};
}
static inline void interleave(CxLanes x, Float& low, Float& high) {
  low = Float{x.re[0], x.im[0], x.re[1], x.im[1]};
  high = Float{x.re[2], x.im[2], x.re[3], x.im[3]};
}
#endif

static inline CxLanes load(const Cx64* p) {
  const float* floats = &p->re;
  return deinterleave(load(floats), load(floats + kLanes));
}
static inline void store(Cx64* p, CxLanes x) {
  Float low, high;
  interleave(x, low, high);
  store(&p->re, low);
  store(&p->re + kLanes, high);
}
static inline void stream(Cx64* p, CxLanes x) {
  Float low, high;
  interleave(x, low, high);
  stream(&p->re, low);
  stream(&p->re + kLanes, high);
}
static inline void stream(bf16* p, Float x) { store(p, x); }
static inline void stream(fp16* p, Float x) { store(p, x); }

// ---- lanes ----

static inline CxLanes splat(Cx64 x) { return {splat(x.re), splat(x.im)}; }

static inline float lane(Float x, int i) { return x[i]; }
static inline Cx64 lane(CxLanes x, int i) { return {x.re[i], x.im[i]}; }

#if defined(__AVX512F__)

// Moves each lane kBy places toward the end of the sweep; the first kBy lanes are taken from `fill`, whose
// lanes are all the same.
template <bool kDescending, int kBy>
static inline Float shift(Float x, Float fill) {
  const __m512i from = _mm512_castps_si512(x), filled = _mm512_castps_si512(fill);
  return _mm512_castsi512_ps(kDescending ? _mm512_alignr_epi32(filled, from, kBy)
                                         : _mm512_alignr_epi32(from, filled, kLanes - kBy));
}
// The lane that the sweep visits last, in all lanes.
template <bool kDescending>
static inline Float spread_last(Float x) {
  return _mm512_permutexvar_ps(_mm512_set1_epi32(kDescending ? 0 : kLanes - 1), x);
}
static inline bool all_finite(Float x) { return _mm512_fpclass_ps_mask(x, 0x99) == 0; }

#elif defined(__AVX2__)

template <bool kDescending, int kBy>
static inline Float shift(Float x, Float fill) {
  constexpr int kFrom = kDescending ? kBy : kLanes - kBy;
  constexpr int kFilled = kDescending ? 0xff & ~(0xff >> kBy) : (1 << kBy) - 1;
  const __m256i ramp = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i source = _mm256_add_epi32(ramp, _mm256_set1_epi32(kFrom));  // the permute takes them modulo 8
  return _mm256_blend_ps(_mm256_permutevar8x32_ps(x, source), fill, kFilled);
}
template <bool kDescending>
static inline Float spread_last(Float x) {
  return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(kDescending ? 0 : kLanes - 1));
}
static inline bool all_finite(Float x) {
  const Float zero = x - x;
  return _mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q)) == 0;
}

#else

template <bool kDescending, int kBy>
static inline Float shift(Float x, Float f) {
  if constexpr (kDescending) {
    return kBy == 1 ? Float{x[1], x[2], x[3], f[0]} : Float{x[2], x[3], f[0], f[0]};
  } else {
    return kBy == 1 ? Float{f[0], x[0], x[1], x[2]} : Float{f[0], f[0], x[0], x[1]};
  }
}
template <bool kDescending>
static inline Float spread_last(Float x) {
  return splat(x[kDescending ? 0 : kLanes - 1]);
}
static inline bool all_finite(Float x) {
  const Int finite = x - x == splat(0.0f);
  return (finite[0] & finite[1] & finite[2] & finite[3]) != 0;
}

#endif

template <bool kDescending, int kBy>
static inline CxLanes shift(CxLanes x, CxLanes fill) {
  return {shift<kDescending, kBy>(x.re, fill.re), shift<kDescending, kBy>(x.im, fill.im)};
}
template <bool kDescending>
static inline CxLanes spread_last(CxLanes x) {
  return {spread_last<kDescending>(x.re), spread_last<kDescending>(x.im)};
}
static inline bool all_finite(CxLanes x) { return all_finite(x.re) && all_finite(x.im); }

static inline void set_one(Float& x) { x = splat(1.0f); }
static inline void set_one(CxLanes& x) { x = {splat(1.0f), splat(0.0f)}; }

// Composes lane i with the lanes the sweep visits before it: then s -> a[i] s + b[i] is what they do
// together.
template <bool kDescending, int kBy, class Lanes>
static inline void compose_lanes(Lanes& a, Lanes& b, Lanes one) {
  if constexpr (kBy < kLanes) {
    b = times_plus(a, shift<kDescending, kBy>(b, Lanes{}), b);
    a = times(a, shift<kDescending, kBy>(a, one));
    compose_lanes<kDescending, 2 * kBy>(a, b, one);
  }
}

}  // namespace tilewright::TW_ISA
