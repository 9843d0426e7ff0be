// Builds the codebooks at compile time, the same bits for CPU and GPU.
//
// Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), dynamic tree
// quantization: decade i of 7 holds 2^i (signed) or 2^(i+1) (unsigned) values 10^(i-6) * f, f being the
// midpoints of an even division of [0.1, 1]; 0 and 1 are added.
#pragma once

#include <bit>

#include "optim/codec.h"

namespace tilewright::optim {

// Point i of an even division of [0.1, 1] into n parts, in the float arithmetic of torch.linspace: from the
// lower end in the first half, from the upper end in the second, one rounding each. A product of floats is
// exact in double, so the sum rounds as a fused multiply-add does (checked against bitsandbytes' table).
constexpr float division_point(int i, int n) {
  const float step = (1.0f - 0.1f) / float(n);
  return i < (n + 1) / 2 ? float(double(step) * i + double(0.1f)) : float(1.0 - double(step) * (n - i));
}

constexpr float kPowerOfTen[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};

// Non-negative entries in ascending order: 129 for the signed map, 256 for the unsigned one.
template <bool kSigned>
struct Magnitudes {
  static constexpr int kCount = kSigned ? 129 : 256;
  float value[kCount];
};

template <bool kSigned>
constexpr Magnitudes<kSigned> make_magnitudes() {
  Magnitudes<kSigned> result{};
  int filled = 0;
  result.value[filled++] = 0.0f;
  for (int decade = 0; decade < 7; ++decade) {
    const int items = (kSigned ? 1 : 2) << decade;
    for (int i = 0; i < items; ++i) {
      const float middle = (division_point(i, items) + division_point(i + 1, items)) / 2.0f;
      result.value[filled++] = kPowerOfTen[decade] * middle;
    }
  }
  result.value[filled] = 1.0f;
  return result;
}

// The largest float that is not above the midpoint of a and b: x is nearer to b exactly if x exceeds it.
constexpr uint32_t threshold_bits(float a, float b) {
  const double midpoint = (double(a) + double(b)) / 2.0;
  const float rounded = float(midpoint);
  const uint32_t bits = std::bit_cast<uint32_t>(rounded);
  return double(rounded) > midpoint ? bits - 1 : bits;
}

// The straight line through decade `decade`: its codes k sit at slope * value + offset = k + 1/2.
constexpr void set_segment(Segments& segments, int index, int decade, bool is_signed) {
  const double items = double((is_signed ? 1 : 2) << decade);
  segments.slope[index] = float(items / (0.9 * double(kPowerOfTen[decade])));
  segments.offset[index] = float(items * 0.8 / 0.9 - (is_signed ? 0.0 : 1.0));
  segments.cap[index] = float(2.0 * items - (is_signed ? 0.5 : 1.5));
}

constexpr void set_constant_segment(Segments& segments, int index, float value) {
  segments.slope[index] = 0.0f;
  segments.offset[index] = value;
  segments.cap[index] = value;
}

// Walks pairs of binades from 2^-23 to 1; each holds at most one of the eight borders between zero, the seven
// decades and one, and describes the part above that border.
template <bool kSigned>
constexpr Segments make_segments(const Magnitudes<kSigned>& magnitudes) {
  Segments segments{};
  int part = -1;  // -1: zero, 0 to 6: decades, 7: one
  set_constant_segment(segments, int((kFirstBucket >> 8) - 1) % 16,
                       0.5f);  // of values below the first border
  for (uint32_t pair = kFirstBucket >> 8; pair <= kLastBucket >> 8; ++pair) {
    const int index = int(pair % 16);
    const int first_code = part < 0 ? 1 : part == 7 ? 0 : (kSigned ? 2 << part : (4 << part) - 1);
    const uint32_t border =
        part == 7 ? 0 : threshold_bits(magnitudes.value[first_code - 1], magnitudes.value[first_code]);
    const bool crosses = border >> 24 == pair;
    segments.threshold[index] = crosses ? std::bit_cast<float>(border) : 0.0f;
    if (crosses) ++part;
    if (part < 0) {
      set_constant_segment(segments, index, 0.5f);
    } else if (part == 7) {
      set_constant_segment(segments, index, float(Magnitudes<kSigned>::kCount) - 0.5f);
    } else {
      set_segment(segments, index, part, kSigned);
    }
  }
  return segments;
}

template <bool kSigned>
constexpr Codebook make_codebook() {
  constexpr Magnitudes<kSigned> magnitudes = make_magnitudes<kSigned>();
  constexpr int kCount = Magnitudes<kSigned>::kCount;
  Codebook book{};
  for (int code = 0; code < 256; ++code) {
    const int k = kSigned ? code - kSignedZero : code;
    book.decode[code] = k < 0 ? -magnitudes.value[-k] : magnitudes.value[k];
    const uint32_t bits = std::bit_cast<uint32_t>(book.decode[code]);
    for (int byte = 0; byte < 4; ++byte) book.planes[byte][code] = uint8_t(bits >> (8 * byte));
  }
  int k = 0;  // the code of the bucket's smallest float
  for (uint32_t bucket = kFirstBucket; bucket <= kLastBucket; ++bucket) {
    uint32_t threshold = 0xffff;  // never exceeded
    const uint32_t next =
        k + 1 < kCount ? threshold_bits(magnitudes.value[k], magnitudes.value[k + 1]) : 0xffffffffu;
    const bool crosses = next >> 16 == bucket;
    if (crosses) threshold = next & 0xffffu;
    book.buckets[bucket - kFirstBucket] = (uint32_t(k) << 16) + (0xffffu - threshold) - (bucket << 16);
    if (crosses) ++k;
  }
  book.segments = make_segments<kSigned>(magnitudes);
  return book;
}

}  // namespace tilewright::optim
