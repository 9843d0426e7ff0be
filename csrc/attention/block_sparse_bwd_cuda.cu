// The gradient of block-sparse attention on tensor cores (sm_80 and later), without atomics: every result is
// summed by one thread block in an order that the lists fix. With p = exp(s - lse) of a visible pair,
//
//   delta = rowsum(dout * out) - dlse,  dp = dout vᵀ,  ds = p (dp - delta)
//   dv = pᵀ dout,  dk = scale dsᵀ q,  dq = scale ds k
//
//   1. delta_kernel       a warp a query: delta, and lse of base 2
//   2. key_grads_kernel   a thread block some keys of one block: walks its list of queries, head after head
//   of
//                         the group that shares them. Rows are keys, so pᵀ and dsᵀ are in the registers that
//                         the next product reads.
//   3. query_grads_kernel a thread block some queries: walks their list of keys.
//
// Roofline, of 128 x 32 pairs at head dim 128: 7 products (5 would do with atomics), 7.3 MFLOP, 3600 clocks
// of sm_80's tensor cores; 320 KB and 224 KB of fragments out of shared memory in 2. and 3., 4300 clocks, so
// that is what binds. 1. reads 4 D bytes a query, bound by memory.
#include "attention/block_sparse_cuda.h"
#include "core/tune.h"

namespace tilewright::attention {
namespace {

using namespace tiles;

constexpr int kStream = 32;  // queries, or keys, of a tile that is streamed
constexpr int kGroups = kStream / kGroup;

template <int kDim>
struct KeyShape {
  static constexpr int kSlabs = kDim <= 64 ? 2 : 1;
  static constexpr int kMostRows = kDim <= 128 ? TW_TUNED(BLOCK_SPARSE_KEY_GRADS_ROWS, 128) : 64;
  static constexpr int kMostThreads = kMostRows / (kSlabs * kSlab) * device::kWarpSize;
};

template <int kDim>
struct QueryShape {
  static constexpr int kSlabs = kDim <= 64    ? 2
                                : kDim <= 128 ? TW_TUNED(BLOCK_SPARSE_QUERY_GRADS_SLABS, 2)
                                              : 1;
  static constexpr int kMostRows = kDim <= 128 ? 128 : 64;
  static constexpr int kMostThreads = kMostRows / (kSlabs * kSlab) * device::kWarpSize;
};

// Tiles of what is streamed; behind it lie two of the thread block's own rows, as large as the launch says.
template <class T, int kDim>
struct alignas(128) Smem {
  T first[2][kStream * kDim];   // queries, or keys
  T second[2][kStream * kDim];  // gradients of results, or values
  float lse2[2][kStream], delta[2][kStream];
  Group groups[kGroupStages][kGroups];
  int32_t bounds[2];
};

// ---- what the others read of each query ----

constexpr int kDeltaWarps = 8;

template <class T>
__global__ void __launch_bounds__(kDeltaWarps* device::kWarpSize)
    delta_kernel(const __grid_constant__ KernelParams k) {
  const BlockSparseParams& p = k.p;
  const int64_t number = int64_t{blockIdx.x} * kDeltaWarps + device::warp_id();
  if (number >= p.batch * p.heads * p.q_len) return;
  const int64_t batch = number / p.q_len / p.heads, head = number / p.q_len % p.heads;
  const int row = int(number % p.q_len);
  const auto out = rows_of<const T>(k.out, batch, head, p.q_len);
  const auto dout = rows_of<const T>(k.dout, batch, head, p.q_len);
  float sum = 0.0f;
  const int column = device::lane_id() * 8;
  if (column < p.value_dim) {
    const auto a = load_chunk(out, row, column), b = load_chunk(dout, row, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = device::fma_rn(device::to_float(a[i]), device::to_float(b[i]), sum);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += device::shfl_xor(sum, distance);
  if (device::lane_id() != 0) return;
  const float lse = static_cast<const float*>(p.lse)[number];
  if (p.dlse != nullptr) sum -= static_cast<const float*>(p.dlse)[number];
  const bool sees = lse != -kInfinity;
  k.delta[number] = sees ? sum : 0.0f;
  k.lse2[number] = sees ? lse * kLog2E : kInfinity;
}

// ---- gradients of keys and values ----

// Whether every query of a group sees every key of the thread block, as far as positions decide.
__device__ __forceinline__ bool positions_hide(const BlockSparseParams& p, const Place& place,
                                               const Group& queries) {
  if (queries.first + kGroup > p.q_len) return true;
  return key_range(p, queries.first).to < place.end ||
         key_range(p, queries.first + kGroup - 1).from > place.first;
}

template <class T, int kDim, bool kKeys, bool kValues>
struct KeyGrads {
  static constexpr int kSlabs = KeyShape<kDim>::kSlabs;
  static constexpr int kPart = kStream / kSlabs;  // queries whose scores are in registers at once
  using Sums = float[kSlabs][kDim / 8][4];
  using Scores = float[kSlabs][kPart / 8][4];
  Sums dk, dv;

  // One tile of queries.
  __device__ __forceinline__ void add(const KernelParams& k, const Smem<T, kDim>& smem, int tile,
                                      const T* keys, const T* values, const Place& place) {
    const int stage = tile % 2, first_row = device::warp_id() * kSlabs * kSlab;
    const Group* groups = smem.groups[tile % kGroupStages];
    const bool masked = any_masked<kGroups>(groups);
#pragma unroll 1
    for (int part = 0; part < kStream; part += kPart) {
      const T* queries = smem.first[stage] + part * kDim;
      const T* dout = smem.second[stage] + part * kDim;
      Scores s, d;
      multiply_rows<T, kDim>(s, keys, first_row, queries, k.p.head_dim, k.keep, k.flip);
      cap_scores(s, k);
      if constexpr (kKeys) {
        multiply_rows<T, kDim>(d, values, first_row, dout, k.p.value_dim, ~0u, 0u);
      } else {
        clear(d);
      }
      weigh(k, s, d, smem.lse2[stage] + part, smem.delta[stage] + part);
      if (masked) hide(s, d, {k.p, groups, place.first + first_row, place.offset + first_row}, part);
      if constexpr (kValues) multiply_results<T, kDim>(dv, s, dout, k.p.value_dim);
      if constexpr (kKeys) multiply_results<T, kDim>(dk, d, queries, k.p.head_dim);
    }
  }

  __device__ __forceinline__ static void weigh(const KernelParams& k, Scores& s, Scores& d, const float* lse2,
                                               const float* delta) {
#pragma unroll
    for (int n = 0; n < kPart / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + device::lane_id() % 4 * 2 + i;
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          differentiate(k, s[slab][n][i], d[slab][n][i], lse2[column], delta[column]);
          differentiate(k, s[slab][n][i + 2], d[slab][n][i + 2], lse2[column], delta[column]);
        }
      }
    }
  }

  __device__ __forceinline__ static void hide(Scores& s, Scores& d, const ColumnSight<kSlabs>& sight,
                                              int part) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int n = 0; n < kPart / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t seen = sight.of_column(slab, part + n * 8 + device::lane_id() % 4 * 2 + i);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bool hidden = (seen >> half * 8 & 1u) == 0;
            if (hidden) s[slab][n][2 * half + i] = d[slab][n][2 * half + i] = 0.0f;
          }
        }
      }
    }
  }
};

// Every product but those of what is not asked for: at head dim 256 the sums of one result fill the
// registers.
template <class T, int kDim, bool kKeys, bool kValues>
__global__ void __launch_bounds__(KeyShape<kDim>::kMostThreads)
    key_grads_kernel(const __grid_constant__ KernelParams k) {
  Smem<T, kDim>& smem = device::shared_memory<Smem<T, kDim>>();
  T* const keys = reinterpret_cast<T*>(&smem + 1);
  T* const values = keys + k.rows * kDim;
  const BlockSparseParams& p = k.p;
  const Place place = place_of_block(k, p.kv_heads, p.mask.block_kv, p.kv_len);
  if (place.first >= place.end) return;
  const auto row_at = [&](int r) { return place.first + r; };
  copy_tile<kDim>(keys, rows_of<const T>(k.k, place.batch, place.head, place.end), k.rows, row_at);
  copy_tile<kDim>(values, rows_of<const T>(k.v, place.batch, place.head, place.end), k.rows, row_at);
  KeyGrads<T, kDim, kKeys, kValues> grads;
  clear(grads.dk);
  clear(grads.dv);
  const int heads_each = p.heads / p.kv_heads;
#pragma unroll 1
  for (int32_t head = place.head * heads_each; head < (place.head + 1) * heads_each; ++head) {
    const Walk walk = walk_of_keys(k, place, head, smem.bounds);
    const int tiles = int(divide_up(walk.end - walk.begin, kGroups));
    if (tiles <= 0) continue;
    const auto queries = rows_of<const T>(k.q, place.batch, head, p.q_len);
    const auto dout = rows_of<const T>(k.dout, place.batch, head, p.q_len);
    const int64_t statistics = (int64_t{place.batch} * p.heads + head) * p.q_len;
    const auto name_groups = [&](int tile) {
      if (threadIdx.x >= kGroups) return;
      Group group = walk.group(walk.begin + tile * kGroups + int(threadIdx.x));
      group.masked |= positions_hide(p, place, group);
      smem.groups[tile % kGroupStages][threadIdx.x] = group;
    };
    const auto begin_copies = [&](int tile) {
      const int stage = tile % 2;
      const Group* groups = smem.groups[tile % kGroupStages];
      const auto query_at = [&](int r) { return groups[r / kGroup].first + r % kGroup; };
      copy_tile<kDim>(smem.first[stage], queries, kStream, query_at);
      copy_tile<kDim>(smem.second[stage], dout, kStream, query_at);
      if (threadIdx.x < kStream) {
        const int r = int(threadIdx.x), query = query_at(r);
        const bool exists = query < p.q_len;
        const int64_t from = exists ? statistics + query : 0;
        device::cp_async<4>(&smem.lse2[stage][r], k.lse2 + from, exists);
        device::cp_async<4>(&smem.delta[stage][r], k.delta + from, exists);
      }
      device::cp_async_commit();
    };
    device::sync_block();  // nobody reads the last head's tiles any more
    name_groups(0);
    device::sync_block();
    begin_copies(0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) name_groups(tile + 1);
      device::cp_async_wait<0>();
      device::sync_block();
      if (tile + 1 < tiles) begin_copies(tile + 1);
      grads.add(k, smem, tile, keys, values, place);
    }
  }
  device::cp_async_wait<0>();
  device::sync_block();  // without queries, the keys are only now all there
  const int first_row = device::warp_id() * KeyShape<kDim>::kSlabs * kSlab;
  if constexpr (kKeys) {
    scale_by(grads.dk, float(p.scale));
    store_rows<kDim>(keys, first_row, grads.dk, rows_of<T>(k.dk, place.batch, place.head, p.kv_len),
                     place.first, place.end);
  }
  if constexpr (kValues) {
    store_rows<kDim>(values, first_row, grads.dv, rows_of<T>(k.dv, place.batch, place.head, p.kv_len),
                     place.first, place.end);
  }
}

// ---- gradients of queries ----

// What a thread knows of its rows.
template <int kSlabs>
struct RowStatistics {
  float lse2[kSlabs][2], delta[kSlabs][2];

  __device__ __forceinline__ RowStatistics(const KernelParams& k, const Place& place, int first_row) {
    const int64_t base = (int64_t{place.batch} * k.p.heads + place.head) * k.p.q_len;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.first + first_row + slab * kSlab + half * 8 + device::lane_id() / 4;
        lse2[slab][half] = row < place.end ? k.lse2[base + row] : kInfinity;
        delta[slab][half] = row < place.end ? k.delta[base + row] : 0.0f;
      }
    }
  }
};

template <class T, int kDim>
struct QueryGrads {
  static constexpr int kSlabs = QueryShape<kDim>::kSlabs;
  // Keys whose scores are in registers at once.
  static constexpr int kPart = kDim == 128 ? TW_TUNED(BLOCK_SPARSE_QUERY_GRADS_PART, 16) : kStream;
  using Scores = float[kSlabs][kPart / 8][4];
  RowStatistics<kSlabs> rows;
  float dq[kSlabs][kDim / 8][4];

  // One tile of keys.
  __device__ __forceinline__ void add(const KernelParams& k, const Smem<T, kDim>& smem, int tile,
                                      const T* queries, const T* dout, const Place& place) {
    const int stage = tile % 2, first_row = device::warp_id() * kSlabs * kSlab;
    const Group* groups = smem.groups[tile % kGroupStages];
    const bool masked = any_masked<kGroups>(groups);
#pragma unroll 1
    for (int part = 0; part < kStream; part += kPart) {
      const T* keys = smem.first[stage] + part * kDim;
      const T* values = smem.second[stage] + part * kDim;
      Scores s, d;
      multiply_rows<T, kDim>(s, queries, first_row, keys, k.p.head_dim, k.keep, k.flip);
      cap_scores(s, k);
      multiply_rows<T, kDim>(d, dout, first_row, values, k.p.value_dim, ~0u, 0u);
      weigh(k, s, d);
      if (masked) hide(d, {k.p, groups, place.first + first_row, place.offset + first_row}, part / kGroup);
      multiply_results<T, kDim>(dq, d, keys, k.p.head_dim);
    }
  }

  __device__ __forceinline__ void weigh(const KernelParams& k, Scores& s, Scores& d) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int n = 0; n < kPart / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          differentiate(k, s[slab][n][i], d[slab][n][i], rows.lse2[slab][i / 2], rows.delta[slab][i / 2]);
      }
    }
  }

  __device__ __forceinline__ static void hide(Scores& d, const RowSight<kSlabs, kGroups>& sight,
                                              int first_group) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int n = 0; n < kPart / 8; n += 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t seen = sight.of_group(slab, half, first_group + n / 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if ((seen >> (i / 2 * 8 + i % 2) & 1u) == 0) d[slab][n + i / 2][2 * half + i % 2] = 0.0f;
          }
        }
      }
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(QueryShape<kDim>::kMostThreads)
    query_grads_kernel(const __grid_constant__ KernelParams k) {
  constexpr int kSlabs = QueryShape<kDim>::kSlabs;
  Smem<T, kDim>& smem = device::shared_memory<Smem<T, kDim>>();
  T* const queries = reinterpret_cast<T*>(&smem + 1);
  T* const dout = queries + k.rows * kDim;
  const BlockSparseParams& p = k.p;
  const Place place = place_of_block(k, p.heads, p.mask.block_q, p.q_len);
  if (place.first >= place.end) return;
  const int64_t kv_head = place.head / (p.heads / p.kv_heads);
  const auto keys = rows_of<const T>(k.k, place.batch, kv_head, p.kv_len);
  const auto values = rows_of<const T>(k.v, place.batch, kv_head, p.kv_len);
  const Walk walk = walk_of_queries(k, place, smem.bounds);
  const auto name_groups = [&](int tile) {
    if (threadIdx.x >= kGroups) return;
    smem.groups[tile % kGroupStages][threadIdx.x] =
        group_of_keys(p, place, walk, tile * kGroups + int(threadIdx.x));
  };
  const auto begin_copies = [&](int tile) {
    const Group* groups = smem.groups[tile % kGroupStages];
    const auto key_at = [&](int r) { return groups[r / kGroup].first + r % kGroup; };
    copy_tile<kDim>(smem.first[tile % 2], keys, kStream, key_at);
    copy_tile<kDim>(smem.second[tile % 2], values, kStream, key_at);
    device::cp_async_commit();
  };
  const auto row_at = [&](int r) { return place.first + r; };
  copy_tile<kDim>(queries, rows_of<const T>(k.q, place.batch, place.head, place.end), k.rows, row_at);
  copy_tile<kDim>(dout, rows_of<const T>(k.dout, place.batch, place.head, place.end), k.rows, row_at);
  name_groups(0);
  device::sync_block();
  begin_copies(0);
  const int first_row = device::warp_id() * kSlabs * kSlab;
  QueryGrads<T, kDim> grads{{k, place, first_row}, {}};
  const int tiles = int(divide_up(walk.end - walk.begin, kGroups));
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) name_groups(tile + 1);
    device::cp_async_wait<0>();
    device::sync_block();
    if (tile + 1 < tiles) begin_copies(tile + 1);
    grads.add(k, smem, tile, queries, dout, place);
  }
  device::cp_async_wait<0>();
  device::sync_block();  // without keys, the queries are only now all there
  scale_by(grads.dq, float(p.scale));
  store_rows<kDim>(queries, first_row, grads.dq, rows_of<T>(k.dq, place.batch, place.head, p.q_len),
                   place.first, place.end);
}

// ---- launches ----

template <class T, int kDim, class Shape>
void launch_grads(device::Kernel<KernelParams> kernel, KernelParams k, const Axis& axis, int device,
                  Stream stream) {
  const int warps = cut_blocks(k, axis, Shape::kMostRows, Shape::kSlabs * kSlab, device);
  const size_t bytes = sizeof(Smem<T, kDim>) + 2 * size_t(k.rows) * kDim * sizeof(T);
  device::launch(kernel, dim3(grid_of(k, axis)), dim3(unsigned(warps * device::kWarpSize)), bytes, stream, k);
}

template <class T, int kDim>
void launch_backward(const KernelParams& k, int device, Stream stream) {
  const auto keys = [&](device::Kernel<KernelParams> kernel) {
    launch_grads<T, kDim, KeyShape<kDim>>(kernel, k, keys_of(k.p), device, stream);
  };
  if constexpr (kDim <= 128) {
    keys(key_grads_kernel<T, kDim, true, true>);
  } else {
    keys(key_grads_kernel<T, kDim, false, true>);
    keys(key_grads_kernel<T, kDim, true, false>);
  }
  launch_grads<T, kDim, QueryShape<kDim>>(query_grads_kernel<T, kDim>, k, queries_of(k.p), device, stream);
}

template <class T>
void choose_backward(const KernelParams& k, int device, Stream stream) {
  const BlockSparseParams& p = k.p;
  const int64_t rows = p.batch * p.heads * p.q_len;
  device::launch(delta_kernel<T>, dim3(unsigned(divide_up(rows, kDeltaWarps))),
                 dim3(kDeltaWarps * device::kWarpSize), 0, stream, k);
  const int64_t dim = larger(p.head_dim, p.value_dim);
  if (dim <= 64) return launch_backward<T, 64>(k, device, stream);
  if (dim <= 128) return launch_backward<T, 128>(k, device, stream);
  launch_backward<T, 256>(k, device, stream);
}

}  // namespace

int64_t block_sparse_bwd_workspace_cuda(const BlockSparseParams& p) {
  return 2 * p.batch * p.heads * p.q_len * int64_t(sizeof(float));
}

void block_sparse_bwd_cuda(const BlockSparseParams& p, int device, Stream stream) {
  if (p.batch == 0) return;
  const device::DeviceGuard guard(device);
  if (p.dtype == DType::kFloat32) return block_sparse_bwd_float32(p, device, stream);
  const KernelParams k = backward_params(p);
  p.dtype == DType::kFloat16 ? choose_backward<fp16>(k, device, stream)
                             : choose_backward<bf16>(k, device, stream);
}

}  // namespace tilewright::attention
