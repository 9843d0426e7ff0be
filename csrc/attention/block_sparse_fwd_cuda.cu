// Block-sparse attention forward on tensor cores (sm_80 and later); the formula is in block_sparse.h.
//
// A thread block takes up to 128 queries of a block of the mask, a warp 32 (16 at head dims above 128), and
// walks that row's list. A tile of keys and values is multiplied while the next one is being copied:
//
//   S = Q Kᵀ;  p = exp2(factor S - ref);  l += rows of p;  O += p V
//
// ref follows the maximum of a row only once that has grown by 2^kSlack, so sums are rarely scaled anew.
//
// Roofline, of 128 queries and 32 keys at head dim 128 in 16 bits: 2.1 MFLOP, 1024 clocks of sm_80's tensor
// cores (512 of sm_90's); 96 KB of fragments out of shared memory and 16 KB into it, 900 clocks; 4096 powers,
// 256 clocks; 16 KB from L2, which is 128 FLOP a byte.
#include "attention/block_sparse_cuda.h"
#include "attention/block_sparse_sm90.h"

namespace tilewright::attention {
namespace {

using namespace tiles;

constexpr float kSlack = 8.0f;

template <int kDim>
struct Shape {
  static constexpr int kSlabs = kDim <= 128 ? 2 : 1;
  static constexpr int kKeys = kDim <= 64 ? 64 : 32;  // of a tile
  static constexpr int kGroups = kKeys / kGroup;
  static constexpr int kMostRows = 128;
  static constexpr int kMostThreads = kMostRows / (kSlabs * kSlab) * device::kWarpSize;
};

// The tile of queries is behind it, as large as the launch says.
template <class T, int kDim>
struct alignas(128) Smem {
  T k[2][Shape<kDim>::kKeys * kDim];
  T v[2][Shape<kDim>::kKeys * kDim];
  Group groups[kGroupStages][Shape<kDim>::kGroups];
  int32_t bounds[2];
};

// What a warp knows of its rows; a thread of rows g and g + 8 of each slab.
template <int kDim>
struct State {
  static constexpr int kSlabs = Shape<kDim>::kSlabs;
  float out[kSlabs][kDim / 8][4];
  float ref[kSlabs][2];  // of base 2
  float sum[kSlabs][2];  // of this thread's columns alone
};

template <int kDim>
__device__ __forceinline__ void clear_state(State<kDim>& state) {
  clear(state.out);
#pragma unroll
  for (int s = 0; s < State<kDim>::kSlabs; ++s) {
    state.ref[s][0] = state.ref[s][1] = -kInfinity;
    state.sum[s][0] = state.sum[s][1] = 0.0f;
  }
}

template <int kDim>
using Scores = float[Shape<kDim>::kSlabs][Shape<kDim>::kKeys / 8][4];

template <int kDim>
__device__ __forceinline__ void hide(Scores<kDim>& s,
                                     const RowSight<Shape<kDim>::kSlabs, Shape<kDim>::kGroups>& sight) {
#pragma unroll
  for (int slab = 0; slab < Shape<kDim>::kSlabs; ++slab) {
#pragma unroll
    for (int n = 0; n < Shape<kDim>::kKeys / 8; n += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t seen = sight.of_group(slab, half, n / 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = s[slab][n + i / 2][2 * half + i % 2];
          score = (seen >> (i / 2 * 8 + i % 2) & 1u) != 0 ? score : -kInfinity;
        }
      }
    }
  }
}

// The largest score of each row, times factor.
template <int kDim>
__device__ __forceinline__ void row_maxima(float (&most)[Shape<kDim>::kSlabs][2], const Scores<kDim>& s,
                                           float factor) {
#pragma unroll
  for (int slab = 0; slab < Shape<kDim>::kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float found = -kInfinity;
#pragma unroll
      for (int n = 0; n < Shape<kDim>::kKeys / 8; ++n) {
        found = device::max(found, device::max(s[slab][n][2 * half], s[slab][n][2 * half + 1]));
      }
      found = device::max(found, device::shfl_xor(found, 1));
      most[slab][half] = factor * device::max(found, device::shfl_xor(found, 2));
    }
  }
}

// Moves the references of the rows to these maxima, where they are larger.
template <int kDim>
__device__ __forceinline__ void raise_references(State<kDim>& state,
                                                 const float (&most)[Shape<kDim>::kSlabs][2]) {
#pragma unroll
  for (int slab = 0; slab < Shape<kDim>::kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = state.ref[slab][half], now = device::max(before, most[slab][half]);
      const float scale = before == -kInfinity ? 0.0f : device::exp2_approx(before - now);
      state.ref[slab][half] = now;
      state.sum[slab][half] *= scale;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        state.out[slab][n][2 * half] *= scale;
        state.out[slab][n][2 * half + 1] *= scale;
      }
    }
  }
}

// Scores become powers.
template <int kDim>
__device__ __forceinline__ void soften(Scores<kDim>& s, State<kDim>& state, float factor) {
  float most[Shape<kDim>::kSlabs][2];
  row_maxima<kDim>(most, s, factor);
  bool grown = false;
#pragma unroll
  for (int slab = 0; slab < Shape<kDim>::kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) grown |= most[slab][half] > state.ref[slab][half] + kSlack;
  }
  if (device::any(grown)) raise_references(state, most);
#pragma unroll
  for (int slab = 0; slab < Shape<kDim>::kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float found = state.ref[slab][half], ref = found == -kInfinity ? 0.0f : found;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < Shape<kDim>::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[slab][n][i] = device::exp2_approx(device::fma_rn(s[slab][n][i], factor, -ref));
          sum += s[slab][n][i];
        }
      }
      state.sum[slab][half] += sum;
    }
  }
}

// Divides by the sums, and writes out and lse.
template <class T, int kDim>
__device__ __forceinline__ void finish(const KernelParams& k, const Place& place, State<kDim>& state,
                                       T* queries) {
  const int lane = device::lane_id();
  const int first = device::warp_id() * Shape<kDim>::kSlabs * kSlab;
  float* lse = static_cast<float*>(k.p.lse) + (int64_t{place.batch} * k.p.heads + place.head) * k.p.q_len;
#pragma unroll
  for (int slab = 0; slab < Shape<kDim>::kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[slab][half];
      sum += device::shfl_xor(sum, 1);
      sum += device::shfl_xor(sum, 2);
      const float inverse = sum == 0.0f ? 0.0f : device::div_rn(1.0f, sum);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        state.out[slab][n][2 * half] *= inverse;
        state.out[slab][n][2 * half + 1] *= inverse;
      }
      const int row = place.first + first + slab * kSlab + half * 8 + lane / 4;
      const float log = sum == 0.0f ? -kInfinity : (state.ref[slab][half] + device::log2(sum)) * kLn2;
      if (lane % 4 == 0 && row < place.end) lse[row] = log;
    }
  }
  store_rows<kDim>(queries, first, state.out, rows_of<T>(k.out, place.batch, place.head, k.p.q_len),
                   place.first, place.end);
}

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kMostThreads)
    forward_kernel(const __grid_constant__ KernelParams k) {
  using S = Shape<kDim>;
  Smem<T, kDim>& smem = device::shared_memory<Smem<T, kDim>>();
  T* const queries = reinterpret_cast<T*>(&smem + 1);
  const Place place = place_of_block(k, k.p.heads, k.p.mask.block_q, k.p.q_len);
  if (place.first >= place.end) return;
  const int64_t kv_head = place.head / (k.p.heads / k.p.kv_heads);
  const auto keys = rows_of<const T>(k.k, place.batch, kv_head, k.p.kv_len);
  const auto values = rows_of<const T>(k.v, place.batch, kv_head, k.p.kv_len);
  const Walk walk = walk_of_queries(k, place, smem.bounds);
  const auto name_groups = [&](int tile) {
    if (threadIdx.x >= S::kGroups) return;
    smem.groups[tile % kGroupStages][threadIdx.x] =
        group_of_keys(k.p, place, walk, tile * S::kGroups + int(threadIdx.x));
  };
  const auto begin_copies = [&](int tile) {
    const Group* groups = smem.groups[tile % kGroupStages];
    const auto row_at = [&](int r) { return groups[r / kGroup].first + r % kGroup; };
    copy_tile<kDim>(smem.k[tile % 2], keys, S::kKeys, row_at);
    copy_tile<kDim>(smem.v[tile % 2], values, S::kKeys, row_at);
    device::cp_async_commit();
  };

  copy_tile<kDim>(queries, rows_of<const T>(k.q, place.batch, place.head, place.end), k.rows,
                  [&](int r) { return place.first + r; });
  name_groups(0);
  device::sync_block();
  begin_copies(0);
  const int first_row = device::warp_id() * S::kSlabs * kSlab;
  State<kDim> state;
  clear_state(state);
  const int tiles = int(divide_up(walk.end - walk.begin, S::kGroups));
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) name_groups(tile + 1);
    device::cp_async_wait<0>();
    device::sync_block();
    if (tile + 1 < tiles) begin_copies(tile + 1);
    const Group* groups = smem.groups[tile % kGroupStages];
    Scores<kDim> scores;
    multiply_rows<T, kDim>(scores, queries, first_row, smem.k[tile % 2], k.p.head_dim, k.keep, k.flip);
    cap_scores(scores, k);
    if (any_masked<S::kGroups>(groups)) {
      hide<kDim>(scores, {k.p, groups, place.first + first_row, place.offset + first_row});
    }
    soften<kDim>(scores, state, k.factor);
    multiply_results<T, kDim>(state.out, scores, smem.v[tile % 2], k.p.value_dim);
  }
  device::cp_async_wait<0>();
  device::sync_block();  // without tiles, the queries are only now all there
  finish<T, kDim>(k, place, state, queries);
}

template <class T, int kDim>
void launch_forward(KernelParams k, int device, Stream stream) {
  using S = Shape<kDim>;
  const Axis queries = queries_of(k.p);
  const int warps = cut_blocks(k, queries, S::kMostRows, S::kSlabs * kSlab, device);
  const size_t bytes = sizeof(Smem<T, kDim>) + size_t(k.rows) * kDim * sizeof(T);
  device::launch(forward_kernel<T, kDim>, dim3(grid_of(k, queries)),
                 dim3(unsigned(warps * device::kWarpSize)), bytes, stream, k);
}

template <class T>
void choose_forward(const KernelParams& k, int device, Stream stream) {
  const int64_t dim = larger(k.p.head_dim, k.p.value_dim);
  if (dim <= 64) return launch_forward<T, 64>(k, device, stream);
  if (dim <= 128) return launch_forward<T, 128>(k, device, stream);
  launch_forward<T, 256>(k, device, stream);
}

}  // namespace

int64_t block_sparse_fwd_workspace_cuda(const BlockSparseParams& p, int device) {
  return block_sparse_sm90_available(device) ? block_sparse_fwd_workspace_sm90(p) : 0;
}

void block_sparse_fwd_cuda(const BlockSparseParams& p, int device, Stream stream) {
  if (p.batch == 0 || p.q_len == 0) return;
  if (block_sparse_sm90_available(device) && block_sparse_fwd_sm90_fits(p))
    return block_sparse_fwd_sm90(p, device, stream);
  const device::DeviceGuard guard(device);
  if (p.dtype == DType::kFloat32) return block_sparse_fwd_float32(p, device, stream);
  const KernelParams k = kernel_params(p);
  p.dtype == DType::kFloat16 ? choose_forward<fp16>(k, device, stream)
                             : choose_forward<bf16>(k, device, stream);
}

}  // namespace tilewright::attention
