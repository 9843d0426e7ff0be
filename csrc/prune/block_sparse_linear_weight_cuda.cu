// dW of the block-sparse linear layer in 16 bits on tensor cores (sm_80 and later): dz^T x at the blocks that
// are there, and nowhere else.
//
// A thread block takes a block row's part of dz and, for as many neighbours in that row as fit, the parts of
// x that belong to their columns; it walks all tokens, whose stages are copied two ahead. Each sum is one
// thread's and runs along the tokens in order.
//
// Roofline, of a stage of 64 tokens, a block of 128 x 128 and its neighbour: 4.2 MFLOP, 2048 clocks of
// sm_80's tensor cores; 48 KB from L2, 85 FLOP a byte. Four blocks of 64 x 64: 51 FLOP a byte.
#include "device/launch.h"
#include "prune/block_sparse_linear_cuda.h"

namespace tilewright::prune::blocks {
namespace {

template <int kRows>
struct Shape {
  static constexpr int kWarpRows = kRows < 64 ? kRows : 64;
  static constexpr int kDown = kRows / kWarpRows;  // warps one below the other
  static constexpr int kSlabs = kWarpRows / 16;
  static constexpr int kTiles = kDown == 1 ? 4 : 8;
  static constexpr int kWarpColumns = 8 * kTiles;
};

// The tiles of x, as wide as the launch says, are behind it.
template <class T, int kRows>
struct alignas(128) Smem {
  T dz[kStages][kDepth * kRows];
};

// Rows of a stage's tokens: `chunks` chunks each, of which this thread's begins at `column` of the matrix
// (-1: it does not exist).
template <class T>
__device__ __forceinline__ void copy_tokens(T* tile, const Access& from, int64_t tokens, int64_t first_token,
                                            int chunks, int column) {
  const int chunk = int(threadIdx.x) % chunks, step = int(blockDim.x) / chunks, width = chunks * kChunk;
  const int first = int(threadIdx.x) / chunks;
  const int rows = int(smaller(tokens - first_token, kDepth));
  const bool exists = column >= 0 && column < from.columns;
  const T* const data = static_cast<const T*>(from.at.data);
  const T* source = data + (first_token + first) * from.at.row + column * from.at.column;
#pragma unroll 2
  for (int r = first; r < kDepth; r += step, source += step * from.at.row) {
    T* to = tile + place_of(r, chunk, width);
    const bool inside = exists && r < rows;
    if (from.vectors) {
      device::cp_async<16>(to, inside ? source : data, inside);
    } else {
      device::store(reinterpret_cast<Vector<T, 8>*>(to),
                    load_chunk<T>(from, first_token + r, exists ? tokens : 0, column));
    }
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kMostThreads) weight_kernel(const __grid_constant__ WeightProduct p) {
  using S = Shape<kRows>;
  Smem<T, kRows>& smem = device::shared_memory<Smem<T, kRows>>();
  T* const inputs = reinterpret_cast<T*>(&smem + 1);
  const int width = int(blockDim.x), chunks = width / kChunk;  // of a tile of x: 32 columns for each warp
  const BlockGroup group = group_of(p, blockIdx.x);
  if (group.count == 0) return;
  const int row_chunk = int(threadIdx.x) % (kRows / kChunk) * kChunk;
  const int row = row_chunk < 1 << p.row_bits ? (group.row << p.row_bits) + row_chunk : -1;
  const int column_chunk = int(threadIdx.x) % chunks * kChunk, place = column_chunk >> p.column_bits;
  const int within = column_chunk & ((1 << p.column_bits) - 1);
  const int column = place < group.count ? (p.column[group.begin + place] << p.column_bits) + within : -1;
  const int stages = int(divide_up(p.tokens, kDepth));
  const auto begin_copies = [&](int stage) {
    if (stage < stages) {
      const int64_t token = int64_t{stage} * kDepth;
      copy_tokens(smem.dz[stage % kStages], p.dz, p.tokens, token, kRows / kChunk, row);
      copy_tokens(inputs + stage % kStages * kDepth * width, p.x, p.tokens, token, chunks, column);
    }
    device::cp_async_commit();
  };

  for (int stage = 0; stage + 1 < kStages; ++stage) begin_copies(stage);
  const int warp_row = device::warp_id() % S::kDown * S::kWarpRows;
  const int warp_column = device::warp_id() / S::kDown * S::kWarpColumns;
  const bool needed = warp_column < group.count << p.column_bits;  // the group may be short
  Sums<S::kSlabs, S::kTiles> sums;
  clear<S::kSlabs, S::kTiles>(sums);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    device::cp_async_wait<kStages - 2>();
    device::sync_block();
    begin_copies(stage + kStages - 1);
    if (!needed) continue;
    const MatrixReader<false> a(smem.dz[stage % kStages], kRows, 0, warp_row);
    const MatrixReader<true> b(inputs + stage % kStages * kDepth * width, width, 0, warp_column);
    multiply_stage<T, true, true>(sums, a, b);
  }
  device::cp_async_wait<0>();
  device::sync_block();  // the tiles become the warps' own
  if (!needed) return;
  T* const own = inputs + device::warp_id() * S::kWarpRows * S::kWarpColumns;
  store_sums<T, S::kSlabs, S::kTiles>(own, sums, [&](int r, int c, const Vector<T, 8>& chunk) {
    store_gradient(p, group, warp_row + r, warp_column + c, chunk);
  });
}

template <class T, int kRows>
void launch_weight(const WeightProduct& p, int warps, Stream stream) {
  const int64_t blocks = groups_of(p);
  check_value(blocks <= 0x7fffffff, "weight: too many blocks for one launch");
  const size_t bytes = sizeof(Smem<T, kRows>) + sizeof(T) * size_t(kStages * kDepth * warps * 32);
  device::launch(weight_kernel<T, kRows>, dim3(unsigned(blocks)), dim3(unsigned(warps * device::kWarpSize)),
                 bytes, stream, p);
}

template <class T>
void choose_rows(const WeightProduct& p, int warps, Stream stream) {
  switch (p.row_bits) {
    case 7:
      return launch_weight<T, 128>(p, warps, stream);
    case 6:
      return launch_weight<T, 64>(p, warps, stream);
    case 5:
      return launch_weight<T, 32>(p, warps, stream);
    default:
      return launch_weight<T, 16>(p, warps, stream);
  }
}

// Warps, of 32 columns each: as many as leave a thread block for each multiprocessor.
int cut(WeightProduct& p, int device) {
  const int64_t wanted = device::multiprocessor_count(device);
  const size_t limit = device::shared_memory_limit(device);
  const int least = int(larger(2, int64_t{1} << p.column_bits >> 5));
  int warps = kMostWarps;
  const auto bytes = [&] {
    return size_t(kStages * kDepth * 2) * (size_t(warps * 32) + (size_t{1} << larger(p.row_bits, 4)));
  };
  const auto thread_blocks = [&] { return divide_up(p.blocks << p.column_bits, warps * 32); };
  while (warps > least && (bytes() > limit || thread_blocks() < wanted)) warps /= 2;
  p.together_bits = 0;
  while (32 * warps >> (p.column_bits + p.together_bits) > 1) ++p.together_bits;
  return warps;
}

}  // namespace

void block_sparse_weight_mma(const WeightProduct& given, int device, Stream stream) {
  WeightProduct p = given;
  const int warps = cut(p, device);
  p.dtype == DType::kFloat16 ? choose_rows<fp16>(p, warps, stream) : choose_rows<bf16>(p, warps, stream);
}

}  // namespace tilewright::prune::blocks
