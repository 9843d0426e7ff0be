// The block-sparse linear layer in float32 on the multiply-add units: y, dx and dW.
//
// A plain path. All three are C[row][column] = sum over k of A(row, k) B(column, k); what differs is where A
// and B are found:
//
//          row                      column          k             A                B
//   y      token                    of a block row  of its list   x                the blocks
//   dx     token                    of a b. column  of its list   dz               the blocks, transposed
//   dW     column of a block, of a  of a block row  token         x, transposed    dz, transposed
//          group of its neighbours
//
// 256 threads take 4 x 4 results each, of 64 x 64, or 256 x 16 where blocks are narrow, and 16 of k at a
// time.
//
// Roofline: a step of k is 16 multiply-adds for two loads of 16 bytes from shared memory: the units' speed,
// if the copies, which are not overlapped within a thread block, hide behind other blocks'.
#include "device/launch.h"
#include "prune/block_sparse_linear_cuda.h"

namespace tilewright::prune::blocks {
namespace {

constexpr int kThreads = 256;
constexpr int kOwn = 4;  // rows of a thread, and columns
constexpr int kSteps = 16;

template <int kColumns>
struct Shape {
  static constexpr int kAcross = kColumns / kOwn;  // threads side by side
  static constexpr int kRows = kThreads / kAcross * kOwn;
};

// A row is padded by a vector, so that stores of neighbours in k do not meet in one bank.
template <int kColumns>
struct alignas(16) Smem {
  float a[kSteps][Shape<kColumns>::kRows + 4];
  float b[kSteps][kColumns + 4];
};

using OwnSums = float[kOwn][kOwn];

// element(i, k) of so many rows or columns i; neighbouring threads take neighbours in k, or in i.
template <int kCount, class Element>
__device__ __forceinline__ void fill(float (&tile)[kSteps][kCount + 4], bool along_k,
                                     const Element& element) {
#pragma unroll 2
  for (int at = int(threadIdx.x); at < kCount * kSteps; at += kThreads) {
    const int i = along_k ? at / kSteps : at % kCount, k = along_k ? at % kSteps : at / kCount;
    tile[k][i] = element(i, k);
  }
}

template <int kColumns>
__device__ __forceinline__ void multiply(OwnSums& sums, const Smem<kColumns>& smem, int row, int column) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const auto a = device::load(reinterpret_cast<const Vector<float, kOwn>*>(smem.a[k] + row));
    const auto b = device::load(reinterpret_cast<const Vector<float, kOwn>*>(smem.b[k] + column));
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) sums[r][c] = device::fma_rn(a[r], b[c], sums[r][c]);
    }
  }
}

__device__ __forceinline__ float element_of(const Access& from, int64_t row, int64_t rows, int64_t column) {
  if (row >= rows || column < 0 || column >= from.columns) return 0.0f;
  return static_cast<const float*>(from.at.data)[row * from.at.row + column * from.at.column];
}

// ---- y and dx ----

struct ProductParams {
  Product p;
  bool transposed;
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductParams given) {
  using S = Shape<kColumns>;
  Smem<kColumns>& smem = device::shared_memory<Smem<kColumns>>();
  const Product& p = given.p;
  const uint32_t tiles = uint32_t(p.token_tiles), slice = blockIdx.x / tiles;
  const int64_t token0 = int64_t{blockIdx.x % tiles} * S::kRows, list = p.order[slice / uint32_t(p.slices)];
  const int column0 = int(slice % uint32_t(p.slices)) * kColumns;
  const int64_t begin = p.first[list], depth = (p.first[list + 1] - begin) << p.depth_bits;
  const int within = (1 << p.depth_bits) - 1, width = 1 << p.width_bits;
  const int row = int(threadIdx.x) / S::kAcross * kOwn, column = int(threadIdx.x) % S::kAcross * kOwn;
  OwnSums sums = {};
#pragma unroll 1
  for (int64_t step = 0; step < depth; step += kSteps) {
    fill<S::kRows>(smem.a, true, [&](int i, int k) {
      const int64_t place = step + k;
      if (place >= depth) return 0.0f;
      const int64_t part = p.part[begin + (place >> p.depth_bits)];
      return element_of(p.in, token0 + i, p.tokens, (part << p.depth_bits) + (place & within));
    });
    fill<kColumns>(smem.b, !given.transposed, [&](int i, int k) {
      const int64_t place = step + k, number = begin + (place >> p.depth_bits);
      if (place >= depth || column0 + i >= width) return 0.0f;
      const int64_t block = p.block == nullptr ? number : p.block[number];
      const int64_t along = place & within, across = column0 + i;
      const int64_t in_block =
          given.transposed ? (along << p.width_bits) + across : (across << p.depth_bits) + along;
      return static_cast<const float*>(p.values)[(block << (p.depth_bits + p.width_bits)) + in_block];
    });
    device::sync_block();
    multiply(sums, smem, row, column);
    device::sync_block();
  }
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    const int64_t out = (list << p.width_bits) + column0 + column + c;
    if (column0 + column + c >= width || out >= p.out.columns) continue;
    const float bias = p.bias == nullptr ? 0.0f : static_cast<const float*>(p.bias)[out];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t token = token0 + row + r;
      if (token >= p.tokens) continue;
      const float z = p.bias == nullptr ? sums[r][c] : sums[r][c] + bias;
      const auto write = [&](const Matrix& to, float value) {
        static_cast<float*>(to.data)[token * to.row + out * to.column] = value;
      };
      if (p.linear.at.data != nullptr) write(p.linear.at, z);
      write(p.out.at, activate<true>(z, p.activation));
    }
  }
}

template <int kColumns>
void launch_product(Product p, bool transposed, Stream stream) {
  p.slices = int32_t(divide_up(int64_t{1} << p.width_bits, kColumns));
  p.token_tiles = int32_t(divide_up(p.tokens, Shape<kColumns>::kRows));
  const int64_t blocks = p.lists * p.slices * p.token_tiles;
  check_value(blocks <= 0x7fffffff, "x: too many tokens for one launch");
  device::launch(product_kernel<kColumns>, dim3(unsigned(blocks)), dim3(kThreads), sizeof(Smem<kColumns>),
                 stream, {p, transposed});
}

// ---- dW ----

template <int kColumns>
__global__ void __launch_bounds__(kThreads) weight_kernel(const __grid_constant__ WeightProduct p) {
  using S = Shape<kColumns>;
  Smem<kColumns>& smem = device::shared_memory<Smem<kColumns>>();
  const uint32_t across = uint32_t(p.across), slices = uint32_t(p.slices);
  const BlockGroup group = group_of(p, blockIdx.x / across / slices);
  if (group.count == 0) return;
  const int row0 = int(blockIdx.x % across) * S::kRows;
  const int column0 = int(blockIdx.x / across % slices) * kColumns, height = 1 << p.row_bits;
  const int within = (1 << p.column_bits) - 1;
  const int row = int(threadIdx.x) / S::kAcross * kOwn, column = int(threadIdx.x) % S::kAcross * kOwn;
  const int64_t out0 = (int64_t{group.row} << p.row_bits) + column0;
  const auto input_column = [&](int i) -> int64_t {  // of the group's columns, side by side
    const int place = i >> p.column_bits;
    if (place >= group.count) return -1;
    return (int64_t{p.column[group.begin + place]} << p.column_bits) + (i & within);
  };
  OwnSums sums = {};
#pragma unroll 1
  for (int64_t step = 0; step < p.tokens; step += kSteps) {
    fill<S::kRows>(smem.a, false,
                   [&](int i, int k) { return element_of(p.x, step + k, p.tokens, input_column(row0 + i)); });
    fill<kColumns>(smem.b, false, [&](int i, int k) {
      return column0 + i < height ? element_of(p.dz, step + k, p.tokens, out0 + i) : 0.0f;
    });
    device::sync_block();
    multiply(sums, smem, row, column);
    device::sync_block();
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int j = row0 + row + r;
    const int64_t in = input_column(j), number = group.begin + (j >> p.column_bits);
    if (in < 0) continue;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int i = column0 + column + c;
      if (i >= height) continue;
      const bool inside = in < p.x.columns && out0 + column + c < p.dz.columns;
      static_cast<float*>(p.values)[(((number << p.row_bits) + i) << p.column_bits) + (j & within)] =
          inside ? sums[r][c] : 0.0f;
    }
  }
}

template <int kColumns>
void launch_weight(WeightProduct p, Stream stream) {
  p.slices = int32_t(divide_up(int64_t{1} << p.row_bits, kColumns));
  // Blocks side by side fill a tile, or one takes several.
  p.across = int32_t(divide_up(int64_t{1} << p.column_bits, Shape<kColumns>::kRows));
  p.together_bits = int32_t(larger(log2_of(Shape<kColumns>::kRows) - p.column_bits, 0));
  const int64_t blocks = groups_of(p) * p.slices * p.across;
  check_value(blocks <= 0x7fffffff, "weight: too many blocks for one launch");
  device::launch(weight_kernel<kColumns>, dim3(unsigned(blocks)), dim3(kThreads), sizeof(Smem<kColumns>),
                 stream, p);
}

}  // namespace

void block_sparse_product_float32(const Product& p, bool transposed, Stream stream) {
  p.width_bits <= 4 ? launch_product<16>(p, transposed, stream) : launch_product<64>(p, transposed, stream);
}

void block_sparse_weight_float32(const WeightProduct& p, Stream stream) {
  p.row_bits <= 4 ? launch_weight<16>(p, stream) : launch_weight<64>(p, stream);
}

}  // namespace tilewright::prune::blocks
