// Blockwise encode and decode on vectors. Included by instruction-set files only.
#pragma once

#include "core/simd.h"
#include "optim/codec.h"

namespace tilewright::TW_ISA::optim {

using namespace ::tilewright::optim;

// Elements that the vector code takes at once; lengths are multiples of it but where something else is said.
constexpr int kStep = 64;

static inline int64_t padded_to_step(int64_t count) { return (count + kStep - 1) / kStep * kStep; }

constexpr float kLargestFloat = 0x1.fffffep127f;

struct BlockScale {
  float prescale;    // 1, or kTinyScale where the reciprocal would overflow
  float reciprocal;  // of absmax * prescale; 0 for a block of zeros
};

static inline BlockScale block_scale(float absmax) {
  const float prescale = absmax < kTinyAbsmax ? kTinyScale : 1.0f;
  return {prescale, absmax == 0.0f ? 0.0f : 1.0f / (absmax * prescale)};
}

// The largest of magnitudes given as integers, which order NaN above infinity above every number.
static inline float absmax_from(Int magnitudes) {
  const int32_t largest = reduce_max(magnitudes);
  return float_of(uint32_t(largest > 0x7f800000 ? 0x7fc00000 : largest));
}

static inline float absmax_of(const float* x, int64_t count) {
  Int largest = splat(int32_t{0});
  for (int64_t i = 0; i < count; i += kLanes) largest = max(largest, bits(load(x + i)) & 0x7fffffff);
  return absmax_from(largest);
}

#if defined(__AVX512VBMI__)

// Bytes `plane[code]` for 64 codes: two 128-entry permutes, chosen between by the codes' upper bit.
static inline __m512i lookup_plane(const uint8_t* plane, __m512i codes, __mmask64 upper) {
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(plane), codes, _mm512_load_si512(plane + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), codes, _mm512_load_si512(plane + 192));
  return _mm512_mask_blend_epi8(upper, low, high);
}

// out = table[code] * absmax. The four byte planes of the table fit in registers' reach, so a lookup of 64
// codes costs 12 permutes and blends instead of 64 gathered loads.
static inline void decode_block(const uint8_t* codes, const Codebook& book, float absmax, float* out,
                                int64_t count) {
  const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int64_t i = 0; i < count; i += kStep) {
    // Unpacking works within 128-bit lanes; transposing the 4x4 groups of codes first makes the four results
    // come out in memory order.
    const __m512i c = _mm512_permutexvar_epi32(transpose, _mm512_loadu_si512(codes + i));
    const __mmask64 upper = _mm512_movepi8_mask(c);
    const __m512i b0 = lookup_plane(book.planes[0], c, upper), b1 = lookup_plane(book.planes[1], c, upper);
    const __m512i b2 = lookup_plane(book.planes[2], c, upper), b3 = lookup_plane(book.planes[3], c, upper);
    const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    const __m512i parts[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                              _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    for (int part = 0; part < 4; ++part) {
      store(out + i + 16 * part, _mm512_mul_ps(_mm512_castsi512_ps(parts[part]), scale));
    }
  }
}

#else

#if defined(__AVX512F__)
// 256 entries as eight 32-entry permutes, chosen between by the codes' upper three bits.
static inline Float lookup_code(const float* table, Int codes) {
  Float part[8];
  for (int i = 0; i < 8; ++i) {
    part[i] = _mm512_permutex2var_ps(_mm512_load_ps(table + 32 * i), (__m512i)codes,
                                     _mm512_load_ps(table + 32 * i + 16));
  }
  for (int width = 4, bit = 32; width > 0; width /= 2, bit *= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask((__m512i)codes, _mm512_set1_epi32(bit));
    for (int i = 0; i < width; ++i) part[i] = _mm512_mask_blend_ps(upper, part[2 * i], part[2 * i + 1]);
  }
  return part[0];
}
#else
static inline Float lookup_code(const float* table, Int codes) { return lookup<float, Float>(table, codes); }
#endif

static inline void decode_block(const uint8_t* codes, const Codebook& book, float absmax, float* out,
                                int64_t count) {
  const Float scale = splat(absmax);
  for (int64_t i = 0; i < count; i += kLanes)
    store(out + i, lookup_code(book.decode, load_bytes(codes + i)) * scale);
}

#endif

// Magnitudes as encode_step looks them up: never below the buckets, and 0 only where it may be.
template <bool kSigned, SmallValues kSmall>
static inline Float magnitude_of(Float scaled) {
  if constexpr (kSigned) return max(abs(scaled), splat(kSmallestBucketed));
  if constexpr (kSmall == SmallValues::kNearest) return max(scaled, splat(kSmallestBucketed));
  const Float kept = max(scaled, splat(kUnsignedCodebook.decode[1]));
#if defined(__AVX512F__)
  const __mmask16 positive = _mm512_cmp_ps_mask(scaled, splat(0.0f), _CMP_GT_OQ);
  return _mm512_mask_mov_ps(splat(kSmallestBucketed), positive, kept);
#else
  const Int positive = scaled > splat(0.0f);
  return from_bits((bits(kept) & positive) | (bits(splat(kSmallestBucketed)) & ~positive));
#endif
}

#if defined(__AVX512F__)

// A value of magnitude at most 1. The signed map has no -1.0: its lowest code is one short of it.
template <bool kSigned>
static inline uint8_t encode(float x, const uint32_t* buckets) {
  constexpr int32_t kFirst = int32_t(kFirstBucket << 16);
  const int32_t b = int32_t(bits_of(x));
  int32_t magnitude = b & 0x7fffffff;
  magnitude = magnitude < kFirst ? kFirst : magnitude;
  int32_t k = int32_t(buckets[(magnitude >> 16) - int32_t(kFirstBucket)] + uint32_t(magnitude)) >> 16;
  const int32_t sign = b >> 31;
  k -= int32_t(k == 128) & -sign;
  return uint8_t(kSigned ? kSignedZero + ((k ^ sign) - sign) : k);
}

// Registers that encode_step needs for a whole block.
struct Encoder {
  Float reciprocal, threshold, slope, offset, cap;

  Encoder(const Segments& segments, float reciprocal_of_absmax)
      : reciprocal(splat(reciprocal_of_absmax)),
        threshold(load(segments.threshold)),
        slope(load(segments.slope)),
        offset(load(segments.offset)),
        cap(load(segments.cap)) {}
};

// Encodes anew the values whose bit is set.
template <bool kSigned>
__attribute__((noinline)) static void encode_selected(uint64_t selected, const float* x, float reciprocal,
                                                      const uint32_t* buckets, uint8_t* codes) {
  for (; selected != 0; selected &= selected - 1) {
    const int i = __builtin_ctzll(selected);
    codes[i] = encode<kSigned>(x[i] * reciprocal, buckets);
  }
}

// Encodes kStep values; see Segments. The few values next to a midpoint are left to the buckets.
template <bool kSigned, SmallValues kSmall>
static inline void encode_step(const Encoder& e, const float* x, const Codebook& book, uint8_t* codes) {
  __mmask16 ambiguous[4];
  __m512i code[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Float scaled = load(x + 16 * i) * e.reciprocal;
    const Float magnitude = magnitude_of<kSigned, kSmall>(scaled);
    const __m512i pair = _mm512_srli_epi32(_mm512_castps_si512(magnitude), 24);
    const __mmask16 below =
        _mm512_cmp_ps_mask(magnitude, _mm512_permutexvar_ps(pair, e.threshold), _CMP_LE_OQ);
    const __m512i segment = _mm512_mask_sub_epi32(pair, below, pair, _mm512_set1_epi32(1));
    const Float line =
        fma(magnitude, _mm512_permutexvar_ps(segment, e.slope), _mm512_permutexvar_ps(segment, e.offset));
    const Float position = _mm512_min_ps(line, _mm512_permutexvar_ps(segment, e.cap));
    // Beside 512 a float has 14 bits of fraction left: all zero if the position is nearer than 2^-15 to an
    // integer.
    const __m512i fraction = _mm512_castps_si512(position + splat(512.0f));
    ambiguous[i] = _mm512_testn_epi32_mask(fraction, _mm512_set1_epi32(0x3fff));
    Float from_lowest = position;
    if (kSigned) {
      // 127 + floor(position) or 127 - floor(position); truncation takes the absent -1.0 (-0.5 here) to code
      // 0.
      const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(scaled));
      from_lowest = _mm512_mask_sub_ps(position + splat(127.0f), negative, splat(128.0f), position);
    }
    code[i] = _mm512_cvttps_epi32(from_lowest);
  }
  // Packing works within 128-bit lanes; the last permutation brings the groups of four into memory order.
  const __m512i halves = _mm512_packus_epi32(code[0], code[1]),
                more_halves = _mm512_packus_epi32(code[2], code[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(halves, more_halves)));
  if (__builtin_expect((ambiguous[0] | ambiguous[1] | ambiguous[2] | ambiguous[3]) != 0, 0)) {
    uint64_t selected = 0;
    for (int i = 0; i < 4; ++i) selected |= uint64_t{ambiguous[i]} << (16 * i);
    encode_selected<kSigned>(selected, x, e.reciprocal[0], book.buckets, codes);
  }
}

#else

struct Encoder {
  float reciprocal;

  Encoder(const Segments&, float reciprocal_of_absmax) : reciprocal(reciprocal_of_absmax) {}
};

template <bool kSigned, SmallValues kSmall>
static inline void encode_step(const Encoder& e, const float* x, const Codebook& book, uint8_t* codes) {
  for (int i = 0; i < kStep; i += kLanes) {
    const Float scaled = load(x + i) * splat(e.reciprocal);
    const Int b = bits(magnitude_of<kSigned, kSmall>(scaled));
    const Int entry = lookup<uint32_t, Int>(book.buckets, shift_right(b, 16) - int32_t(kFirstBucket));
    const Int k = shift_right(entry + b, 16);
    // As in encode(): -1.0 is absent, and -k is ~k + 1.
    const Int sign = kSigned ? bits(scaled) >> 31 : Int{};
    store_bytes(codes + i, kSigned ? kSignedZero + (((k + (sign & (k == 128))) ^ sign) - sign) : k);
  }
}

#endif

template <bool kSigned, SmallValues kSmall = SmallValues::kNearest>
static inline void encode_block(const float* x, float absmax, uint8_t* codes, int64_t count) {
  if (!(absmax <= kLargestFloat)) {
    // A block that holds infinity or NaN has that as its absmax, so it decodes to NaN whatever the codes are.
    std::memset(codes, kSigned ? kSignedZero : 0, size_t(count));
    return;
  }
  const BlockScale scale = block_scale(absmax);
  const Codebook& book = kSigned ? kSignedCodebook : kUnsignedCodebook;
  const Encoder encoder(book.segments, scale.reciprocal);
  for (int64_t i = 0; i < count; i += kStep) {
    if (__builtin_expect(scale.prescale == 1.0f, 1)) {
      encode_step<kSigned, kSmall>(encoder, x + i, book, codes + i);
      continue;
    }
    alignas(64) float prescaled[kStep];
    for (int j = 0; j < kStep; ++j) prescaled[j] = x[i + j] * scale.prescale;
    encode_step<kSigned, kSmall>(encoder, prescaled, book, codes + i);
  }
}

// Up to kMaxBlock elements and a map of any kind, null being the built-in one. `x` holds whole steps: zeros
// beyond `count`, which encode_any needs and decode_any leaves there.
template <bool kSigned, SmallValues kSmall = SmallValues::kNearest>
static inline void encode_any(const float* x, float absmax, const float* map, uint8_t* codes, int64_t count) {
  if (map != nullptr) {
    const BlockScale scale = block_scale(absmax);
    for (int64_t i = 0; i < count; ++i)
      codes[i] = uint8_t(foreign_code<kSmall>(map, x[i], x[i] * scale.prescale * scale.reciprocal));
    return;
  }
  alignas(64) uint8_t copy[kMaxBlock];
  uint8_t* target = count % kStep == 0 ? codes : copy;
  encode_block<kSigned, kSmall>(x, absmax, target, padded_to_step(count));
  if (target == copy) std::memcpy(codes, copy, size_t(count));
}

template <bool kSigned>
static inline void decode_any(const uint8_t* codes, float absmax, const float* map, float* x, int64_t count) {
  const int64_t padded = padded_to_step(count);
  if (map != nullptr) {
    for (int64_t i = 0; i < count; ++i) x[i] = map[codes[i]] * absmax;
  } else {
    alignas(64) uint8_t copy[kMaxBlock];
    if (padded != count) {
      std::memset(copy + padded - kStep, 0, kStep);
      std::memcpy(copy, codes, size_t(count));
      codes = copy;
    }
    decode_block(codes, kSigned ? kSignedCodebook : kUnsignedCodebook, absmax, x, padded);
  }
  for (int64_t i = count; i < padded; ++i) x[i] = 0.0f;
}

}  // namespace tilewright::TW_ISA::optim
