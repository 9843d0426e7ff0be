// What the CUDA kernels of the block-sparse linear layer share; the formulas are in block_sparse_linear.h.
//
// y and dx are one problem, a Product: of each tile of tokens and each list of blocks (a block row for y, a
// block column for dx),
//
//   out[token, list] = sum over the blocks of the list of in[token, part of the block] block^T (dx: block).
//
// The parts of a list's blocks, one behind the other, are its depth. It is walked in stages of kDepth, made
// of chunks of 8 neighbours, which is 16 bytes and the smallest block: a stage is part of a large block as
// well as a row of small ones.
#pragma once

#include "core/half.h"
#include "core/integers.h"
#include "device/async_copy.h"
#include "device/half.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/mma.h"
#include "device/qualifiers.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "prune/activation_cuda.h"
#include "prune/block_sparse_linear.h"

namespace tilewright::prune::blocks {

using device::SharedAddress;
using device::Vector;

constexpr int kChunk = 8;
constexpr int kDepth = 64;  // of a stage
constexpr int kDepthChunks = kDepth / kChunk;
constexpr int kStages = 3;
constexpr int kMostWarps = 8;
constexpr int kMostThreads = kMostWarps * device::kWarpSize;

// ---- what a kernel is told ----

// A matrix of so many columns; vectors: 16 bytes at a time.
struct Access {
  Matrix at;
  int32_t columns;
  bool vectors;
};

struct Product {
  Access in, out, linear;  // linear: what the activation is applied to; absent for dx
  const void* values;
  const void* bias;      // null: none
  const int32_t* first;  // of each list
  const int32_t* part;   // of each of its blocks: which part of `in` it takes,
  const int32_t* block;  // and its number; null: it is its place
  const int32_t* order;  // the lists, longest first
  int64_t tokens, lists;
  int32_t depth_bits, width_bits;  // of a block, log2: 3..7
  int32_t token_tile;              // rows of a thread block
  int32_t token_tiles, together;   // of these, so many neighbours share a walk through the lists
  int32_t slices;                  // of a list's width
  Activation activation;
  DType dtype;
  bool values_vectors;
};

// dW. Blocks that are neighbours in a block row are taken together as groups of their numbers, cut where a
// row ends: a group begins at a multiple of its size or at the beginning of a row, so that thread blocks know
// theirs without a search.
struct WeightProduct {
  Access dz, x;
  void* values;
  const int32_t *first, *column, *row;
  int64_t tokens, blocks, rows;
  int32_t row_bits, column_bits;  // of a block, log2
  int32_t together_bits;          // blocks of a group, log2
  int32_t slices, across;         // of a block's rows, of its columns
  DType dtype;
  bool values_vectors;
};

struct BlockGroup {
  int64_t begin;
  int32_t count, row;
};

inline int64_t groups_of(const WeightProduct& p) {
  return divide_up(p.blocks, int64_t{1} << p.together_bits) + (p.together_bits == 0 ? 0 : p.rows);
}

// First those that begin at a multiple of the size, then the rows' that do not; count 0: there is none.
__device__ __forceinline__ BlockGroup group_of(const WeightProduct& p, uint32_t index) {
  const int64_t size = int64_t{1} << p.together_bits;
  const int64_t aligned = (p.blocks + size - 1) >> p.together_bits, row = int64_t{index} - aligned;
  const int64_t begin = row < 0 ? int64_t{index} << p.together_bits : p.first[row];
  if (row >= 0 && ((begin & (size - 1)) == 0 || begin == p.first[row + 1])) return {0, 0, 0};
  const int32_t found = row < 0 ? p.row[begin] : int32_t(row);
  const int64_t end = smaller(((begin >> p.together_bits) + 1) << p.together_bits, p.first[found + 1]);
  return {begin, int32_t(end - begin), found};
}

void block_sparse_product_mma(const Product&, bool transposed, int device, Stream);
void block_sparse_product_few(const Product&, Stream);
bool block_sparse_product_sm90_fits(const Product&, bool transposed, int64_t blocks, int device);
void block_sparse_product_sm90(const Product&, bool transposed, int64_t blocks, int device, Stream);
bool block_sparse_weight_sm90_fits(const WeightProduct&, int device);
void block_sparse_weight_sm90(const WeightProduct&, int device, Stream);
void block_sparse_weight_mma(const WeightProduct&, int device, Stream);
void block_sparse_product_float32(const Product&, bool transposed, Stream);
void block_sparse_weight_float32(const WeightProduct&, Stream);

constexpr int kFewTokens = 8;

constexpr int32_t log2_of(int32_t power) {
  int32_t bits = 0;
  while (1 << bits < power) ++bits;
  return bits;
}

inline Access access_to(const Matrix& at, int64_t columns, DType dtype) {
  const int64_t each = 16 / itemsize(dtype);
  const bool vectors =
      at.column == 1 && at.row % each == 0 && columns % each == 0 && device::is_aligned(at.data, 16);
  return {at, int32_t(columns), vectors};
}

// ---- who does what ----

// Neighbouring tiles of tokens walk through the lists together, longest lists first, so that their part of
// `in` stays in the L2 cache: 2048 tokens.
inline int32_t tiles_together(int64_t token_tiles) {
  constexpr int64_t kMost = 8;
  return int32_t(divide_up(token_tiles, divide_up(token_tiles, kMost)));
}

inline unsigned thread_blocks_of(const Product& p) {
  const int64_t blocks = divide_up(p.token_tiles, p.together) * p.together * p.lists * p.slices;
  check_value(blocks <= 0x7fffffff, "x: too many tokens for one launch");
  return unsigned(blocks);
}

// A tile of tokens, which may lie behind the last one, and columns of a list.
struct Work {
  int64_t first_token, list;
  int32_t first_column;  // of the list's width
  int32_t begin, count;  // blocks
  int32_t stages;
};

__device__ __forceinline__ Work work_of(const Product& p, uint32_t index, int columns) {
  const uint32_t together = uint32_t(p.together), slices = uint32_t(p.slices);
  const uint32_t each = uint32_t(p.lists) * slices * together;
  const uint32_t group = index / each, rest = index % each;
  const uint32_t tile = group * together + rest % together, slice = rest / together;
  Work work;
  work.first_token = int64_t{tile} * p.token_tile;
  work.list = p.order[slice / slices];
  work.first_column = int32_t(slice % slices) * columns;
  work.begin = p.first[work.list];
  work.count = p.first[work.list + 1] - work.begin;
  work.stages = int32_t(divide_up(int64_t{work.count} << p.depth_bits, kDepth));
  return work;
}

// ---- tiles in shared memory ----

// By how much the 16-byte chunks of a row change places, so that neither the eight rows of a matrix nor a
// row's chunks meet in a bank: rows of fewer than 8 chunks share a line of the banks.
__device__ __forceinline__ int turn_of(int row, int width) {
  return width >= 64 ? row & 7 : width == 32 ? (row >> 1) & 3 : (row >> 2) & 1;
}

// Element (row, 8 chunk) of a tile so wide.
__device__ __forceinline__ int place_of(int row, int chunk, int width) {
  return row * width + ((chunk ^ turn_of(row, width)) << 3);
}

// Where a lane finds its row of an 8 x 8 matrix for ldmatrix; matrices 1 and 2 are below and to the right of
// matrix 0 (kDown), or the other way round.
template <bool kDown>
struct MatrixReader {
  SharedAddress start;
  int chunk, turn, pitch;

  __device__ __forceinline__ MatrixReader(const void* tile, int width, int first_row, int first_column) {
    const int matrix = device::lane_id() / 8, below = kDown ? matrix % 2 : matrix / 2;
    const int row = device::lane_id() % 8;
    pitch = width * 2;
    chunk = first_column / kChunk + (kDown ? matrix / 2 : matrix % 2);
    turn = turn_of(row, width);
    start = device::shared_address(tile) + SharedAddress((first_row + below * 8 + row) * pitch);
  }
  // Of the 16 x 16 elements from (16 down, 16 right) on.
  __device__ __forceinline__ SharedAddress at(int down, int right) const {
    return start + SharedAddress(down * 16 * pitch) + SharedAddress(((right * 2 + chunk) ^ turn) << 4);
  }
};

// 8 neighbours of a row, with zeros for what does not exist.
template <class T>
__device__ __forceinline__ Vector<T, 8> load_chunk(const Access& from, int64_t row, int64_t rows,
                                                   int column) {
  Vector<T, 8> chunk;
  const T* at = static_cast<const T*>(from.at.data) + row * from.at.row + column * from.at.column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    chunk[i] = row < rows && column + i < from.columns ? at[i * from.at.column] : T{};
  }
  return chunk;
}

// 8 neighbours of a row that is dense but perhaps not aligned.
template <class T>
__device__ __forceinline__ Vector<T, 8> load_dense(const T* at, bool exists) {
  Vector<T, 8> chunk;
#pragma unroll
  for (int i = 0; i < 8; ++i) chunk[i] = exists ? at[i] : T{};
  return chunk;
}

template <class T>
__device__ __forceinline__ void store_chunk(const Access& to, int64_t row, int column,
                                            const Vector<T, 8>& chunk) {
  T* at = static_cast<T*>(to.at.data) + row * to.at.row + column * to.at.column;
  if (to.vectors) return device::store(reinterpret_cast<Vector<T, 8>*>(at), chunk);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < to.columns) at[i * to.at.column] = chunk[i];
  }
}

// 8 neighbours of a token's result before the activation, already of T: so y does not depend on whether z is
// kept, and is what torch's layer and then its activation give.
template <class T>
__device__ __forceinline__ void store_result(const Product& p, int64_t token, int column,
                                             Vector<T, 8> chunk) {
  if (p.linear.at.data != nullptr) store_chunk(p.linear, token, column, chunk);
  if (p.activation != Activation::kNone) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      chunk[i] = device::from_float<T>(activate<false>(device::to_float(chunk[i]), p.activation));
  }
  store_chunk(p.out, token, column, chunk);
}

// A row of the blocks' gradients and 8 of a group's columns; what sticks out of the weight is zero, whatever
// x is there.
template <class T>
__device__ __forceinline__ void store_gradient(const WeightProduct& p, const BlockGroup& group, int row,
                                               int column, Vector<T, 8> chunk) {
  const int place = column >> p.column_bits, within = column & ((1 << p.column_bits) - 1);
  if (place >= group.count || row >= 1 << p.row_bits) return;
  const int64_t number = group.begin + place;
  const int64_t out = (int64_t{group.row} << p.row_bits) + row;
  const int64_t in = (int64_t{p.column[number]} << p.column_bits) + within;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (out >= p.dz.columns || in + i >= p.x.columns) chunk[i] = T{};
  }
  T* to = static_cast<T*>(p.values) + (((number << p.row_bits) + row) << p.column_bits) + within;
  if (p.values_vectors) return device::store(reinterpret_cast<Vector<T, 8>*>(to), chunk);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = chunk[i];
}

// ---- products ----

template <int kSlabs, int kTiles>
using Sums = float[kSlabs][kTiles][4];  // of a warp: 16 kSlabs rows, 8 kTiles columns

template <int kSlabs, int kTiles>
__device__ __forceinline__ void clear(Sums<kSlabs, kTiles>& sums) {
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][n][i] = 0.0f;
    }
  }
}

template <bool kTransposed>
__device__ __forceinline__ void load_fragments(uint32_t (&registers)[4], SharedAddress row) {
  if constexpr (kTransposed)
    device::load_matrices_transposed(registers, row);
  else
    device::load_matrices(registers, row);
}

// sums += a b over a stage. A tile is transposed if it has its depth downwards, and then its reader knows.
template <class T, bool kTransposedA, bool kTransposedB, int kSlabs, int kTiles>
__device__ __forceinline__ void multiply_stage(Sums<kSlabs, kTiles>& sums,
                                               const MatrixReader<!kTransposedA>& a,
                                               const MatrixReader<kTransposedB>& b) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t rows[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
      load_fragments<kTransposedA>(rows[s], kTransposedA ? a.at(k, s) : a.at(s, k));
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t columns[4];
      load_fragments<kTransposedB>(columns, kTransposedB ? b.at(k, n) : b.at(n, k));
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        device::mma_m16n8k16<T>(sums[s][2 * n], rows[s], columns[0], columns[1]);
        device::mma_m16n8k16<T>(sums[s][2 * n + 1], rows[s], columns[2], columns[3]);
      }
    }
  }
}

// Adds the bias of the columns from first_column on, or as far as there are any.
template <class T, int kSlabs, int kTiles>
__device__ __forceinline__ void add_bias(Sums<kSlabs, kTiles>& sums, const Product& p, int64_t first_column) {
  if (p.bias == nullptr) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t column = first_column + n * 8 + device::lane_id() % 4 * 2 + i;
      if (column >= p.out.columns) continue;
      const float bias = device::to_float(static_cast<const T*>(p.bias)[column]);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        sums[s][n][i] += bias;
        sums[s][n][2 + i] += bias;
      }
    }
  }
}

// Hands a warp's results on to write(row, column, chunk), 8 neighbours of a row at a time, by way of a tile
// that only it uses.
template <class T, int kSlabs, int kTiles, class Write>
__device__ __forceinline__ void store_sums(T* tile, const Sums<kSlabs, kTiles>& sums, const Write& write) {
  constexpr int kWidth = kTiles * 8;
  const int lane = device::lane_id(), g = lane / 4, t = lane % 4;
  device::sync_warp();
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* pair = tile + place_of(s * 16 + half * 8 + g, n, kWidth) + 2 * t;
        device::store(reinterpret_cast<Vector<T, 2>*>(pair),
                      device::from_float2<T>({sums[s][n][2 * half], sums[s][n][2 * half + 1]}));
      }
    }
  }
  device::sync_warp();
#pragma unroll 1
  for (int i = lane; i < kSlabs * 16 * kTiles; i += device::kWarpSize) {
    const int row = i / kTiles, chunk = i % kTiles;
    write(row, chunk * kChunk,
          device::load(reinterpret_cast<const Vector<T, 8>*>(tile + place_of(row, chunk, kWidth))));
  }
}

}  // namespace tilewright::prune::blocks
