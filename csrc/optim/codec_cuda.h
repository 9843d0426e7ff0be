// The codec on a GPU: both directions through tables in shared memory (see codec.h). Eight consecutive elements
// belong to a lane, so a warp holds 256, the usual quantization block, and needs no barrier.
#pragma once

#include "device/half.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/qualifiers.h"
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

// The signed map has no -1.0; at and beyond the midpoint to where it would be, x counts as that midpoint.
constexpr float kLowestEncoded = -std::bit_cast<float>(threshold_bits(-kSignedTable.decode[0], 1.0f));

// What a kernel keeps of a codebook in shared memory.
struct alignas(16) CodecTables {
  float decode[256];
  uint32_t buckets[kPaddedBuckets];
};

template <class T>
__device__ __forceinline__ void copy_table(T* shared, const T* global, int count) {
  using Four = device::Vector<T, 4>;
  for (int i = int(threadIdx.x); i < count / 4; i += kThreads) {
    device::store(reinterpret_cast<Four*>(shared) + i, device::load(reinterpret_cast<const Four*>(global) + i));
  }
}

// By the whole thread block; a barrier has to follow.
__device__ __forceinline__ void load_tables(CodecTables& tables, const Codebook& book) {
  copy_table(tables.decode, book.decode, 256);
  copy_table(tables.buckets, book.buckets, kPaddedBuckets);
}

// Eight elements of a lane. `count` of them exist; `vector` says that all do and the address allows 16-byte access.
template <class T>
__device__ __forceinline__ void load_lane(float (&out)[kLaneElements], const T* address, int count, bool vector) {
  constexpr int kPerLoad = 16 / int(sizeof(T));
  if (vector) {
#pragma unroll
    for (int i = 0; i < kLaneElements; i += kPerLoad) {
      const auto part = device::load_streaming(reinterpret_cast<const device::Vector<T, kPerLoad>*>(address + i));
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) out[i + j] = device::to_float(part[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) out[i] = i < count ? device::to_float(address[i]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_lane(T* address, const T (&values)[kLaneElements], int count, bool vector) {
  constexpr int kPerStore = 16 / int(sizeof(T));
  if (vector) {
#pragma unroll
    for (int i = 0; i < kLaneElements; i += kPerStore) {
      device::Vector<T, kPerStore> part;
#pragma unroll
      for (int j = 0; j < kPerStore; ++j) part[j] = values[i + j];
      device::store_streaming(reinterpret_cast<device::Vector<T, kPerStore>*>(address + i), part);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < count) address[i] = values[i];
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

__device__ __forceinline__ LaneCodes load_codes(const uint8_t* address, int count, bool vector) {
  LaneCodes codes{};
  if (vector) {
    const auto words = device::load_streaming(reinterpret_cast<const device::Vector<uint32_t, 2>*>(address));
    return {{words[0], words[1]}};
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < count) codes.word[i / 4] |= uint32_t{address[i]} << (8 * (i % 4));
  }
  return codes;
}

__device__ __forceinline__ void store_codes(uint8_t* address, LaneCodes codes, int count, bool vector) {
  if (vector) {
    device::store_streaming(reinterpret_cast<device::Vector<uint32_t, 2>*>(address),
                            device::Vector<uint32_t, 2>{codes.word[0], codes.word[1]});
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < count) address[i] = uint8_t(codes.word[i / 4] >> (8 * (i % 4)));
  }
}

__device__ __forceinline__ int byte_of(LaneCodes codes, int i) {
  return int(device::byte_permute(codes.word[i / 4], 0, 0x4440u + uint32_t(i % 4)));
}

__device__ __forceinline__ void decode_lane(float (&out)[kLaneElements], LaneCodes codes, const float* table,
                                            float absmax) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) out[i] = table[byte_of(codes, i)] * absmax;
}

struct LaneScale {
  float prescale;
  float reciprocal;
};

__device__ __forceinline__ LaneScale lane_scale(float absmax) {
  const float prescale = absmax < kTinyAbsmax ? kTinyScale : 1.0f;
  return {prescale, absmax == 0.0f ? 0.0f : device::div_rn(1.0f, device::mul_rn(absmax, prescale))};
}

// The code in byte 2 of the result. |x| is at most 1, or one ulp above.
template <bool kSigned>
__device__ __forceinline__ uint32_t encode_word(float x, const uint32_t* buckets) {
  if constexpr (!kSigned) {
    const uint32_t b = device::float_bits(device::max(x, kSmallestBucketed));
    return buckets[int(b >> 16) - int(kFirstBucket)] + b;
  } else {
    const float clamped = device::max(x, kLowestEncoded);
    const uint32_t b = device::float_bits(device::max(device::bits_float(device::float_bits(clamped) & 0x7fffffffu),
                                                      kSmallestBucketed));
    const uint32_t k = buckets[int(b >> 16) - int(kFirstBucket)] + b;
    constexpr uint32_t kZero = uint32_t(kSignedZero) << 16;
    return x < 0.0f ? kZero + 0xffffu - k : kZero + k;  // byte 2: 127 - k, 127 + k
  }
}

template <bool kSigned>
__device__ __forceinline__ LaneCodes encode_lane(const float (&x)[kLaneElements], LaneScale scale,
                                                 const uint32_t* buckets) {
  LaneCodes codes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = device::mul_rn(device::mul_rn(x[4 * half + i], scale.prescale), scale.reciprocal);
      word[i] = encode_word<kSigned>(scaled, buckets);
    }
    const uint32_t low = device::byte_permute(word[0], word[1], 0x0062u);
    const uint32_t high = device::byte_permute(word[2], word[3], 0x0062u);
    codes.word[half] = device::byte_permute(low, high, 0x5410u);
  }
  return codes;
}

// Any other ascending map, in global memory: bisection; of two equally near entries the smaller in magnitude.
__device__ inline uint32_t nearest_entry(const float* map, float x) {
  if (!(x == x)) x = 0.0f;
  int low = 0, high = 255;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (map[middle] < x) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || map[low] < x) return uint32_t(low);
  const double below = double(x) - map[low - 1], above = double(map[low]) - x;
  const bool smaller_below = fabsf(map[low - 1]) < fabsf(map[low]);
  return uint32_t(below < above || (below == above && smaller_below) ? low - 1 : low);
}

__device__ inline LaneCodes encode_lane_foreign(const float (&x)[kLaneElements], LaneScale scale, const float* map) {
  LaneCodes codes{};
  for (int i = 0; i < kLaneElements; ++i) {
    codes.word[i / 4] |= nearest_entry(map, x[i] * scale.prescale * scale.reciprocal) << (8 * (i % 4));
  }
  return codes;
}

// Largest magnitude of a lane, as bits: orders NaN above infinity above every number.
__device__ __forceinline__ uint32_t largest_bits(const float (&x)[kLaneElements]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) largest = device::max(largest, device::float_bits(x[i]) & 0x7fffffffu);
  return largest;
}

__device__ __forceinline__ bool is_aligned(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

}  // namespace tilewright::optim
