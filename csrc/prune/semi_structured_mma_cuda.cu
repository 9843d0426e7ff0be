// The 2:4 linear layer forward in 16 bits on the sparse tensor cores (mma.sp, sm_80 and later).
//
// What the instruction takes sparse is its first operand, so a thread block computes the transpose of a tile
// of y: 128 rows of the weight times 128 or 32 tokens, y^T = W x^T. A warp takes 64 rows and half of the
// tokens. Stages of 64 columns are copied two ahead of the one that is multiplied: the values as they are, x
// as it is, and the positions as they are: a lane's metadata are two half words of two rows of them, and the
// two pairs of lanes of a quad hold those of two slabs of 16 rows, between which the instruction's selector
// chooses.
//
// Roofline, of a stage of 128 rows and 128 tokens: 2.1 MFLOP counted dense, 512 clocks of sm_80's sparse
// tensor cores; 48 KB of fragments out of shared memory and 25 KB into it, 570 clocks; 25 KB from L2.
#include "core/tune.h"
#include "device/async_copy.h"
#include "device/mma_sparse.h"
#include "prune/semi_structured_cuda.h"

namespace tilewright::prune::semi {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 128, kDepth = 64, kKept = kDepth / 2;  // of a stage
constexpr int kStages = 3;
constexpr int kWarpRows = 64, kSlabs = kWarpRows / 16;
constexpr int kMostOfSmallTiles = TW_TUNED(SEMI_STRUCTURED_SMALL_TILES, 32);  // tokens, in tiles of 32
constexpr uint8_t kFirstTwo = 0x44;  // positions that are valid, where there is nothing

struct MmaParams {
  SemiStructuredLinearParams p;
  int64_t row_tiles;
  bool x_vectors, weight_vectors, y_vectors, z_vectors;
};

template <class T, int kTokens>
struct Stage {
  T values[kRows * kKept];
  T x[kTokens * kDepth];
  uint8_t positions[kRows * (kDepth / 8)];
};

template <class T, int kTokens>
union alignas(128) Smem {
  Stage<T, kTokens> stages[kStages];
  T results[kTokens * (kRows + 8)];
};

// Element (row, 8 chunk) of a tile of x, or of the values, whose rows of 4 chunks lie two to a line of banks.
__device__ __forceinline__ int place_in_x(int row, int chunk) {
  return row * kDepth + ((chunk ^ (row & 7)) << 3);
}
__device__ __forceinline__ int place_in_values(int row, int chunk) {
  return row * kKept + ((chunk ^ (row >> 1 & 3)) << 3);
}

template <class T, int kTokens>
__device__ __forceinline__ void copy_x(T* tile, const MmaParams& m, int64_t token0, int64_t column0) {
  const SemiStructuredLinearParams& p = m.p;
  const T* data = static_cast<const T*>(p.x.data);
  for (int i = int(threadIdx.x); i < kTokens * (kDepth / 8); i += kThreads) {
    const int r = i / (kDepth / 8), chunk = i % (kDepth / 8);
    const int64_t token = token0 + r, column = column0 + 8 * chunk;
    T* to = tile + place_in_x(r, chunk);
    const bool inside = token < p.tokens && column < p.weight.in;
    if (m.x_vectors) {
      device::cp_async<16>(to, inside ? data + token * p.x.row + column : data, inside);
      continue;
    }
    Vector<T, 8> elements{};
    for (int j = 0; inside && j < 8 && column + j < p.weight.in; ++j)
      elements[j] = data[token * p.x.row + (column + j) * p.x.column];
    device::store(reinterpret_cast<Vector<T, 8>*>(to), elements);
  }
}

template <class T>
__device__ __forceinline__ void copy_values(T* tile, const MmaParams& m, int64_t row0, int64_t column0) {
  const SemiStructuredWeight& w = m.p.weight;
  const int64_t kept = w.kept();
  const T* data = static_cast<const T*>(w.values);
  for (int i = int(threadIdx.x); i < kRows * (kKept / 8); i += kThreads) {
    const int r = i / (kKept / 8), chunk = i % (kKept / 8);
    const int64_t row = row0 + r, element = column0 / 2 + 8 * chunk;
    T* to = tile + place_in_values(r, chunk);
    const bool inside = row < w.out && element < kept;
    if (m.weight_vectors) {
      device::cp_async<16>(to, inside ? data + row * kept + element : data, inside);
      continue;
    }
    Vector<T, 8> elements{};
    for (int j = 0; inside && j < 8 && element + j < kept; ++j) elements[j] = data[row * kept + element + j];
    device::store(reinterpret_cast<Vector<T, 8>*>(to), elements);
  }
}

// Rows that do not exist take those of the last one: what is multiplied there is not written.
__device__ __forceinline__ void copy_positions(uint8_t* tile, const MmaParams& m, int64_t row0,
                                               int64_t column0) {
  const SemiStructuredWeight& w = m.p.weight;
  const int r = int(threadIdx.x);
  static_assert(kThreads == kRows && kDepth / 8 == 8);
  const uint8_t* from = positions_of(w, smaller(row0 + r, w.out - 1)) + column0 / 8;
  if (m.weight_vectors) return device::cp_async<8>(tile + 8 * r, from);
  Vector<uint8_t, 8> bytes;
  for (int i = 0; i < 8; ++i) {
    const int64_t left = w.in - column0 - 8 * i;  // columns
    bytes[i] = left >= 8 ? from[i] : left > 0 ? uint8_t((from[i] & 15) | (kFirstTwo & 0xf0)) : kFirstTwo;
  }
  device::store(reinterpret_cast<Vector<uint8_t, 8>*>(tile + 8 * r), bytes);
}

// Of two slabs from row on and 32 columns, the half words of these positions that this lane brings.
__device__ __forceinline__ uint32_t metadata_of(const uint8_t* positions, int row, int step) {
  const int lane = device::lane_id(), g = lane / 4, t = lane % 4;
  const uint8_t* from = positions + (row + t / 2 * 16 + g) * 8 + step * 4 + t % 2 * 2;
  const auto low = device::load(reinterpret_cast<const Vector<uint16_t, 1>*>(from));
  const auto high = device::load(reinterpret_cast<const Vector<uint16_t, 1>*>(from + 8 * 8));
  return uint32_t{low[0]} | uint32_t{high[0]} << 16;
}

template <int kTokens>
using Sums = float[kSlabs][kTokens / 16][4];  // tiles of 8 tokens: a warp has half of them

template <class T, int kTokens>
__device__ __forceinline__ void multiply_stage(Sums<kTokens>& sums, const Stage<T, kTokens>& stage,
                                               int first_row, int first_token) {
  const int lane = device::lane_id(), matrix = lane / 8, within = lane % 8;
#pragma unroll
  for (int step = 0; step < kDepth / 32; ++step) {
    uint32_t a[kSlabs][4], metadata[kSlabs / 2];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int row = first_row + 16 * s + matrix % 2 * 8 + within;
      device::load_matrices(
          a[s], device::shared_address(stage.values + place_in_values(row, 2 * step + matrix / 2)));
    }
#pragma unroll
    for (int s = 0; s < kSlabs / 2; ++s) metadata[s] = metadata_of(stage.positions, first_row + 32 * s, step);
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n) {
      uint32_t b[4];
      device::load_matrices(
          b, device::shared_address(stage.x + place_in_x(first_token + 8 * n + within, 4 * step + matrix)));
#pragma unroll
      for (int s = 0; s < kSlabs; s += 2) {
        device::mma_sparse_m16n8k32<T, 0>(sums[s][n], a[s], b, metadata[s / 2]);
        device::mma_sparse_m16n8k32<T, 1>(sums[s + 1][n], a[s + 1], b, metadata[s / 2]);
      }
    }
  }
}

// Writes a tile of results by way of shared memory, where it lies by tokens.
template <class T, int kTokens>
__device__ __forceinline__ void store_tile(T* tile, const Matrix& to, bool vectors, const Sums<kTokens>& sums,
                                           const SemiStructuredLinearParams& p, Activation activation,
                                           int64_t row0, int64_t token0, int first_row, int first_token) {
  constexpr int kPitch = kRows + 8;
  const int lane = device::lane_id();
  device::sync_block();
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 16 * s + lane / 4 + i / 2 * 8;
        const int token = first_token + 8 * n + lane % 4 * 2 + i % 2;
        tile[token * kPitch + row] = device::from_float<T>(activate<false>(sums[s][n][i], activation));
      }
    }
  }
  device::sync_block();
  T* data = static_cast<T*>(to.data);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kTokens * (kRows / 8); i += kThreads) {
    const int64_t token = token0 + i / (kRows / 8), row = row0 + i % (kRows / 8) * 8;
    if (token >= p.tokens || row >= p.weight.out) continue;
    const auto* from =
        reinterpret_cast<const Vector<T, 8>*>(tile + i / (kRows / 8) * kPitch + i % (kRows / 8) * 8);
    const Vector<T, 8> elements = device::load(from);
    if (vectors) {
      device::store(reinterpret_cast<Vector<T, 8>*>(data + token * to.row + row), elements);
      continue;
    }
    for (int j = 0; j < 8 && row + j < p.weight.out; ++j)
      data[token * to.row + (row + j) * to.column] = elements[j];
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void add_bias(Sums<kTokens>& sums, const SemiStructuredLinearParams& p,
                                         int64_t first_row) {
  if (p.bias == nullptr) return;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + 16 * s + device::lane_id() / 4 + half * 8;
      const float bias = row < p.weight.out ? device::to_float(static_cast<const T*>(p.bias)[row]) : 0.0f;
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        sums[s][n][2 * half] += bias;
        sums[s][n][2 * half + 1] += bias;
      }
    }
  }
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads) sparse_kernel(const __grid_constant__ MmaParams m) {
  Smem<T, kTokens>& smem = device::shared_memory<Smem<T, kTokens>>();
  const SemiStructuredLinearParams& p = m.p;
  const int64_t row0 = int64_t{blockIdx.x} % m.row_tiles * kRows;
  const int64_t token0 = int64_t{blockIdx.x} / m.row_tiles * kTokens;
  const int first_row = device::warp_id() % 2 * kWarpRows,
            first_token = device::warp_id() / 2 * (kTokens / 2);
  const int stages = int(divide_up(p.weight.in, kDepth));
  const auto begin_copies = [&](int number) {
    if (number < stages) {
      Stage<T, kTokens>& stage = smem.stages[number % kStages];
      const int64_t column = int64_t{number} * kDepth;
      copy_values(stage.values, m, row0, column);
      copy_x<T, kTokens>(stage.x, m, token0, column);
      copy_positions(stage.positions, m, row0, column);
    }
    device::cp_async_commit();
  };
  Sums<kTokens> sums;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int stage = 0; stage + 1 < kStages; ++stage) begin_copies(stage);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    device::cp_async_wait<kStages - 2>();
    device::sync_block();
    begin_copies(stage + kStages - 1);
    multiply_stage<T, kTokens>(sums, smem.stages[stage % kStages], first_row, first_token);
  }
  device::cp_async_wait<0>();
  add_bias<T, kTokens>(sums, p, row0 + first_row);
  if (p.z.data != nullptr)
    store_tile<T, kTokens>(smem.results, p.z, m.z_vectors, sums, p, Activation::kNone, row0, token0,
                           first_row, first_token);
  store_tile<T, kTokens>(smem.results, p.y, m.y_vectors, sums, p, p.activation, row0, token0, first_row,
                         first_token);
}

bool by_vectors(const Matrix& at, int64_t columns) {
  return at.column == 1 && at.row % 8 == 0 && columns % 8 == 0 && device::is_aligned(at.data, 16);
}

template <class T, int kTokens>
void launch_sparse(const SemiStructuredLinearParams& p, Stream stream) {
  const SemiStructuredWeight& w = p.weight;
  const bool aligned = device::is_aligned(w.values, 16) && device::is_aligned(w.positions, 8);
  const MmaParams m{p,
                    divide_up(w.out, kRows),
                    by_vectors(p.x, w.in),
                    aligned && w.in % kDepth == 0,
                    by_vectors(p.y, w.out),
                    by_vectors(p.z, w.out)};
  const int64_t blocks = m.row_tiles * divide_up(p.tokens, kTokens);
  check_value(blocks <= 0x7fffffff, "x: too many tokens for one launch");
  device::launch(sparse_kernel<T, kTokens>, dim3(unsigned(blocks)), dim3(kThreads), sizeof(Smem<T, kTokens>),
                 stream, m);
}

template <class T>
void choose_tile(const SemiStructuredLinearParams& p, Stream stream) {
  p.tokens <= kMostOfSmallTiles ? launch_sparse<T, 32>(p, stream) : launch_sparse<T, 128>(p, stream);
}

}  // namespace

void forward_sparse_mma(const SemiStructuredLinearParams& p, Stream stream) {
  p.dtype == DType::kFloat16 ? choose_tile<fp16>(p, stream) : choose_tile<bf16>(p, stream);
}

}  // namespace tilewright::prune::semi
