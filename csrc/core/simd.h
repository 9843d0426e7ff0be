// Vectors of kLanes floats for the level being compiled. Arithmetic uses the operators that GCC and Clang
// give native vector types; what has no operator is a function here. Included by instruction-set files only,
// and everything is `static inline` in the level's namespace, so nothing compiled here can leak to another
// level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tilewright::TW_ISA {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Float = __m512;
typedef int32_t Int __attribute__((vector_size(64)));

static inline Float splat(float x) { return _mm512_set1_ps(x); }
static inline Float load(const float* p) { return _mm512_loadu_ps(p); }
static inline Float load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline Float load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
static inline void store(fp16* p, Float x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline Int bits(Float x) { return (Int)_mm512_castps_si512(x); }
static inline Float from_bits(Int x) { return _mm512_castsi512_ps((__m512i)x); }
static inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
static inline Float sqrt(Float x) { return _mm512_sqrt_ps(x); }
// The second operand where the first is NaN.
static inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
static inline Int max(Int a, Int b) { return (Int)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline Int min(Int a, Int b) { return (Int)_mm512_min_epi32((__m512i)a, (__m512i)b); }
static inline int32_t reduce_max(Int x) { return _mm512_reduce_max_epi32((__m512i)x); }
static inline double sum(Float x) {
  return _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x))) +
         _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}
static inline Int load_bytes(const uint8_t* p) {
  return (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
static inline void store_bytes(uint8_t* p, Int x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
}
static inline void store_halves(uint16_t* p, Int x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
}
static inline Int load_halves(const uint16_t* p) {
  return (Int)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
// Writes around the caches; p is 64-byte aligned.
static inline void stream(float* p, Float x) { _mm512_stream_ps(p, x); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Float = __m256;
typedef int32_t Int __attribute__((vector_size(32)));

static inline Float splat(float x) { return _mm256_set1_ps(x); }
static inline Float load(const float* p) { return _mm256_loadu_ps(p); }
static inline Float load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline Float load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
static inline void store(fp16* p, Float x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline Int bits(Float x) { return (Int)_mm256_castps_si256(x); }
static inline Float from_bits(Int x) { return _mm256_castsi256_ps((__m256i)x); }
static inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
static inline Float sqrt(Float x) { return _mm256_sqrt_ps(x); }
static inline Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
static inline Int max(Int a, Int b) { return (Int)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static inline Int min(Int a, Int b) { return (Int)_mm256_min_epi32((__m256i)a, (__m256i)b); }
static inline Int load_bytes(const uint8_t* p) {
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
static inline Int load_halves(const uint16_t* p) {
  return (Int)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
static inline __m128i pack_halves(Int x) {
  return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
static inline void store_halves(uint16_t* p, Int x) {
  _mm_storeu_si128((__m128i*)p, pack_halves(x & 0xffff));
}
static inline void store_bytes(uint8_t* p, Int x) {
  const __m128i halves = pack_halves(x & 0xff);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(halves, halves));
}
static inline void stream(float* p, Float x) { _mm256_stream_ps(p, x); }

#else

constexpr int kLanes = 4;
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));

static inline Float splat(float x) { return Float{x, x, x, x}; }
static inline Float load(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline Float load(const bf16* p) { return Float{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
static inline Float load(const fp16* p) { return Float{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
static inline void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
static inline void store(fp16* p, Float x) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow_fp16(x[i]);
}
static inline Int bits(Float x) { return (Int)x; }
static inline Float from_bits(Int x) { return (Float)x; }
static inline Float fma(Float a, Float b, Float c) { return a * b + c; }  // two roundings: no fused unit here
static inline Float sqrt(Float x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
static inline Float max(Float a, Float b) { return a > b ? a : b; }
static inline Int max(Int a, Int b) { return a > b ? a : b; }
static inline Int min(Int a, Int b) { return a < b ? a : b; }
static inline Int load_bytes(const uint8_t* p) { return Int{p[0], p[1], p[2], p[3]}; }
static inline Int load_halves(const uint16_t* p) { return Int{p[0], p[1], p[2], p[3]}; }
static inline void store_halves(uint16_t* p, Int x) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint16_t(x[i]);
}
static inline void store_bytes(uint8_t* p, Int x) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(x[i]);
}
static inline void stream(float* p, Float x) { store(p, x); }

#endif

#if !defined(__AVX512F__)
static inline int32_t reduce_max(Int x) {
  int32_t result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}
static inline double sum(Float x) {
  double result = 0;
  for (int i = 0; i < kLanes; ++i) result += x[i];
  return result;
}
#endif

// The gather instructions are no faster than this on Intel and several times slower on AMD.
template <class T, class Vector>
static inline Vector lookup(const T* table, Int index) {
  Vector result;
  for (int i = 0; i < kLanes; ++i) result[i] = table[index[i]];
  return result;
}

static inline Int splat(int32_t x) { return Int{} + x; }
static inline Float abs(Float x) { return from_bits(bits(x) & 0x7fffffff); }
static inline Int shift_right(Int x, int by) {
  typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Int))));
  return (Int)((Unsigned)x >> by);
}

// bf16 by round to nearest even, NaN to NaN. The AVX512-BF16 instruction would flush subnormals.
static inline void store(bf16* p, Float x) {
  const Int b = bits(x);
  const Int rounded = shift_right(b + 0x7fff + (shift_right(b, 16) & 1), 16);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  store_halves(&p->bits, (Int)_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0)));
#else
  const Int nan = x != x;
  store_halves(&p->bits, (rounded & ~nan) | (nan & 0x7fc0));
#endif
}

// As store, where results below 2^-126 may become zero.
template <class T>
static inline void store_fast(T* p, Float x) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
    return;
  }
#endif
  store(p, x);
}

// Loads that may read a whole vector although fewer than kLanes elements remain go through these.
template <class T>
static inline Float load_some(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, size_t(count) * sizeof(T));
  return load(padded);
}

template <class T>
static inline void store_some(T* p, Float x, int64_t count) {
  T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, size_t(count) * sizeof(T));
}

}  // namespace tilewright::TW_ISA
