// Block-sparse attention in float32 on the multiply-add units, forward and backward; the formulas are in
// block_sparse.h and block_sparse_bwd_cuda.cu, what is shared with tensor cores in block_sparse_cuda.h.
//
// A plain path: 128 threads take 32 rows of a block of the mask, and 32 of what they walk along at a time,
// copied when it is their turn. A thread owns 4 rows and every 16th column, of scores as of results.
//
// Roofline: a product's step is 4 rows by 2 or 16 columns from shared memory, 1.3 or 3.2 multiply-adds a
// load; bound by shared memory at a third of the units' speed.
#include "attention/block_sparse_cuda.h"
#include "device/half.h"

namespace tilewright::attention {
namespace {

using namespace tiles;

constexpr int kThreads = 128;
constexpr int kRows = 32;    // of a thread block, and of a tile that is streamed
constexpr int kOwnRows = 4;  // of a thread
constexpr int kAcross = 16;  // threads side by side
constexpr int kGroups = kRows / kGroup;
constexpr int kMostColumns = kMaxHeadDim / kAcross;  // of a thread

struct alignas(128) Smem {
  float products[2][kRows][kRows + 1];
  Group groups[kGroups];
  int32_t bounds[2];
  // Behind it: tiles of kRows times stride() floats.
};

// A row of a tile is padded by a vector, so that rows begin in different banks.
__host__ __device__ __forceinline__ int stride(const BlockSparseParams& p) {
  const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  return (dim + kAcross - 1) / kAcross * kAcross + 4;
}

inline size_t shared_bytes(const BlockSparseParams& p, int tiles) {
  return sizeof(Smem) + size_t(tiles) * kRows * size_t(stride(p)) * sizeof(float);
}

__device__ __forceinline__ float* tile_behind(Smem& smem, const BlockSparseParams& p, int number) {
  return reinterpret_cast<float*>(&smem + 1) + number * kRows * stride(p);
}

__device__ __forceinline__ int own_row() { return int(threadIdx.x) / kAcross * kOwnRows; }
__device__ __forceinline__ int own_column() { return int(threadIdx.x) % kAcross; }

template <class RowAt>
__device__ __forceinline__ void copy(float* tile, const BlockSparseParams& p, const Rows<const float>& rows,
                                     const RowAt& row_at) {
  const int columns = stride(p);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kRows * columns; i += kThreads) {
    const int row = row_at(i / columns), column = i % columns;
    const bool inside = row < rows.count && column < rows.columns;
    tile[i] = inside ? rows.data[row * rows.row + column * rows.inner] : 0.0f;
  }
}

// c[r][j] = row own_row() + r of a times row own_column() + 16 j of b.
using Scores = float[kOwnRows][kGroups];
__device__ __forceinline__ void multiply_rows(Scores& c, const float* a, const float* b, int depth,
                                              int columns) {
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) c[r][j] = 0.0f;
  }
  using Four = Vector<float, 4>;
#pragma unroll 1
  for (int d = 0; d < depth; d += 4) {
    Four left[kOwnRows], right[kGroups];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r)
      left[r] = device::load(reinterpret_cast<const Four*>(a + (own_row() + r) * columns + d));
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
      right[j] = device::load(reinterpret_cast<const Four*>(b + (own_column() + kAcross * j) * columns + d));
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[r][j] = device::fma_rn(left[r][i], right[j][i], c[r][j]);
      }
    }
  }
}

// c[r][j] += row own_row() + r of a times column own_column() + 16 j of b.
using Sums = float[kOwnRows][kMostColumns];
__device__ __forceinline__ void multiply_products(Sums& c, const float (&a)[kRows][kRows + 1], const float* b,
                                                  int width, int columns) {
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kMostColumns; ++j) {
      if (j * kAcross >= width) break;
      const float right = b[i * columns + own_column() + kAcross * j];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) c[r][j] = device::fma_rn(a[own_row() + r][i], right, c[r][j]);
    }
  }
}

__device__ __forceinline__ void clear(Sums& c) {
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
    for (int j = 0; j < kMostColumns; ++j) c[r][j] = 0.0f;
  }
}

__device__ __forceinline__ void store(const Sums& c, const Rows<float>& to, const Place& place,
                                      const float (&factors)[kOwnRows]) {
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    const int row = place.first + own_row() + r;
#pragma unroll
    for (int j = 0; j < kMostColumns; ++j) {
      const int column = own_column() + kAcross * j;
      if (row < place.end && column < to.columns)
        to.data[row * to.row + column * to.inner] = c[r][j] * factors[r];
    }
  }
}

__device__ __forceinline__ float score_of(const KernelParams& k, float product) {
  const float score = product * float(k.p.scale);
  return k.cap == 0.0f ? score : k.cap * device::tanh(score * k.uncap);
}

// What is left of a gradient on its way through the cap.
__device__ __forceinline__ float slope_of(const KernelParams& k, float score) {
  if (k.cap == 0.0f) return 1.0f;
  const float share = score * k.uncap;
  return 1.0f - share * share;
}

__device__ __forceinline__ bool sees(const BlockSparseParams& p, int query, int place, const Group& keys,
                                     int key) {
  return (visible_keys(p, query, place, keys) >> key & 1u) != 0;
}

__device__ __forceinline__ float across_max(float value) {
  for (int distance = 1; distance < kAcross; distance *= 2)
    value = device::max(value, device::shfl_xor(value, distance));
  return value;
}

__device__ __forceinline__ float across_sum(float value) {
  for (int distance = 1; distance < kAcross; distance *= 2) value += device::shfl_xor(value, distance);
  return value;
}

// ---- forward ----

struct Softmax {
  float ref[kOwnRows], sum[kOwnRows];
};

// Scores become powers in shared memory.
__device__ __forceinline__ void soften(const KernelParams& k, Smem& smem, const Place& place, Scores& s,
                                       Softmax& state, Sums& out) {
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    const int row = own_row() + r;
    float most = -kInfinity;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool seen = sees(k.p, place.first + row, place.offset + row, smem.groups[g], own_column());
      s[r][g] = seen ? score_of(k, s[r][g]) : -kInfinity;
      most = device::max(most, s[r][g]);
    }
    const float before = state.ref[r], now = device::max(before, across_max(most));
    const float scale = before == -kInfinity ? 0.0f : device::exp(before - now);
    state.ref[r] = now;
    state.sum[r] *= scale;
#pragma unroll
    for (int j = 0; j < kMostColumns; ++j) out[r][j] *= scale;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float power = device::exp(s[r][g] - (now == -kInfinity ? 0.0f : now));
      state.sum[r] += power;
      smem.products[0][row][g * kGroup + own_column()] = power;
    }
  }
}

__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ KernelParams k) {
  Smem& smem = device::shared_memory<Smem>();
  const BlockSparseParams& p = k.p;
  float *const queries = tile_behind(smem, p, 0), *const tile = tile_behind(smem, p, 1);
  const int columns = stride(p);
  const Place place = place_of_block(k, p.heads, p.mask.block_q, p.q_len);
  if (place.first >= place.end) return;
  const int64_t kv_head = place.head / (p.heads / p.kv_heads);
  const auto keys = rows_of<const float>(k.k, place.batch, kv_head, p.kv_len);
  const auto values = rows_of<const float>(k.v, place.batch, kv_head, p.kv_len);
  const Walk walk = walk_of_queries(k, place, smem.bounds);
  copy(queries, p, rows_of<const float>(k.q, place.batch, place.head, place.end),
       [&](int r) { return place.first + r; });
  Softmax state;
  Sums out;
  clear(out);
  for (int r = 0; r < kOwnRows; ++r) state.ref[r] = -kInfinity, state.sum[r] = 0.0f;
#pragma unroll 1
  for (int number = 0; walk.begin + number < walk.end; number += kGroups) {
    if (threadIdx.x < kGroups)
      smem.groups[threadIdx.x] = group_of_keys(p, place, walk, number + int(threadIdx.x));
    device::sync_block();
    const auto key_at = [&](int r) { return smem.groups[r / kGroup].first + r % kGroup; };
    copy(tile, p, keys, key_at);
    device::sync_block();
    Scores s;
    multiply_rows(s, queries, tile, p.head_dim, columns);
    soften(k, smem, place, s, state, out);
    device::sync_block();
    copy(tile, p, values, key_at);
    device::sync_block();
    multiply_products(out, smem.products[0], tile, p.value_dim, columns);
    device::sync_block();
  }
  float* lse = static_cast<float*>(p.lse) + (int64_t{place.batch} * p.heads + place.head) * p.q_len;
  float inverses[kOwnRows];
  for (int r = 0; r < kOwnRows; ++r) {
    const float sum = across_sum(state.sum[r]);
    const int row = place.first + own_row() + r;
    inverses[r] = sum == 0.0f ? 0.0f : device::div_rn(1.0f, sum);
    const float log = sum == 0.0f ? -kInfinity : state.ref[r] + device::log2(sum) * kLn2;
    if (own_column() == 0 && row < place.end) lse[row] = log;
  }
  store(out, rows_of<float>(k.out, place.batch, place.head, p.q_len), place, inverses);
}

// ---- backward ----

// A thread a row of the results.
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ KernelParams k) {
  const BlockSparseParams& p = k.p;
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (number >= p.batch * p.heads * p.q_len) return;
  const int64_t batch = number / p.q_len / p.heads, head = number / p.q_len % p.heads, row = number % p.q_len;
  const auto out = rows_of<const float>(k.out, batch, head, p.q_len);
  const auto dout = rows_of<const float>(k.dout, batch, head, p.q_len);
  float sum = p.dlse == nullptr ? 0.0f : -static_cast<const float*>(p.dlse)[number];
  for (int d = 0; d < p.value_dim; ++d) {
    sum = device::fma_rn(out.data[row * out.row + d * out.inner], dout.data[row * dout.row + d * dout.inner],
                         sum);
  }
  const float lse = static_cast<const float*>(p.lse)[number];
  const bool seen = lse != -kInfinity;
  k.delta[number] = seen ? sum : 0.0f;
  k.lse2[number] = seen ? lse : kInfinity;  // powers are of e here
}

// Powers and the gradients of products, of one pair.
struct Pair {
  float power, gradient;
};

__device__ __forceinline__ Pair pair_of(const KernelParams& k, float product, float dpower, float lse,
                                        float delta) {
  const float score = score_of(k, product), power = device::exp(score - lse);
  return {power, power * (dpower - delta) * slope_of(k, score)};
}

__global__ void __launch_bounds__(kThreads) query_grads_kernel(const __grid_constant__ KernelParams k) {
  Smem& smem = device::shared_memory<Smem>();
  const BlockSparseParams& p = k.p;
  float *const queries = tile_behind(smem, p, 0), *const dout = tile_behind(smem, p, 1);
  float *const keys = tile_behind(smem, p, 2), *const values = tile_behind(smem, p, 3);
  const int columns = stride(p);
  const Place place = place_of_block(k, p.heads, p.mask.block_q, p.q_len);
  if (place.first >= place.end) return;
  const int64_t kv_head = place.head / (p.heads / p.kv_heads);
  const int64_t statistics = (int64_t{place.batch} * p.heads + place.head) * p.q_len;
  const Walk walk = walk_of_queries(k, place, smem.bounds);
  const auto row_at = [&](int r) { return place.first + r; };
  copy(queries, p, rows_of<const float>(k.q, place.batch, place.head, place.end), row_at);
  copy(dout, p, rows_of<const float>(k.dout, place.batch, place.head, place.end), row_at);
  Sums dq;
  clear(dq);
#pragma unroll 1
  for (int number = 0; walk.begin + number < walk.end; number += kGroups) {
    if (threadIdx.x < kGroups)
      smem.groups[threadIdx.x] = group_of_keys(p, place, walk, number + int(threadIdx.x));
    device::sync_block();
    const auto key_at = [&](int r) { return smem.groups[r / kGroup].first + r % kGroup; };
    copy(keys, p, rows_of<const float>(k.k, place.batch, kv_head, p.kv_len), key_at);
    copy(values, p, rows_of<const float>(k.v, place.batch, kv_head, p.kv_len), key_at);
    device::sync_block();
    Scores s, d;
    multiply_rows(s, queries, keys, p.head_dim, columns);
    multiply_rows(d, dout, values, p.value_dim, columns);
    for (int r = 0; r < kOwnRows; ++r) {
      const int row = own_row() + r, query = place.first + row;
      for (int g = 0; g < kGroups; ++g) {
        const bool seen =
            query < place.end && sees(p, query, place.offset + row, smem.groups[g], own_column());
        const float gradient =
            seen ? pair_of(k, s[r][g], d[r][g], k.lse2[statistics + query], k.delta[statistics + query])
                       .gradient
                 : 0.0f;
        smem.products[0][row][g * kGroup + own_column()] = gradient;
      }
    }
    device::sync_block();
    multiply_products(dq, smem.products[0], keys, p.head_dim, columns);
    device::sync_block();
  }
  const float scale = float(p.scale);
  store(dq, rows_of<float>(k.dq, place.batch, place.head, p.q_len), place, {scale, scale, scale, scale});
}

__global__ void __launch_bounds__(kThreads) key_grads_kernel(const __grid_constant__ KernelParams k) {
  Smem& smem = device::shared_memory<Smem>();
  const BlockSparseParams& p = k.p;
  float *const keys = tile_behind(smem, p, 0), *const values = tile_behind(smem, p, 1);
  float *const queries = tile_behind(smem, p, 2), *const dout = tile_behind(smem, p, 3);
  const int columns = stride(p);
  const Place place = place_of_block(k, p.kv_heads, p.mask.block_kv, p.kv_len);
  if (place.first >= place.end) return;
  const auto row_at = [&](int r) { return place.first + r; };
  copy(keys, p, rows_of<const float>(k.k, place.batch, place.head, place.end), row_at);
  copy(values, p, rows_of<const float>(k.v, place.batch, place.head, place.end), row_at);
  Sums dk, dv;
  clear(dk);
  clear(dv);
  const int heads_each = p.heads / p.kv_heads;
#pragma unroll 1
  for (int32_t head = place.head * heads_each; head < (place.head + 1) * heads_each; ++head) {
    const int64_t statistics = (int64_t{place.batch} * p.heads + head) * p.q_len;
    const Walk walk = walk_of_keys(k, place, head, smem.bounds);
#pragma unroll 1
    for (int number = walk.begin; number < walk.end; number += kGroups) {
      if (threadIdx.x < kGroups) smem.groups[threadIdx.x] = walk.group(number + int(threadIdx.x));
      device::sync_block();
      const auto query_at = [&](int r) { return smem.groups[r / kGroup].first + r % kGroup; };
      copy(queries, p, rows_of<const float>(k.q, place.batch, head, p.q_len), query_at);
      copy(dout, p, rows_of<const float>(k.dout, place.batch, head, p.q_len), query_at);
      device::sync_block();
      Scores s, d;
      multiply_rows(s, keys, queries, p.head_dim, columns);
      multiply_rows(d, values, dout, p.value_dim, columns);
      for (int g = 0; g < kGroups; ++g) {
        const Group group = smem.groups[g];
        const int query = group.first + own_column();
        for (int r = 0; r < kOwnRows; ++r) {
          const int row = own_row() + r, first = row / kGroup * kGroup;
          const Group seen_keys{place.first + first, group.table, place.offset + first, 0};
          const bool seen = sees(p, query, group.column + own_column(), seen_keys, row - first);
          const Pair pair =
              seen ? pair_of(k, s[r][g], d[r][g], k.lse2[statistics + query], k.delta[statistics + query])
                   : Pair{0.0f, 0.0f};
          smem.products[0][row][g * kGroup + own_column()] = pair.power;
          smem.products[1][row][g * kGroup + own_column()] = pair.gradient;
        }
      }
      device::sync_block();
      multiply_products(dv, smem.products[0], dout, p.value_dim, columns);
      multiply_products(dk, smem.products[1], queries, p.head_dim, columns);
      device::sync_block();
    }
  }
  const float scale = float(p.scale);
  store(dk, rows_of<float>(k.dk, place.batch, place.head, p.kv_len), place, {scale, scale, scale, scale});
  store(dv, rows_of<float>(k.dv, place.batch, place.head, p.kv_len), place, {1.0f, 1.0f, 1.0f, 1.0f});
}

// ---- launches ----

void launch(device::Kernel<KernelParams> kernel, KernelParams k, const Axis& axis, int tiles, int device,
            Stream stream) {
  cut_blocks(k, axis, kRows, kRows, device);
  device::launch(kernel, dim3(grid_of(k, axis)), dim3(kThreads), shared_bytes(k.p, tiles), stream, k);
}

}  // namespace

void block_sparse_fwd_float32(const BlockSparseParams& p, int device, Stream stream) {
  launch(forward_kernel, kernel_params(p), queries_of(p), 2, device, stream);
}

void block_sparse_bwd_float32(const BlockSparseParams& p, int device, Stream stream) {
  const KernelParams k = backward_params(p);
  const int64_t rows = p.batch * p.heads * p.q_len;
  device::launch(delta_kernel, dim3(unsigned(divide_up(rows, kThreads))), dim3(kThreads), 0, stream, k);
  launch(key_grads_kernel, k, keys_of(p), 4, device, stream);
  launch(query_grads_kernel, k, queries_of(p), 4, device, stream);
}

}  // namespace tilewright::attention
