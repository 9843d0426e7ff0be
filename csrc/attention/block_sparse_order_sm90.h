// The order of the items: those with the longest lists first, so that no long one is the last to start. Two
// small kernels, counting items by length in buckets and giving each its place. Items of about one length
// stay in about their order, so neighbours share keys in the cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/block_sparse_tiles_sm90.h"
#include "device/atomics.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"

namespace tilewright::attention::sm90 {

constexpr int kBuckets = 256;

struct OrderParams {
  BlockSparseParams attention;
  int32_t q_tiles, items, longest;
  int32_t *counts,
      *placed;       // [kBuckets]: items of a bucket, and of these those that have their place; zero at first
  uint8_t* buckets;  // [items]
  int32_t* order;    // [items]
};

struct OrderSmem {
  int32_t starts[kBuckets], counts[kBuckets];
};

// The lengths of the lists of a tile of queries, as far as positions let them, from 0 to kBuckets - 1.
__device__ __forceinline__ int bucket_of(const OrderParams& p, int32_t number) {
  const BlockSparseParams& a = p.attention;
  const Item item = item_at(a, p.q_tiles, number);
  int64_t length = 0, before = -1;
  for (int g = 0; g < kGroups; ++g) {
    const GroupRange range = group_range(a, item, g);
    if (range.row == before) continue;
    before = range.row;
    const int32_t in_reach = (range.to - range.from + a.mask.block_kv - 1) / a.mask.block_kv + 1;
    length += device::min(list_length(a.mask.q2k, range.row), in_reach);
  }
  return int(device::min(length * (kBuckets - 1) / p.longest, int64_t{kBuckets - 1}));
}

// Adds 1 to the counter of each lane's bucket, once for all lanes of a bucket, and returns what each lane
// would have found had they come one by one. Lanes with bucket -1 take no part.
__device__ __forceinline__ int32_t add_to_bucket(int32_t* counters, int bucket) {
  const int lane = device::lane_id();
  const uint32_t same = device::match_any(bucket);
  const int rank = device::count_bits(same & ((1u << lane) - 1u));
  const int first = device::count_bits((same & -same) - 1u);
  int32_t found = 0;
  if (rank == 0 && bucket >= 0) found = device::atomic_add(&counters[bucket], device::count_bits(same));
  return device::shfl(found, first) + rank;
}

static __global__ void __launch_bounds__(kBuckets) count_kernel(const __grid_constant__ OrderParams p) {
  const int32_t item = int32_t(blockIdx.x * kBuckets + threadIdx.x);
  const bool exists = item < p.items;
  const int bucket = exists ? bucket_of(p, item) : -1;
  if (exists) p.buckets[item] = uint8_t(bucket);
  add_to_bucket(p.counts, bucket);
}

static __global__ void __launch_bounds__(kBuckets) place_kernel(const __grid_constant__ OrderParams p) {
  OrderSmem& smem = device::shared_memory<OrderSmem>();
  const int thread = int(threadIdx.x);
  smem.counts[thread] = p.counts[thread];
  device::sync_block();
  int32_t longer = 0;
  for (int bucket = thread + 1; bucket < kBuckets; ++bucket) longer += smem.counts[bucket];
  smem.starts[thread] = longer;
  device::sync_block();
  const int32_t item = int32_t(blockIdx.x * kBuckets) + thread;
  const int bucket = item < p.items ? p.buckets[item] : -1;
  const int32_t place = add_to_bucket(p.placed, bucket);
  if (bucket >= 0) p.order[smem.starts[bucket] + place] = item;
}

// The workspace begins with what has to be zero: the counter of the items taken, and the buckets'.
struct OrderWorkspace {
  static constexpr int64_t kCounterBytes = 64;
  static constexpr int64_t kZeroBytes = kCounterBytes + 2 * kBuckets * int64_t{sizeof(int32_t)};

  OrderWorkspace(void* base, int64_t items)
      : next_item(static_cast<uint32_t*>(base)),
        counts(reinterpret_cast<int32_t*>(static_cast<char*>(base) + kCounterBytes)),
        order(counts + 2 * kBuckets),
        buckets(reinterpret_cast<uint8_t*>(order + items)) {}

  static int64_t bytes(int64_t items) { return kZeroBytes + items * int64_t{sizeof(int32_t) + 1}; }

  uint32_t* next_item;
  int32_t *counts, *order;
  uint8_t* buckets;
};

inline void order_items(const BlockSparseParams& p, const OrderWorkspace& w, int32_t q_tiles, int32_t items,
                        Stream stream) {
  const int64_t blocks = std::max(std::min(p.mask.q2k.capacity, p.mask.k2q.rows), int64_t{1});
  const OrderParams params{
      p, q_tiles, items, int32_t(kGroups * blocks), w.counts, w.counts + kBuckets, w.buckets, w.order};
  const dim3 grid(unsigned((items + kBuckets - 1) / kBuckets));
  device::launch(count_kernel, grid, kBuckets, 0, stream, params);
  device::launch(place_kernel, grid, kBuckets, sizeof(OrderSmem), stream, params);
}

}  // namespace tilewright::attention::sm90
