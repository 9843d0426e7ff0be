// What the attention kernels for tensor cores share: tiles in shared memory, products of them, the walk along
// a list of blocks, and which keys a query sees.
//
// A warp owns kSlabs times 16 rows of a product. What is streamed past them comes in tiles made of groups: 16
// neighbours each, all of one block of the mask (blocks are multiples of 16), so a tile takes as many blocks
// of a list as it needs, and a large block is several tiles.
#pragma once

#include "attention/block_sparse.h"
#include "core/integers.h"
#include "device/async_copy.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/mma.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"

namespace tilewright::attention::tiles {

using device::SharedAddress;
using device::Vector;

constexpr int kGroup = 16;
constexpr int kSlab = 16;  // rows of an mma
constexpr float kLog2E = 1.442695041f, kLn2 = 0.6931471806f;
constexpr float kInfinity = __builtin_inff();

// ---- what a kernel is told ----

struct TensorAccess {
  HeadsTensor at;
  int32_t columns;
  bool vectors;  // 16 bytes at a time
};

struct KernelParams {
  BlockSparseParams p;
  TensorAccess q, k, v, out, dout, dq, dk, dv;
  float* lse2;   // [batch][heads][q_len], backward: of base 2; +inf for rows without keys
  float* delta;  // [batch][heads][q_len], backward
  // Products of q and k are (bits & keep) ^ flip of one factor times the other, which leaves |scale| to do.
  uint32_t keep, flip;
  float cap_in, cap, uncap;  // scores are cap * tanh(cap_in * product), uncap 1 / cap; cap 0: the product
  float factor;              // of scores, before exp2
  int32_t tiles_each, rows;  // tiles of a block of the mask's rows, rows of such a tile
};

inline TensorAccess access_to(const HeadsTensor& t, int32_t columns) {
  const bool small = t.row <= 0x7fffffff && t.row >= -0x7fffffff;
  const bool strides = small && t.inner == 1 && t.row % 8 == 0 && t.head % 8 == 0 && t.batch % 8 == 0;
  return {t, columns, strides && columns % 8 == 0 && device::is_aligned(t.data, 16)};
}

// The rows of a kernel: `heads` times `length` of them, in blocks of the mask.
struct Axis {
  int64_t heads, length;
  int32_t block;
};

inline Axis queries_of(const BlockSparseParams& p) { return {p.heads, p.q_len, p.mask.block_q}; }
inline Axis keys_of(const BlockSparseParams& p) { return {p.kv_heads, p.kv_len, p.mask.block_kv}; }

inline int64_t thread_blocks(const KernelParams& k, const Axis& axis) {
  return k.p.batch * axis.heads * divide_up(axis.length, axis.block) * k.tiles_each;
}

// Says how many rows of a block of the mask a thread block takes, and returns how many warps it needs for
// them: fewer than it could where there would be multiprocessors without any.
inline int cut_blocks(KernelParams& k, const Axis& axis, int32_t most_rows, int32_t warp_rows, int device) {
  const int wanted = device::multiprocessor_count(device);
  for (;; most_rows /= 2) {
    k.tiles_each = int32_t(divide_up(axis.block, most_rows));
    if (most_rows <= warp_rows || thread_blocks(k, axis) >= wanted) break;
  }
  const int64_t warps = divide_up(divide_up(axis.block, k.tiles_each), warp_rows);
  k.rows = int32_t(warps) * warp_rows;
  return int(warps);
}

inline KernelParams kernel_params(const BlockSparseParams& p) {
  KernelParams k{};
  k.p = p;
  k.q = access_to(p.q, p.head_dim);
  k.k = access_to(p.k, p.head_dim);
  k.v = access_to(p.v, p.value_dim);
  k.out = access_to(p.out, p.value_dim);
  k.dout = access_to(p.dout, p.value_dim);
  k.dq = access_to(p.dq, p.head_dim);
  k.dk = access_to(p.dk, p.head_dim);
  k.dv = access_to(p.dv, p.value_dim);
  const float scale = float(p.scale < 0 ? -p.scale : p.scale), cap = float(p.softcap);
  k.keep = scale == 0.0f ? 0u : ~0u;
  k.flip = p.scale < 0 ? 0x80008000u : 0u;
  k.cap = cap;
  k.cap_in = cap == 0.0f ? 0.0f : scale / cap;
  k.uncap = cap == 0.0f ? 0.0f : 1.0f / cap;
  k.factor = cap != 0.0f || scale == 0.0f ? kLog2E : scale * kLog2E;
  return k;
}

inline KernelParams backward_params(const BlockSparseParams& p) {
  KernelParams k = kernel_params(p);
  k.lse2 = static_cast<float*>(p.workspace);
  k.delta = k.lse2 + p.batch * p.heads * p.q_len;
  return k;
}

// Rows of one head of a tensor.
template <class T>
struct Rows {
  T* data;
  int64_t row, inner;
  int32_t count, columns;
  bool vectors;
};

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const TensorAccess& t, int64_t batch, int64_t head,
                                           int64_t count) {
  T* data = static_cast<T*>(t.at.data) + batch * t.at.batch + head * t.at.head;
  return {data, t.at.row, t.at.inner, int32_t(count), t.columns, t.vectors};
}

// ---- tiles in shared memory ----

// Element (row, 8 chunk) of a tile of kDim columns. Chunks of 16 bytes change places by the row, so that
// neither the eight rows of a matrix nor a row's chunks meet in a bank.
template <int kDim>
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kDim + ((chunk ^ (row & 7)) << 3);
}

template <class T>
__device__ __forceinline__ Vector<T, 8> load_elements(const Rows<const T>& rows, int row, int column) {
  Vector<T, 8> chunk;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = row < rows.count && column + i < rows.columns;
    chunk[i] = inside ? rows.data[row * rows.row + (column + i) * rows.inner] : T{0};
  }
  return chunk;
}

template <class T>
__device__ __forceinline__ Vector<T, 8> load_chunk(const Rows<const T>& rows, int row, int column) {
  if (!rows.vectors || row >= rows.count || column >= rows.columns) return load_elements(rows, row, column);
  return device::load(reinterpret_cast<const Vector<T, 8>*>(rows.data + row * rows.row + column));
}

// Begins to copy `count` rows of a tile, row r of it being rows row_at(r) of the tensor; those that do not
// exist become zero.
template <int kDim, class T, class RowAt>
__device__ __forceinline__ void copy_tile(T* tile, const Rows<const T>& rows, int count,
                                          const RowAt& row_at) {
  constexpr unsigned kChunks = kDim / 8;
  if (rows.vectors) {
    // A thread's chunk is always the same: a warp or more of threads are whole rows of them.
    const unsigned thread = device::fresh(threadIdx.x);  // nothing of it stays in registers between tiles
    const int chunk = int(thread % kChunks), stride = int(rows.row);
    const T* from = rows.data + chunk * 8;
    const bool exists = chunk * 8 < rows.columns;
#pragma unroll 1
    for (int r = int(thread / kChunks); r < count; r += int(blockDim.x / kChunks)) {
      const int row = row_at(r);
      const bool inside = exists && row < rows.count;
      device::cp_async<16>(tile + place_of<kDim>(r, chunk), from + int64_t{inside ? row : 0} * stride,
                           inside);
    }
  } else {
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < unsigned(count) * kChunks; i += blockDim.x) {
      const int r = int(i / kChunks), chunk = int(i % kChunks);
      device::store(reinterpret_cast<Vector<T, 8>*>(tile + place_of<kDim>(r, chunk)),
                    load_elements(rows, row_at(r), chunk * 8));
    }
  }
}

// Writes a warp's results, by way of the rows [first, first + 16 kSlabs) of a tile that only it uses, to rows
// from row0 + first on, below `end`.
template <int kDim, class T, int kSlabs>
__device__ __forceinline__ void store_rows(T* tile, int first, const float (&c)[kSlabs][kDim / 8][4],
                                           const Rows<T>& to, int row0, int end) {
  constexpr int kChunks = kDim / 8;
  const int lane = device::lane_id(), g = lane / 4, t = lane % 4;
  device::sync_warp();
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* pair = tile + place_of<kDim>(first + s * kSlab + half * 8 + g, n) + 2 * t;
        const Vector<T, 2> value = device::from_float2<T>({c[s][n][2 * half], c[s][n][2 * half + 1]});
        device::store(reinterpret_cast<Vector<T, 2>*>(pair), value);
      }
    }
  }
  device::sync_warp();
#pragma unroll 1
  for (int i = lane; i < kSlabs * kSlab * kChunks; i += device::kWarpSize) {
    const int r = first + i / kChunks, column = i % kChunks * 8, row = row0 + r;
    if (row >= end || column >= to.columns) continue;
    const auto chunk =
        device::load(reinterpret_cast<const Vector<T, 8>*>(tile + place_of<kDim>(r, i % kChunks)));
    T* target = to.data + row * to.row + column * to.inner;
    if (to.vectors) {
      device::store(reinterpret_cast<Vector<T, 8>*>(target), chunk);
    } else {
      for (int j = 0; j < 8 && column + j < to.columns; ++j) target[j * to.inner] = chunk[j];
    }
  }
}

// ---- products ----

template <int kSlabs, int kTiles>
__device__ __forceinline__ void clear(float (&c)[kSlabs][kTiles][4]) {
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[s][n][i] = 0.0f;
    }
  }
}

template <int kSlabs, int kTiles>
__device__ __forceinline__ void scale_by(float (&c)[kSlabs][kTiles][4], float factor) {
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[s][n][i] *= factor;
    }
  }
}

// Where a lane finds its row of an 8 x 8 matrix for ldmatrix; matrices 1 and 2 are below and to the right of
// matrix 0 (kDown), or the other way round.
template <int kDim, bool kDown>
struct MatrixReader {
  SharedAddress start;
  int row, chunk;

  __device__ __forceinline__ explicit MatrixReader(const void* tile, int first_row = 0) {
    const int matrix = device::lane_id() / 8, below = kDown ? matrix % 2 : matrix / 2;
    // Else the compiler would keep the places of a whole tile in registers from one tile to the next.
    row = int(device::fresh(uint32_t(device::lane_id() % 8)));
    chunk = kDown ? matrix / 2 : matrix % 2;
    start = device::shared_address(tile) + SharedAddress((first_row + below * 8 + row) * kDim * 2);
  }
  // Of the 16 x 16 elements from (16 down, 16 right) on.
  __device__ __forceinline__ SharedAddress at(int down, int right) const {
    return start + SharedAddress(down * 16 * kDim * 2) + SharedAddress(((right * 2 + chunk) ^ row) << 4);
  }
};

// c = a bᵀ, rows of both along kDim, zeros from `depth` on. a: this warp's rows, first_row on; its bits are
// taken & keep ^ flip.
template <class T, int kDim, int kSlabs, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&c)[kSlabs][kTiles][4], const T* a, int first_row,
                                              const T* b, int depth, uint32_t keep, uint32_t flip) {
  const MatrixReader<kDim, true> left(a, first_row);
  const MatrixReader<kDim, false> right(b);
  constexpr int kSteps = kDim <= 64 ? 2 : 4;  // more would hold too much in flight
  clear(c);
#pragma unroll 1
  for (int first = 0; first * 16 < depth; first += kSteps) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = first + step;
      uint32_t rows[kSlabs][4];
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        device::load_matrices(rows[s], left.at(s, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[s][i] = (rows[s][i] & keep) ^ flip;
      }
#pragma unroll
      for (int n = 0; n < kTiles / 2; ++n) {
        uint32_t columns[4];
        device::load_matrices(columns, right.at(n, k));
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          device::mma_m16n8k16<T>(c[s][2 * n], rows[s], columns[0], columns[1]);
          device::mma_m16n8k16<T>(c[s][2 * n + 1], rows[s], columns[2], columns[3]);
        }
      }
    }
  }
}

// c += a b; a in the registers of results, b: rows along a's columns, zeros from column `width` on.
template <class T, int kDim, int kSlabs, int kTiles>
__device__ __forceinline__ void multiply_results(float (&c)[kSlabs][kDim / 8][4],
                                                 const float (&a)[kSlabs][kTiles][4], const T* b, int width) {
  const MatrixReader<kDim, true> right(b);
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t rows[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = a[s][2 * k + i / 2];
        rows[s][i] = device::pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      // Only where there is much to be left out: loads are not moved across a branch.
      if (kDim > 128 && n % 4 == 0 && n * 16 >= width) break;
      uint32_t columns[4];
      device::load_matrices_transposed(columns, right.at(k, n));
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        device::mma_m16n8k16<T>(c[s][2 * n], rows[s], columns[0], columns[1]);
        device::mma_m16n8k16<T>(c[s][2 * n + 1], rows[s], columns[2], columns[3]);
      }
    }
  }
}

// ---- walks ----

// 16 neighbours of an axis in a tile.
struct Group {
  int32_t first;   // the axis' length or beyond: it does not exist
  int32_t table;   // of bits; -1: the block is full
  int32_t column;  // place in the block
  int32_t masked;  // not all of it is visible to all
};

// Of so many tiles the groups are kept: a warp may still look at the last one's while the next one's are
// named.
constexpr int kGroupStages = 4;

template <int kGroups>
__device__ __forceinline__ bool any_masked(const Group* groups) {
  int32_t masked = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) masked |= groups[g].masked;
  return masked != 0;
}

// The groups of a list in their order, numbers [begin, end).
struct Walk {
  const int32_t *indices, *bits;
  int32_t block, length, begin, end, tables;

  // What does not exist, or is named by no table, is seen by nobody.
  __device__ __forceinline__ Group group(int number) const {
    if (number >= end) return {length, -1, 0, 1};
    const int each = block / kGroup, entry = number / each, column = number % each * kGroup;
    const int32_t index = indices[entry], table = bits == nullptr ? -1 : bits[entry];
    if (uint32_t(index) >= uint32_t(divide_up(length, block)) || table < -1 || table >= tables)
      return {length, -1, 0, 1};
    return {index * block + column, table, column, table >= 0 || index * block + column + kGroup > length};
  }
};

// A list without what no row of this thread block can see: useful(first, last) says whether neighbours are,
// and is true of a run of the list's blocks; of these, elements outside of [from, to) are left out too.
struct WalkRange {
  bool all;  // useful is always true
  int32_t from, to;
};

template <class Useful>
__device__ __forceinline__ Walk walk_along(const BlockLists& lists, int64_t row, int32_t block,
                                           int32_t length, int32_t tables, const WalkRange& range,
                                           int32_t (&bounds)[2], const Useful& useful) {
  const int32_t* indices = lists.indices + row * lists.capacity;
  int32_t count = lists.counts[row] < lists.capacity ? lists.counts[row] : int32_t(lists.capacity);
  int32_t first = 0;
  if (!range.all) {
    const auto holds = [&](int32_t entry) {
      if (entry < 0 || entry >= count) return false;
      const int64_t start = int64_t{indices[entry]} * block;
      return start >= 0 && start < length && useful(start, smaller(start + block, length) - 1);
    };
    device::sync_block();
    if (threadIdx.x == 0) bounds[0] = bounds[1] = 0;
    device::sync_block();
    for (int32_t entry = int32_t(threadIdx.x); entry < count; entry += int32_t(blockDim.x)) {
      if (!holds(entry)) continue;
      if (!holds(entry - 1)) bounds[0] = entry;
      if (!holds(entry + 1)) bounds[1] = entry + 1;
    }
    device::sync_block();
    first = bounds[0];
    count = bounds[1] - first;
  }
  const int32_t* bits = lists.bits == nullptr ? nullptr : lists.bits + row * lists.capacity + first;
  if (count <= 0) return {indices, bits, block, length, 0, 0, tables};
  indices += first;
  const int64_t start = int64_t{indices[0]} * block, last = int64_t{indices[count - 1]} * block;
  const int64_t kept = divide_up(smaller(larger(smaller(range.to, length) - last, 0), block), kGroup);
  const int64_t end = int64_t{count - 1} * (block / kGroup) + kept;
  const int64_t skipped = smaller(larger(range.from - start, 0) / kGroup, end);
  return {indices, bits, block, length, int32_t(skipped), int32_t(end), tables};
}

// ---- which keys a query sees ----

// Bit j: the query at this place of its block sees the group's key j. Slabs may reach beyond their block.
__device__ __forceinline__ uint32_t visible_keys(const BlockSparseParams& p, int query, int place,
                                                 const Group& keys) {
  if (query >= p.q_len || place >= p.mask.block_q || keys.column >= p.mask.block_kv) return 0;
  const KeyRange range = key_range(p, query);
  const int64_t from = range.from - keys.first, to = range.to - keys.first;
  if (from >= kGroup || to <= 0) return 0;
  uint32_t seen = to >= kGroup ? 0xffffu : (1u << to) - 1u;
  if (from > 0) seen &= ~0u << from;
  if (keys.table < 0) return seen;
  const int64_t line = int64_t{keys.table} * p.mask.block_q + place;
  const int words = (p.mask.block_kv + 31) / 32;
  return seen & p.mask.tables[line * words + keys.column / 32] >> keys.column % 32;
}

// What a thread's rows of a warp's slabs see of a tile of kGroups groups; its lane's own share of the words.
template <int kSlabs, int kGroups>
struct RowSight {
  uint32_t words[kSlabs][2];

  // first: the query that the warp's first row is; place: its place in its block.
  __device__ __forceinline__ RowSight(const BlockSparseParams& p, const Group* groups, int first, int place) {
    const Group keys = groups[device::lane_id() % kGroups];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = s * kSlab + half * 8 + device::lane_id() / 4;
        words[s][half] = visible_keys(p, first + row, place + row, keys);
      }
    }
  }
  // Of group g, all lanes together: bit 0 for the thread's first column of an even tile, 8 of the odd one.
  __device__ __forceinline__ uint32_t of_group(int slab, int half, int g) const {
    const uint32_t word = device::shfl(words[slab][half], (device::lane_id() & ~3) + g);
    return word >> 2 * (device::lane_id() % 4);
  }
};

// The same where queries are the columns, two groups of them, and the thread's rows are keys.
template <int kSlabs>
struct ColumnSight {
  uint32_t words[kSlabs];

  // first: the key that the warp's first row is; place: its place in its block.
  __device__ __forceinline__ ColumnSight(const BlockSparseParams& p, const Group* groups, int first,
                                         int place) {
    const int lane = device::lane_id();
    const Group queries = groups[lane / kGroup];
    const int in_group = lane % kGroup;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const Group keys{first + s * kSlab, queries.table, place + s * kSlab, 0};
      words[s] = visible_keys(p, queries.first + in_group, queries.column + in_group, keys);
    }
  }
  // All lanes together: bit 0 for the slab's upper row of the thread, 8 for the lower one.
  __device__ __forceinline__ uint32_t of_column(int slab, int column) const {
    return device::shfl(words[slab], column) >> device::lane_id() / 4;
  }
};

// ---- scores ----

// Exact to about 1e-7, which is what a score of base 2 can take.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - 2.0f * device::rcp_approx(1.0f + device::exp2_approx(x * (2.0f * kLog2E)));
}

template <int kSlabs, int kTiles>
__device__ __forceinline__ void cap_scores(float (&s)[kSlabs][kTiles][4], const KernelParams& k) {
  if (k.cap == 0.0f) return;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[slab][n][i] = k.cap * tanh_of(k.cap_in * s[slab][n][i]);
    }
  }
}

// From a score and the gradient of its power p: the power, and the gradient of the score before it is capped.
__device__ __forceinline__ void differentiate(const KernelParams& k, float& s, float& d, float lse2,
                                              float delta) {
  const float power = device::exp2_approx(device::fma_rn(s, k.factor, -lse2));
  d = power * (d - delta);
  if (k.cap != 0.0f) {
    const float share = s * k.uncap;
    d *= 1.0f - share * share;
  }
  s = power;
}

// ---- who does what ----

// A thread block's rows: of one block of the mask, of one head.
struct Place {
  int32_t batch, head, block, first, end, offset;  // rows [first, end); offset: of `first` in the block
};

// Heads and then tiles, the last rows first: under a causal mask they have most to do.
__device__ __forceinline__ Place place_of_block(const KernelParams& k, int32_t heads, int32_t block,
                                                int64_t length) {
  const uint32_t tiles = uint32_t(divide_up(length, block)) * uint32_t(k.tiles_each);
  const uint32_t head = blockIdx.x / tiles, tile = tiles - 1 - blockIdx.x % tiles;
  const int32_t index = int32_t(tile / uint32_t(k.tiles_each));
  const int32_t offset = int32_t(tile % uint32_t(k.tiles_each)) * k.rows;
  const int64_t first = int64_t{index} * block + offset;
  const int64_t end = smaller(smaller(first + k.rows, int64_t{index + 1} * block), length);
  return {int32_t(head / uint32_t(heads)),
          int32_t(head % uint32_t(heads)),
          index,
          int32_t(first),
          int32_t(end),
          offset};
}

// The list of the thread block's queries, without what comes after the last of them or before the first.
__device__ __forceinline__ Walk walk_of_queries(const KernelParams& k, const Place& place,
                                                int32_t (&bounds)[2]) {
  const BlockSparseParams& p = k.p;
  const int64_t row = row_of(p.mask.q2k, place.batch, place.head, place.block);
  const int64_t from = key_range(p, place.first).from, to = key_range(p, place.end - 1).to;
  const WalkRange range{p.key_to == nullptr && !p.causal, int32_t(from), int32_t(to)};
  return walk_along(p.mask.q2k, row, p.mask.block_kv, int32_t(p.kv_len), p.tables, range, bounds,
                    [&](int64_t first, int64_t last) { return first < to && last >= from; });
}

// Group `number` of that walk.
__device__ __forceinline__ Group group_of_keys(const BlockSparseParams& p, const Place& place,
                                               const Walk& walk, int number) {
  Group group = walk.group(walk.begin + number);
  group.masked |=
      group.first < key_range(p, place.end - 1).from || group.first + kGroup > key_range(p, place.first).to;
  return group;
}

// The list of the queries of one head that see this thread block's keys.
__device__ __forceinline__ Walk walk_of_keys(const KernelParams& k, const Place& place, int64_t head,
                                             int32_t (&bounds)[2]) {
  const BlockSparseParams& p = k.p;
  const int64_t row = row_of(p.mask.k2q, place.batch, head, place.block);
  const bool ranged = p.key_to != nullptr;
  const int64_t first_query = p.causal && !ranged ? place.first - p.kv_len + p.q_len : 0;
  const WalkRange range{!ranged && !p.causal, int32_t(larger(first_query, 0)), int32_t(p.q_len)};
  return walk_along(p.mask.k2q, row, p.mask.block_q, int32_t(p.q_len), p.tables, range, bounds,
                    [&](int64_t first, int64_t last) {
                      return key_range(p, last).to > place.first && key_range(p, first).from < place.end;
                    });
}

inline unsigned grid_of(const KernelParams& k, const Axis& axis) {
  const int64_t blocks = thread_blocks(k, axis);
  check_value(blocks <= 0x7fffffff && k.p.q_len <= 0x7fffff00 && k.p.kv_len <= 0x7fffff00,
              "q: too many queries, keys or heads for one launch");
  return unsigned(blocks);
}

}  // namespace tilewright::attention::tiles
