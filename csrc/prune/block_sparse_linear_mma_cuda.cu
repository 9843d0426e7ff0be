// y and dx of the block-sparse linear layer in 16 bits on tensor cores (sm_80 and later):
//
//   y = activation(x W^T + bias),  dx = dz W
//
// A thread block takes up to 256 tokens and up to 128 columns of one list of blocks, a warp 64 x 64 of the
// result, or 32 rows of all the columns if there are fewer. Stages of the depth are copied two ahead of the
// one that is multiplied. Sums run along the list in one order, whatever the tiles: no bit depends on them.
//
// Roofline, of a stage of 256 tokens and 128 columns: 4.2 MFLOP, 2048 clocks of sm_80's tensor cores (of
// sm_90's about 1600 by mma.sync); 128 KB of fragments out of shared memory and 48 KB into it, 1400 clocks;
// 48 KB from L2, 85 FLOP a byte. With blocks of 64 it is 51 FLOP a byte, of 16 it is 15, and L2 the limit.
#include "device/launch.h"
#include "prune/block_sparse_linear_cuda.h"

namespace tilewright::prune::blocks {
namespace {

constexpr int kSlotStages = 4;  // a warp may still look at one stage's while a later one's are named

// A chunk of the depth: where it is in `in` (-1: behind the list's end), and its block's number.
struct Slot {
  int32_t column, block;
};

template <int kColumns>
struct Shape {
  static constexpr int kWarpColumns = kColumns < 64 ? kColumns : 64;
  static constexpr int kAcross = kColumns / kWarpColumns;  // warps side by side
  static constexpr int kSlabs = kAcross == 1 ? 2 : 4;
  static constexpr int kWarpRows = 16 * kSlabs;
  static constexpr int kTiles = kWarpColumns / 8;
};

// The tiles of `in`, as many rows as the launch says, are behind it.
template <class T, int kColumns>
struct alignas(128) Smem {
  T blocks[kStages][kColumns * kDepth];
  Slot slots[kSlotStages][kDepthChunks];
};

// Chunk threadIdx.x of a stage: these threads read it well before it is needed, and write it down later.
__device__ __forceinline__ Slot find_slot(const Product& p, const Work& work, int stage) {
  const int depth = stage * kDepth + int(threadIdx.x) * kChunk, place = depth >> p.depth_bits;
  if (threadIdx.x >= kDepthChunks || place >= work.count) return {-1, 0};
  const int within = depth & ((1 << p.depth_bits) - 1), number = work.begin + place;
  return {(p.part[number] << p.depth_bits) + within, p.block == nullptr ? number : p.block[number]};
}

template <class T>
__device__ __forceinline__ void copy_inputs(T* tile, const Product& p, const Work& work, const Slot* slots) {
  const int chunk = int(threadIdx.x) % kDepthChunks, step = int(blockDim.x) / kDepthChunks;
  const int column = slots[chunk].column, first = int(threadIdx.x) / kDepthChunks;
  if (p.in.vectors) {
    const bool exists = column >= 0 && column < p.in.columns;
    const T* data = static_cast<const T*>(p.in.at.data);
    const T* from = data + (work.first_token + first) * p.in.at.row + column;
    const int rows = int(smaller(p.tokens - work.first_token, p.token_tile));
#pragma unroll 2
    for (int r = first; r < p.token_tile; r += step, from += step * p.in.at.row) {
      const bool inside = exists && r < rows;
      device::cp_async<16>(tile + place_of(r, chunk, kDepth), inside ? from : data, inside);
    }
  } else {
#pragma unroll 1
    for (int r = first; r < p.token_tile; r += step) {
      const int64_t rows = column < 0 ? 0 : p.tokens;
      device::store(reinterpret_cast<Vector<T, 8>*>(tile + place_of(r, chunk, kDepth)),
                    load_chunk<T>(p.in, work.first_token + r, rows, column));
    }
  }
}

// The stage's part of the blocks: of y with the depth along the rows of a tile, of dx (kTransposed)
// downwards.
template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void copy_blocks(T* tile, const Product& p, const Work& work, const Slot* slots) {
  constexpr int kWidth = kTransposed ? kColumns : kDepth, kRows = kTransposed ? kDepth : kColumns;
  constexpr int kChunks = kWidth / kChunk;
  const int chunk = int(threadIdx.x) % kChunks, step = int(blockDim.x) / kChunks;
  const T* values = static_cast<const T*>(p.values);
  const int width = 1 << p.width_bits, within = (1 << p.depth_bits) - 1;
#pragma unroll 2
  for (int r = int(threadIdx.x) / kChunks; r < kRows; r += step) {
    const Slot slot = slots[kTransposed ? r / kChunk : chunk];
    const int column = work.first_column + (kTransposed ? chunk * kChunk : r);
    const bool exists = slot.column >= 0 && column < width;
    const int64_t start = int64_t{slot.block} << (p.depth_bits + p.width_bits);
    const int depth = slot.column & within;
    const T* from =
        values + start +
        (kTransposed ? ((depth + r % kChunk) << p.width_bits) + column : (column << p.depth_bits) + depth);
    T* to = tile + place_of(r, chunk, kWidth);
    if (p.values_vectors)
      device::cp_async<16>(to, exists ? from : values, exists);
    else
      device::store(reinterpret_cast<Vector<T, 8>*>(to), load_dense(from, exists));
  }
}

template <class T, int kColumns>
using WarpSums = Sums<Shape<kColumns>::kSlabs, Shape<kColumns>::kTiles>;

template <class T, int kColumns>
__device__ __forceinline__ void finish(WarpSums<T, kColumns>& sums, const Product& p, const Work& work,
                                       int first_row, int first_column, T* tile) {
  using S = Shape<kColumns>;
  const int width = (1 << p.width_bits) - work.first_column - first_column;
  const int64_t column0 = (work.list << p.width_bits) + work.first_column + first_column;
  const int64_t row0 = work.first_token + first_row;
  add_bias<T, S::kSlabs, S::kTiles>(sums, p, column0);
  store_sums<T, S::kSlabs, S::kTiles>(tile, sums, [&](int row, int column, const Vector<T, 8>& chunk) {
    if (row0 + row < p.tokens && column < width && column0 + column < p.out.columns)
      store_result(p, row0 + row, int(column0) + column, chunk);
  });
}

template <class T, int kColumns, bool kTransposed>
__global__ void __launch_bounds__(kMostThreads) product_kernel(const __grid_constant__ Product p) {
  using S = Shape<kColumns>;
  Smem<T, kColumns>& smem = device::shared_memory<Smem<T, kColumns>>();
  T* const inputs = reinterpret_cast<T*>(&smem + 1);
  const int input_size = p.token_tile * kDepth;
  const Work work = work_of(p, blockIdx.x, kColumns);
  if (work.first_token >= p.tokens) return;
  const auto write_slot = [&](int stage, const Slot& slot) {
    if (threadIdx.x < kDepthChunks) smem.slots[stage % kSlotStages][threadIdx.x] = slot;
  };
  const auto begin_copies = [&](int stage) {
    if (stage < work.stages) {
      const Slot* slots = smem.slots[stage % kSlotStages];
      copy_inputs(inputs + stage % kStages * input_size, p, work, slots);
      copy_blocks<T, kColumns, kTransposed>(smem.blocks[stage % kStages], p, work, slots);
    }
    device::cp_async_commit();
  };

  for (int stage = 0; stage < kStages; ++stage) write_slot(stage, find_slot(p, work, stage));
  Slot next = find_slot(p, work, kStages);
  device::sync_block();
  for (int stage = 0; stage + 1 < kStages; ++stage) begin_copies(stage);
  const int warp_row = device::warp_id() / S::kAcross * S::kWarpRows;
  const int warp_column = device::warp_id() % S::kAcross * S::kWarpColumns;
  WarpSums<T, kColumns> sums;
  clear<S::kSlabs, S::kTiles>(sums);
#pragma unroll 1
  for (int stage = 0; stage < work.stages; ++stage) {
    device::cp_async_wait<kStages - 2>();
    device::sync_block();
    write_slot(stage + kStages, next);
    next = find_slot(p, work, stage + kStages + 1);
    begin_copies(stage + kStages - 1);
    const T* rows = inputs + stage % kStages * input_size;
    const MatrixReader<true> a(rows, kDepth, warp_row, 0);
    const T* columns = smem.blocks[stage % kStages];
    const MatrixReader<kTransposed> b(columns, kTransposed ? kColumns : kDepth, kTransposed ? 0 : warp_column,
                                      kTransposed ? warp_column : 0);
    multiply_stage<T, false, kTransposed>(sums, a, b);
  }
  device::cp_async_wait<0>();
  device::sync_block();  // the tiles become the warps' own
  T* const own = inputs + device::warp_id() * S::kWarpRows * S::kWarpColumns;
  finish<T, kColumns>(sums, p, work, warp_row, warp_column, own);
}

template <class T, int kColumns, bool kTransposed>
void launch_product(const Product& p, Stream stream) {
  using S = Shape<kColumns>;
  const size_t bytes = sizeof(Smem<T, kColumns>) + size_t(kStages * p.token_tile * kDepth) * sizeof(T);
  const unsigned blocks = thread_blocks_of(p);
  const int warps = p.token_tile / S::kWarpRows * S::kAcross;
  device::launch(product_kernel<T, kColumns, kTransposed>, dim3(blocks),
                 dim3(unsigned(warps * device::kWarpSize)), bytes, stream, p);
}

template <class T, bool kTransposed>
void choose_columns(const Product& p, int columns, Stream stream) {
  switch (columns) {
    case 128:
      return launch_product<T, 128, kTransposed>(p, stream);
    case 64:
      return launch_product<T, 64, kTransposed>(p, stream);
    case 32:
      return launch_product<T, 32, kTransposed>(p, stream);
    default:
      return launch_product<T, 16, kTransposed>(p, stream);
  }
}

// The largest tiles of which there is one for each multiprocessor, with no more rows than tokens.
int cut(Product& p, int device) {
  const int64_t wanted = device::multiprocessor_count(device);
  const size_t limit = device::shared_memory_limit(device);
  int columns = int(larger(16, int64_t{1} << p.width_bits)), rows = 256;
  const auto least_rows = [&] { return columns == 128 ? 64 : 32; };
  const auto bytes = [&] { return size_t(kStages * kDepth * 2) * size_t(rows + columns) + 1024; };
  const auto thread_blocks = [&] {
    p.slices = int32_t(divide_up(int64_t{1} << p.width_bits, columns));
    p.token_tiles = int32_t(divide_up(p.tokens, rows));
    return p.token_tiles * p.lists * p.slices;
  };
  while (rows > least_rows() && (rows / 2 >= p.tokens || bytes() > limit)) rows /= 2;
  while (thread_blocks() < wanted) {
    if (rows > 64)
      rows /= 2;
    else if (columns > 32)
      columns /= 2;
    else
      break;
  }
  p.token_tile = rows;
  p.together = tiles_together(p.token_tiles);
  return columns;
}

}  // namespace

void block_sparse_product_mma(const Product& given, bool transposed, int device, Stream stream) {
  Product p = given;
  const int columns = cut(p, device);
  if (p.dtype == DType::kFloat16) {
    return transposed ? choose_columns<fp16, true>(p, columns, stream)
                      : choose_columns<fp16, false>(p, columns, stream);
  }
  return transposed ? choose_columns<bf16, true>(p, columns, stream)
                    : choose_columns<bf16, false>(p, columns, stream);
}

}  // namespace tilewright::prune::blocks
