// The codec on a GPU: both directions through tables in shared memory (see codec.h). Eight consecutive
// elements belong to a lane, so a warp holds 256, the usual quantization block, and needs no barrier.
#pragma once

#include "device/half.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/qualifiers.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "optim/codec_table.h"

namespace tilewright::optim {

constexpr int kLaneElements = 8;
constexpr int kWarpElements = 32 * kLaneElements;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr uint32_t kNanBits = 0x7fc00000;

constexpr Codebook kSignedTable = make_codebook<true>();
constexpr Codebook kUnsignedTable = make_codebook<false>();
static __device__ const Codebook kDeviceSigned = kSignedTable;
static __device__ const Codebook kDeviceUnsigned = kUnsignedTable;

// The signed map has no -1.0: a negative value beyond the midpoint to where it would be counts as that
// midpoint.
constexpr float kLowestEncoded = std::bit_cast<float>(threshold_bits(-kSignedTable.decode[0], 1.0f));

// The unsigned map's code 1.
constexpr float kSmallestPositive = kUnsignedTable.decode[1];

// What a kernel keeps of a codebook in shared memory.
struct alignas(16) CodecTables {
  float decode[256];
  uint32_t buckets[kPaddedBuckets];
};

template <class T>
__device__ __forceinline__ void copy_table(T* to, const T* from, int count) {
  using Four = device::Vector<T, 4>;
  for (int i = int(threadIdx.x); i < count / 4; i += kThreads) {
    device::store(reinterpret_cast<Four*>(to) + i, device::load(reinterpret_cast<const Four*>(from) + i));
  }
}

// By the whole thread block; a barrier has to follow.
__device__ __forceinline__ void load_tables(CodecTables& tables, const Codebook& book) {
  copy_table(tables.decode, book.decode, 256);
  copy_table(tables.buckets, book.buckets, kPaddedBuckets);
}

// What a lane works on in a chunk of 256 elements.
struct Lane {
  int64_t offset;
  int count;  // 0 to 8
};

__device__ __forceinline__ Lane lane_of(int64_t chunk, int64_t end) {
  const int64_t offset = chunk + device::lane_id() * kLaneElements;
  const int64_t left = end - offset;
  return {offset, left <= 0 ? 0 : left < kLaneElements ? int(left) : kLaneElements};
}

// Eight elements of a lane. kWhole: all exist and the address allows 16-byte access; else `count` of them
// exist, and the others read as zero.
template <bool kWhole, class T>
__device__ __forceinline__ void load_lane(float (&out)[kLaneElements], const T* address, int count) {
  constexpr int kPerLoad = 16 / int(sizeof(T));
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < kLaneElements; i += kPerLoad) {
      const auto part =
          device::load_streaming(reinterpret_cast<const device::Vector<T, kPerLoad>*>(address + i));
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) out[i + j] = device::to_float(part[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) out[i] = i < count ? device::to_float(address[i]) : 0.0f;
  }
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_lane(T* address, const T (&values)[kLaneElements], int count) {
  constexpr int kPerStore = 16 / int(sizeof(T));
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < kLaneElements; i += kPerStore) {
      device::Vector<T, kPerStore> part;
#pragma unroll
      for (int j = 0; j < kPerStore; ++j) part[j] = values[i + j];
      device::store_streaming(reinterpret_cast<device::Vector<T, kPerStore>*>(address + i), part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (i < count) address[i] = values[i];
    }
  }
}

// `whole`: the address allows 16-byte access.
template <class T>
__device__ __forceinline__ void load_lane(float (&out)[kLaneElements], const T* address, int count,
                                          bool whole) {
  if (whole && count == kLaneElements) {
    load_lane<true>(out, address, count);
  } else {
    load_lane<false>(out, address, count);
  }
}

template <class T>
__device__ __forceinline__ void round_lane(T (&out)[kLaneElements], const float (&values)[kLaneElements]) {
#pragma unroll
  for (int i = 0; i < kLaneElements; i += 2) {
    const auto pair = device::from_float2<T>(device::Vector<float, 2>{values[i], values[i + 1]});
    out[i] = pair[0];
    out[i + 1] = pair[1];
  }
}

// Eight codes in two words, the first in the lowest byte.
struct LaneCodes {
  uint32_t word[2];
};

template <bool kWhole>
__device__ __forceinline__ LaneCodes load_codes(const uint8_t* address, int count) {
  LaneCodes codes{};
  if constexpr (kWhole) {
    const auto words = device::load_streaming(reinterpret_cast<const device::Vector<uint32_t, 2>*>(address));
    codes = {{words[0], words[1]}};
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (i < count) codes.word[i / 4] |= uint32_t{address[i]} << (8 * (i % 4));
    }
  }
  return codes;
}

template <bool kWhole>
__device__ __forceinline__ void store_codes(uint8_t* address, LaneCodes codes, int count) {
  if constexpr (kWhole) {
    device::store_streaming(reinterpret_cast<device::Vector<uint32_t, 2>*>(address),
                            device::Vector<uint32_t, 2>{codes.word[0], codes.word[1]});
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (i < count) address[i] = uint8_t(codes.word[i / 4] >> (8 * (i % 4)));
    }
  }
}

__device__ __forceinline__ void decode_lane(float (&out)[kLaneElements], LaneCodes codes,
                                            const CodecTables& tables, float scale) {
  const device::SharedAddress base = device::shared_address(tables.decode);
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    // One instruction picks the byte, scales it and adds the base.
    const uint32_t address = device::dot4(codes.word[i / 4], uint32_t(sizeof(float)) << (8 * (i % 4)), base);
    out[i] = device::load_shared<float>(address) * scale;
  }
}

// The code in byte 2 of the result. |x| is at most 1, or one ulp above; NaN counts as 0.
template <bool kSigned, SmallValues kSmall>
__device__ __forceinline__ uint32_t encode_word(float x, device::SharedAddress buckets) {
  const bool negative = kSigned && x < 0.0f;
  float magnitude = device::max(fabsf(x), kSmallestBucketed);
  if (negative) magnitude = device::min(magnitude, kLowestEncoded);
  if (kSmall == SmallValues::kPositive && x > 0.0f) magnitude = device::max(magnitude, kSmallestPositive);
  const uint32_t b = device::float_bits(magnitude);
  const uint32_t first = buckets - kFirstBucket * uint32_t(sizeof(uint32_t));
  const uint32_t k = device::load_shared<uint32_t>(first + ((b & 0xffff0000u) >> 14)) + b;
  if (!kSigned) return k;
  constexpr uint32_t kZero = uint32_t(kSignedZero) << 16;
  return negative ? kZero + 0xffffu - k : kZero + k;  // byte 2: 127 - k, 127 + k
}

// Eight values as codes of x * reciprocal.
template <bool kSigned, SmallValues kSmall>
__device__ __forceinline__ LaneCodes encode_scaled(const float (&x)[kLaneElements], float reciprocal,
                                                   const CodecTables& tables) {
  const device::SharedAddress buckets = device::shared_address(tables.buckets);
  LaneCodes codes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = encode_word<kSigned, kSmall>(x[4 * half + i] * reciprocal, buckets);
    const uint32_t low = device::byte_permute(word[0], word[1], 0x0062u);
    const uint32_t high = device::byte_permute(word[2], word[3], 0x0062u);
    codes.word[half] = device::byte_permute(low, high, 0x5410u);
  }
  return codes;
}

// Eight values as codes of x / absmax.
template <bool kSigned, SmallValues kSmall = SmallValues::kNearest>
__device__ __forceinline__ LaneCodes encode_lane(float (&x)[kLaneElements], float absmax,
                                                 const CodecTables& tables) {
  if (absmax < kTinyAbsmax) [[unlikely]] {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) x[i] *= kTinyScale;
    absmax *= kTinyScale;
  }
  return encode_scaled<kSigned, kSmall>(x, absmax == 0.0f ? 0.0f : device::div_rn(1.0f, absmax), tables);
}

// Whether quick_reciprocal will do: from kTinyAbsmax to 2^100, so not for 0, infinity and NaN.
__device__ __forceinline__ bool is_ordinary(float absmax) {
  constexpr uint32_t kFirst = std::bit_cast<uint32_t>(kTinyAbsmax), kLast = std::bit_cast<uint32_t>(0x1p100f);
  return device::float_bits(absmax) - kFirst <= kLast - kFirst;
}

// Within one unit in the last place (a Newton step on the hardware's approximation), and a third of the
// instructions of a division.
__device__ __forceinline__ float quick_reciprocal(float x) {
  const float r = device::rcp_approx(x);
  return device::fma_rn(device::fma_rn(-x, r, 1.0f), r, r);
}

// Any other ascending map lies in global memory.
__device__ inline void decode_lane_foreign(float (&out)[kLaneElements], LaneCodes codes, const float* map,
                                           float scale) {
  for (int i = 0; i < kLaneElements; ++i) out[i] = map[codes.word[i / 4] >> (8 * (i % 4)) & 0xffu] * scale;
}

// A map of any kind, null being the built-in one of these tables.
__device__ __forceinline__ void decode_lane_any(float (&out)[kLaneElements], LaneCodes codes,
                                                const CodecTables& tables, const float* map, float scale) {
  if (map != nullptr) {
    decode_lane_foreign(out, codes, map, scale);
  } else {
    decode_lane(out, codes, tables, scale);
  }
}

template <SmallValues kSmall = SmallValues::kNearest>
__device__ inline LaneCodes encode_lane_foreign(const float (&x)[kLaneElements], float absmax,
                                                const float* map) {
  const float prescale = absmax < kTinyAbsmax ? kTinyScale : 1.0f;
  const float reciprocal = absmax == 0.0f ? 0.0f : device::div_rn(1.0f, absmax * prescale);
  LaneCodes codes{};
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t code = foreign_code<kSmall>(map, x[i], x[i] * prescale * reciprocal);
    codes.word[i / 4] |= code << (8 * (i % 4));
  }
  return codes;
}

template <bool kSigned, SmallValues kSmall = SmallValues::kNearest>
__device__ __forceinline__ LaneCodes encode_lane_any(float (&x)[kLaneElements], float absmax,
                                                     const CodecTables& tables, const float* map) {
  return map != nullptr ? encode_lane_foreign<kSmall>(x, absmax, map)
                        : encode_lane<kSigned, kSmall>(x, absmax, tables);
}

}  // namespace tilewright::optim
