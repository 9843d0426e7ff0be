// The 8-bit dynamic map of bitsandbytes and how both directions are computed.
//
// Decoding is a table of 256 floats. Encoding to the nearest entry uses one lookup and no search: the
// non-negative entries are far enough apart that the 2^16 floats which share their upper 16 bits (sign,
// exponent, 7 bits of mantissa) straddle at most one midpoint. Entry i of `buckets` is built so that
//     code = (buckets[i] + bits(x)) >> 16,   i = (bits(x) >> 16) - kFirstBucket
// where the carry out of the low half adds one exactly when x lies above the midpoint. Ties go toward zero.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/tensor.h"

namespace tilewright::optim {

constexpr int kMaxBlock = 4096;  // elements

constexpr uint32_t kFirstBucket = 0x3400;  // 2^-23, below every midpoint of either map
constexpr uint32_t kLastBucket = 0x3f80;   // 1.0, and one ulp of rounding above it
constexpr int kBuckets = int(kLastBucket - kFirstBucket) + 1;
constexpr int kPaddedBuckets = (kBuckets + 3) / 4 * 4;  // whole 16-byte vectors
constexpr float kSmallestBucketed = 0x1p-23f;
constexpr int kSignedZero = 127;  // the signed map's code of 0.0

// Below this absmax the reciprocal could overflow: values are scaled by kTinyScale first, which is exact.
constexpr float kTinyAbsmax = 0x1p-100f;
constexpr float kTinyScale = 0x1p64f;

// A float's segment is its exponent's bits 1 to 4, less one at or below the segment's threshold. Segments
// never straddle decades, so within one the code is floor(min(slope * |x| + offset, cap)), but for rounding
// next to a midpoint (closer than 2^-15 to an integer, twice the error there), where the buckets decide.
struct Segments {
  alignas(64) float threshold[16];
  alignas(64) float slope[16];
  alignas(64) float offset[16];
  alignas(64) float cap[16];
};

// How values below the first midpoint are encoded. A second moment is divided by: one that was rounded to
// zero would make the next step thousands of times too long, so there a positive value gets a positive code.
enum class SmallValues { kNearest, kPositive };

struct Codebook {
  alignas(64) float decode[256];       // ascending
  alignas(64) uint8_t planes[4][256];  // byte b of decode[i] is planes[b][i], for byte-permute lookups
  alignas(64) uint32_t buckets[kPaddedBuckets];  // for |x|: gives the distance k from the code of zero
  Segments segments;
};

extern const Codebook kSignedCodebook;
extern const Codebook kUnsignedCodebook;

// The code of `scaled`, a block's value x / absmax, in any other ascending map: the nearest entry by
// bisection, of two equally near ones the smaller in magnitude. NaN counts as 0. (constexpr: for CPU and
// GPU.)
template <SmallValues kSmall>
static constexpr uint32_t foreign_code(const float* map, float x, float scaled) {
  if (!(scaled == scaled)) scaled = 0.0f;
  int code = 0, high = 255;
  while (code < high) {
    const int middle = (code + high) / 2;
    if (map[middle] < scaled) {
      code = middle + 1;
    } else {
      high = middle;
    }
  }
  if (code > 0 && map[code] >= scaled) {
    const double below = double(scaled) - map[code - 1], above = double(map[code]) - scaled;
    code -= below < above || (below == above && double(map[code - 1]) + map[code] > 0.0);
  }
  const bool rounded_to_zero = x > 0.0f && map[code] <= 0.0f && code < 255;
  return uint32_t(code + (kSmall == SmallValues::kPositive && rounded_to_zero));
}

// Calls body(T()) with the type of a parameter: float, bf16 or fp16.
template <class Body>
static constexpr auto with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(bf16());
    default:
      return body(fp16());
  }
}

}  // namespace tilewright::optim
