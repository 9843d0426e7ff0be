// The semi-structured linear layer on the GPU where no sparse instruction serves: float32, other patterns
// than 2:4, and the gradients. A tile of the weight is made dense in shared memory, and dense tiles are
// multiplied:
//
//   forward  C[t][o] = sum over c of x[t][c] w[o][c]
//   input    C[t][c] = sum over o of dz[t][o] w[o][c]
//   weight   C[o][c] = sum over t of dz[t][o] x[t][c], written where c is kept
//
// on tensor cores in 16 bits, by float32 arithmetic else. A plain kernel: one stage, element by element
// loads.
//
// Roofline: 2 * out * in * tokens FLOP, the dense product's; the weight is read once for 64 tokens.
#include "device/mma.h"
#include "prune/semi_structured_cuda.h"

namespace tilewright::prune {
namespace semi {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / device::kWarpSize;
constexpr int kRows = 64, kColumns = 64, kDepth = 32;  // of a tile
constexpr int kPad = 8;                                // elements, so that rows do not meet in a bank

struct DenseParams {
  SemiStructuredLinearParams p;
  SemiStructuredCall call;
  int64_t rows, columns, depth;  // of the product
  int64_t column_tiles;
};

template <class T>
struct alignas(128) Smem {
  T a[kRows][kDepth + kPad];     // rows of the result
  T b[kColumns][kDepth + kPad];  // its columns
};

template <class T>
__device__ __forceinline__ T at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data)[row * m.row + column * m.column];
}

// Elements (row, column .. column + 3) of the weight; zeros outside of it.
template <class T>
__device__ __forceinline__ Vector<T, 4> four_weights(const SemiStructuredWeight& w, int64_t row,
                                                     int64_t column) {
  Vector<T, 4> four{};
  if (row >= w.out) return four;
  const T* values = values_of<T>(w, row);
  if (w.two_of_four()) {
    if (column >= w.in) return four;
    const int nibble = positions_of(w, row)[column / 8] >> column / 4 % 2 * 4 & 15;
    const T low = values[column / 2], high = values[column / 2 + 1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i == (nibble & 3)) four[i] = low;
      if (i == nibble >> 2) four[i] = high;
    }
    return four;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = column + i < w.in ? place_of(w, row, column + i) : -1;
    if (place >= 0) four[i] = values[place];
  }
  return four;
}

// Tiles of the stage whose depth begins at `depth0`.
template <class T>
__device__ __forceinline__ void load_tiles(Smem<T>& smem, const DenseParams& d, int64_t row0, int64_t column0,
                                           int64_t depth0) {
  const SemiStructuredLinearParams& p = d.p;
  const int thread = int(threadIdx.x);
  const bool forward = d.call == SemiStructuredCall::kForward, weight = d.call == SemiStructuredCall::kWeight;
  // Of dW dz and x lie with the depth, tokens, along their rows' axis: neighbours in memory are of one token.
  for (int i = thread; i < kRows * kDepth; i += kThreads) {
    const int r = weight ? i % kRows : i / kDepth, k = weight ? i / kRows : i % kDepth;
    const int64_t row = row0 + r, depth = depth0 + k;
    const bool inside = row < d.rows && depth < d.depth;
    T value{};
    if (inside) value = weight ? at<T>(p.y, depth, row) : at<T>(forward ? p.x : p.y, row, depth);
    smem.a[r][k] = value;
  }
  if (weight) {
    for (int i = thread; i < kColumns * kDepth; i += kThreads) {
      const int c = i % kColumns, k = i / kColumns;
      const bool inside = column0 + c < d.columns && depth0 + k < d.depth;
      smem.b[c][k] = inside ? at<T>(p.x, depth0 + k, column0 + c) : T{};
    }
  } else if (forward) {
    for (int i = thread; i < kColumns * kDepth / 4; i += kThreads) {
      const int c = i / (kDepth / 4), k = i % (kDepth / 4) * 4;
      const Vector<T, 4> four = four_weights<T>(p.weight, column0 + c, depth0 + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) smem.b[c][k + j] = four[j];
    }
  } else {
    for (int i = thread; i < kColumns * kDepth / 4; i += kThreads) {
      const int c = i % (kColumns / 4) * 4, k = i / (kColumns / 4);
      const Vector<T, 4> four = four_weights<T>(p.weight, depth0 + k, column0 + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) smem.b[c + j][k] = four[j];
    }
  }
}

template <class T>
__device__ __forceinline__ void store_result(const DenseParams& d, int64_t row, int64_t column, float sum) {
  if (row >= d.rows || column >= d.columns) return;
  const SemiStructuredLinearParams& p = d.p;
  if (d.call == SemiStructuredCall::kForward) return finish<T>(p, row, column, sum);
  if (d.call == SemiStructuredCall::kInput) {
    static_cast<T*>(p.dx.data)[row * p.dx.row + column * p.dx.column] = device::from_float<T>(sum);
    return;
  }
  const int64_t place = place_of(p.weight, row, column);
  if (place >= 0) static_cast<T*>(p.dvalues)[row * p.weight.kept() + place] = device::from_float<T>(sum);
}

struct TilePlace {
  int64_t row, column;
};

__device__ __forceinline__ TilePlace tile_of_block(const DenseParams& d) {
  return {int64_t{blockIdx.x} / d.column_tiles * kRows, int64_t{blockIdx.x} % d.column_tiles * kColumns};
}

// A warp takes 16 rows of the tile and all of its columns.
template <class T>
__global__ void __launch_bounds__(kThreads) mma_kernel(const __grid_constant__ DenseParams d) {
  static_assert(kRows == 16 * kWarps);
  Smem<T>& smem = device::shared_memory<Smem<T>>();
  const TilePlace tile = tile_of_block(d);
  const int lane = device::lane_id(), first = device::warp_id() * 16;
  float sums[kColumns / 8][4] = {};
#pragma unroll 1
  for (int64_t depth = 0; depth < d.depth; depth += kDepth) {
    load_tiles(smem, d, tile.row, tile.column, depth);
    device::sync_block();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4];
      const int below = lane / 8 % 2 * 8, right = lane / 16 * 8;
      device::load_matrices(a, device::shared_address(&smem.a[first + below + lane % 8][k + right]));
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        uint32_t b[4];  // two tiles of columns, the depth's halves of each
        device::load_matrices(
            b, device::shared_address(&smem.b[n * 8 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]));
        device::mma_m16n8k16<T>(sums[n], a, b[0], b[1]);
        device::mma_m16n8k16<T>(sums[n + 1], a, b[2], b[3]);
      }
    }
    device::sync_block();
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_result<T>(d, tile.row + first + lane / 4 + i / 2 * 8, tile.column + n * 8 + lane % 4 * 2 + i % 2,
                      sums[n][i]);
  }
}

// A thread takes 8 rows, 8 apart, and 4 columns, 16 apart.
__global__ void __launch_bounds__(kThreads) float32_kernel(const __grid_constant__ DenseParams d) {
  constexpr int kDown = 8, kAcross = 4, kThreadRows = kRows / kDown, kThreadColumns = kColumns / kAcross;
  static_assert(kThreadRows * kThreadColumns == kThreads);
  Smem<float>& smem = device::shared_memory<Smem<float>>();
  const TilePlace tile = tile_of_block(d);
  const int row = int(threadIdx.x) / kThreadColumns, column = int(threadIdx.x) % kThreadColumns;
  float sums[kDown][kAcross] = {};
#pragma unroll 1
  for (int64_t depth = 0; depth < d.depth; depth += kDepth) {
    load_tiles(smem, d, tile.row, tile.column, depth);
    device::sync_block();
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      float b[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) b[j] = smem.b[column + j * kThreadColumns][k];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const float a = smem.a[row + i * kThreadRows][k];
#pragma unroll
        for (int j = 0; j < kAcross; ++j) sums[i][j] = device::fma_rn(a, b[j], sums[i][j]);
      }
    }
    device::sync_block();
  }
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
      store_result<float>(d, tile.row + row + i * kThreadRows, tile.column + column + j * kThreadColumns,
                          sums[i][j]);
  }
}

template <class T>
void launch_kernel(device::Kernel<DenseParams> kernel, const DenseParams& d, Stream stream) {
  const int64_t blocks = divide_up(d.rows, kRows) * d.column_tiles;
  check_value(blocks <= 0x7fffffff, "x: too many tokens for one launch");
  device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), sizeof(Smem<T>), stream, d);
}

}  // namespace

void product_dense(const SemiStructuredLinearParams& p, SemiStructuredCall call, Stream stream) {
  const SemiStructuredWeight& w = p.weight;
  DenseParams d{p, call, p.tokens, w.out, w.in, 0};
  if (call == SemiStructuredCall::kInput) d.columns = w.in, d.depth = w.out;
  if (call == SemiStructuredCall::kWeight) d.rows = w.out, d.columns = w.in, d.depth = p.tokens;
  d.column_tiles = divide_up(d.columns, kColumns);
  if (p.dtype == DType::kFloat32) return launch_kernel<float>(float32_kernel, d, stream);
  if (p.dtype == DType::kFloat16) return launch_kernel<fp16>(mma_kernel<fp16>, d, stream);
  launch_kernel<bf16>(mma_kernel<bf16>, d, stream);
}

}  // namespace semi

void semi_structured_linear_cuda(const SemiStructuredLinearParams& p, SemiStructuredCall call, int device,
                                 Stream stream) {
  const device::DeviceGuard guard(device);
  const bool sparse = call == SemiStructuredCall::kForward && p.weight.two_of_four();
  if (sparse && semi::forward_few(p, stream)) return;
  if (sparse && p.dtype != DType::kFloat32) return semi::forward_sparse_mma(p, stream);
  semi::product_dense(p, call, stream);
}

}  // namespace tilewright::prune
