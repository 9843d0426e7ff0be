// How CPU kernels read a compressed row: its positions a byte of columns at a time, and its elements spread
// out to where they belong.
#pragma once

#include "core/simd.h"
#include "core/simd_math.h"
#include "core/simd_units.h"
#include "prune/semi_structured_linear.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

// ---- one element at a time ----

// body(element, column) for the kept elements of columns [begin, end) of a row, which begin at a group and at
// a byte.
template <class Body>
inline void for_kept(const SemiStructuredWeight& w, int64_t row, int64_t begin, int64_t end,
                     const Body& body) {
  const uint8_t* positions = w.positions + row * position_bytes(w.in);
  int64_t element = begin / w.m * w.n;
  if (w.two_of_four()) {
    for (int64_t group = begin / 4; group < end / 4; ++group) {
      const int nibble = positions[group / 2] >> group % 2 * 4 & 15;
      body(element++, 4 * group + (nibble & 3));
      body(element++, 4 * group + (nibble >> 2));
    }
  } else {
    const int64_t last = end / w.m * w.n;
    for (int64_t column = begin; column < end; column += 8) {
      for (unsigned bits = positions[column / 8]; bits != 0; bits &= bits - 1)
        if (element < last) body(element++, column + __builtin_ctz(bits));
    }
  }
}

// Vectors of tokens that a panel of transposed tokens holds.
constexpr int64_t vectors_of(int64_t tokens) { return tokens <= kLanes ? 1 : tokens <= 2 * kLanes ? 2 : 4; }

// Asks for a row's columns [begin, end), which will be read soon: its pieces are too short and too far from
// each other for the hardware to foresee them.
template <class T>
inline void prefetch_columns(const SemiStructuredWeight& w, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64;
  const char* values = reinterpret_cast<const char*>(static_cast<const T*>(w.values) + row * w.kept());
  const int64_t first = begin / w.m * w.n * int64_t{sizeof(T)}, last = end / w.m * w.n * int64_t{sizeof(T)};
  for (int64_t at = first; at < last; at += kLine) __builtin_prefetch(values + at);
  __builtin_prefetch(values + last - 1);
  __builtin_prefetch(w.positions + row * position_bytes(w.in) + begin / 8);
}

// ---- a vector of columns at a time ----

// A step of the walk along a row: kColumns columns, their elements and where those belong, made of the bytes
// of their positions.
template <class T, bool kTwoOfFour>
struct Spread;

#if defined(__AVX512F__)

// What a row's walk has read ahead: positions of 512 columns, zeros behind the end.
constexpr int kCodeColumns = 512;

inline void read_codes(uint8_t* codes, const uint8_t* positions, int64_t bytes) {
  const __mmask64 there = bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
  _mm512_storeu_si512(codes, _mm512_maskz_loadu_epi8(there, positions));
}

inline Float load_first(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline Float load_first(const bf16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline Float load_first(const fp16* p, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}
// Other patterns: the elements are spread over the columns by their bits.
template <class T, bool kTwoOfFour>
struct Spread {
  using X = float;
  using Weights = Float;
  static constexpr int kColumns = 16;

  // Of fewer columns; reads nothing behind their last element.
  static inline Weights some(const T*& values, const uint8_t* codes, int columns) {
    uint16_t mask;
    std::memcpy(&mask, codes, sizeof mask);
    mask &= uint16_t((1u << columns) - 1);
    const int count = __builtin_popcount(mask);
    const Float elements = load_first(values, __mmask16((1u << count) - 1));
    values += count;
    return _mm512_maskz_expand_ps(mask, elements);
  }
  static inline Weights next(const T*& values, const uint8_t* codes) { return some(values, codes, kColumns); }
  static inline void add(Float& sum, Weights w, const X* x) { sum = fma(w, load(x), sum); }
};

// Two of four: the elements stay as they are, and what they meet of x is picked by the positions.
template <class T>
struct Spread<T, true> {
  using X = float;
  struct Weights {
    Float elements;
    __m512i columns;  // of 32
  };
  static constexpr int kColumns = 32;

  static inline __m512i columns_of(const uint8_t* codes) {
    int32_t positions;
    std::memcpy(&positions, codes, sizeof positions);
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512i shifted = _mm512_srlv_epi32(_mm512_set1_epi32(positions), shifts);
    return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(3), groups, 0xea);  // shifted & 3 | groups
  }
  static inline Weights some(const T*& values, const uint8_t* codes, int columns) {
    const Float elements = load_first(values, __mmask16((1u << columns / 2) - 1));
    values += columns / 2;
    return {elements, columns_of(codes)};
  }
  static inline Weights next(const T*& values, const uint8_t* codes) {
    const Float elements = load(values);
    values += kColumns / 2;
    return {elements, columns_of(codes)};
  }
  static inline void add(Float& sum, const Weights& w, const X* x) {
    sum = fma(w.elements, _mm512_permutex2var_ps(load(x), w.columns, load(x + 16)), sum);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

template <>
struct Spread<bf16, false> {
  using X = bf16;
  using Weights = __m512i;
  static constexpr int kColumns = 32;

  static inline Weights some(const bf16*& values, const uint8_t* codes, int columns) {
    uint32_t mask;
    std::memcpy(&mask, codes, sizeof mask);
    mask &= uint32_t((uint64_t{1} << columns) - 1);
    const int count = __builtin_popcount(mask);
    const __m512i elements = _mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << count) - 1), values);
    values += count;
    return _mm512_maskz_expand_epi16(mask, elements);
  }
  static inline Weights next(const bf16*& values, const uint8_t* codes) {
    return some(values, codes, kColumns);
  }
  static inline void add(Float& sum, Weights w, const X* x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

template <>
struct Spread<bf16, true> {
  using X = bf16;
  struct Weights {
    __m512i elements, columns;  // 32 of 64
  };
  static constexpr int kColumns = 64;

  static inline __m512i columns_of(const uint8_t* codes) {
    int64_t positions;
    std::memcpy(&positions, codes, sizeof positions);
    const __m256i shifts = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34,
                                            36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
    const __m256i groups = _mm256_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28, 32, 32,
                                            36, 36, 40, 40, 44, 44, 48, 48, 52, 52, 56, 56, 60, 60);
    const __m256i shifted = _mm256_multishift_epi64_epi8(shifts, _mm256_set1_epi64x(positions));
    return _mm512_cvtepu8_epi16(_mm256_ternarylogic_epi64(shifted, _mm256_set1_epi8(3), groups, 0xea));
  }
  static inline Weights some(const bf16*& values, const uint8_t* codes, int columns) {
    const __mmask32 there = __mmask32((uint64_t{1} << columns / 2) - 1);
    const __m512i elements = _mm512_maskz_loadu_epi16(there, values);
    values += columns / 2;
    return {elements, columns_of(codes)};
  }
  static inline Weights next(const bf16*& values, const uint8_t* codes) {
    const __m512i elements = _mm512_loadu_si512(values);
    values += kColumns / 2;
    return {elements, columns_of(codes)};
  }
  static inline void add(Float& sum, const Weights& w, const X* x) {
    const __m512i met =
        _mm512_permutex2var_epi16(_mm512_loadu_si512(x), w.columns, _mm512_loadu_si512(x + 32));
    sum = _mm512_dpbf16_ps(sum, (__m512bh)w.elements, (__m512bh)met);
  }
};

#endif

#else

constexpr int kCodeColumns = 512;

inline void read_codes(uint8_t* codes, const uint8_t* positions, int64_t bytes) {
  std::memcpy(codes, positions, size_t(bytes < 64 ? bytes : 64));
}

#if defined(__AVX2__)
// Lane of four elements, or 4, a zero, that each of eight columns takes, by the byte of their positions.
struct SpreadLanes {
  uint64_t of[256];
  constexpr SpreadLanes() : of() {
    for (unsigned byte = 0; byte < 256; ++byte) {
      uint64_t lanes = 0x0404040404040404u;
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned shift = (i / 2 * 4 + (byte >> 2 * i & 3)) * 8;
        lanes = (lanes & ~(uint64_t{255} << shift)) | uint64_t{i} << shift;
      }
      of[byte] = lanes;
    }
  }
};
constexpr SpreadLanes kSpreadLanes{};
#endif

template <class T, bool kTwoOfFour>
struct Spread {
  using X = float;
  static constexpr int kColumns = 8;
  struct Weights {
    Float part[kColumns / kLanes];
  };

  static inline Weights some(const T*& values, const uint8_t* codes, int columns) {
    float spread[kColumns] = {};
    if constexpr (kTwoOfFour) {
      for (int i = 0; i < columns / 2; ++i) spread[i / 2 * 4 + (codes[0] >> 2 * i & 3)] = widen(*values++);
    } else {
      for (unsigned bits = codes[0]; bits != 0; bits &= bits - 1)
        spread[__builtin_ctz(bits)] = widen(*values++);
    }
    Weights weights;
    for (int i = 0; i < kColumns / kLanes; ++i) weights.part[i] = load(spread + i * kLanes);
    return weights;
  }
  static inline Weights next(const T*& values, const uint8_t* codes) {
#if defined(__AVX2__)
    if constexpr (kTwoOfFour) {
      Weights weights;
      weights.part[0] = spread_four(load_four(values), codes[0]);
      values += 4;
      return weights;
    }
#endif
    return some(values, codes, kColumns);
  }
  static inline void add(Float& sum, const Weights& w, const X* x) {
    for (int i = 0; i < kColumns / kLanes; ++i) sum = fma(w.part[i], load(x + i * kLanes), sum);
  }

#if defined(__AVX2__)
  static inline __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
  static inline __m128 load_four(const bf16* p) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)), 16));
  }
  static inline __m128 load_four(const fp16* p) { return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }

  static inline Float spread_four(__m128 elements, uint8_t byte) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(kSpreadLanes.of + byte)));
    return _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(elements), lanes);
  }
#endif
};

#endif

}  // namespace
}  // namespace tilewright::TW_ISA
