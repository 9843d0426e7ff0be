// y of the block-sparse linear layer for up to 8 tokens: activation(x W^T + bias), bound by the weight's
// bytes.
//
// A thread block takes 16 rows of a block row, whose depth its warps share. A step of a warp is 64 bytes of
// each of those rows: lane 4 g + t loads chunk t of 16 bytes of rows g and g + 8, and of token g. In 16 bits
// that is already what two m16n8k16 want, since in a sum over the depth its elements may change places if
// they do so on both sides. In fp32 each lane multiplies its chunks by all tokens'.
//
// Roofline: each byte of the values is read once, with up to 8 of them for 8 tokens' x out of L1. Of a 4096 x
// 4096 weight of which a quarter is there in 16 bits, 8.4 MB: 1.75 us of an H200's 4.8 TB/s.
#include "device/launch.h"
#include "prune/block_sparse_linear_cuda.h"

namespace tilewright::prune::blocks {
namespace {

constexpr int kRows = 16;  // of a thread block
constexpr int kLanesAlong = 4;

template <class T>
constexpr int kEach = 16 / int(sizeof(T));  // elements of a chunk

template <class T>
constexpr int kUnroll = sizeof(T) == 4 ? 2 : 4;  // steps whose loads are under way together

// Sums of a warp, rows by tokens, for the others to see.
struct Smem {
  float sums[kMostWarps][kRows][kFewTokens];
};

template <class T>
struct Step {
  Vector<T, kEach<T>> w[2];                                // rows g and g + 8
  Vector<T, kEach<T>> x[sizeof(T) == 4 ? kFewTokens : 1];  // fp32: of each token, else of token g
};

template <class T>
using LaneSums = float[sizeof(T) == 4 ? 2 * kFewTokens : 4];

template <class T>
__device__ __forceinline__ Vector<T, kEach<T>> load_input(const Product& p, int token, int column,
                                                          bool exists) {
  Vector<T, kEach<T>> chunk;
  const T* from = static_cast<const T*>(p.in.at.data) + token * p.in.at.row + column * p.in.at.column;
  exists = exists && token < p.tokens;
  if (p.in.vectors && exists && column < p.in.columns)
    return device::load(reinterpret_cast<const Vector<T, kEach<T>>*>(from));
#pragma unroll
  for (int i = 0; i < kEach<T>; ++i)
    chunk[i] = exists && column + i < p.in.columns ? from[i * p.in.at.column] : T{};
  return chunk;
}

template <class T>
__device__ __forceinline__ Vector<T, kEach<T>> load_weight(const Product& p, int64_t place, bool exists) {
  Vector<T, kEach<T>> chunk;
  const T* from = static_cast<const T*>(p.values) + place;
  if (p.values_vectors && exists)
    return device::load_streaming(reinterpret_cast<const Vector<T, kEach<T>>*>(from));
#pragma unroll
  for (int i = 0; i < kEach<T>; ++i) chunk[i] = exists ? from[i] : T{};
  return chunk;
}

// Chunk t of the step, which may be behind the list's end.
template <class T>
__device__ __forceinline__ void load_step(Step<T>& to, const Product& p, int64_t begin, int64_t depth,
                                          int64_t at, int first_row) {
  const int lane = device::lane_id(), g = lane / kLanesAlong, width = 1 << p.width_bits;
  at += lane % kLanesAlong * kEach<T>;
  const bool exists = at < depth;
  const int64_t number = begin + (exists ? at >> p.depth_bits : 0);
  const int within = int(at) & ((1 << p.depth_bits) - 1);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + g;
    to.w[half] =
        load_weight<T>(p, (((number << p.width_bits) + row) << p.depth_bits) + within, exists && row < width);
  }
  const int column = exists ? (p.part[number] << p.depth_bits) + within : 0;
#pragma unroll
  for (int i = 0; i < int(sizeof(to.x) / sizeof(to.x[0])); ++i)
    to.x[i] = load_input<T>(p, sizeof(T) == 4 ? i : g, column, exists);
}

__device__ __forceinline__ void multiply(LaneSums<float>& sums, const Step<float>& step) {
#pragma unroll
  for (int token = 0; token < kFewTokens; ++token) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kEach<float>; ++i) {
        float& sum = sums[token * 2 + half];
        sum = device::fma_rn(step.w[half][i], step.x[token][i], sum);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], const Step<T>& step) {
  uint32_t upper[4], lower[4], x[4];
  memcpy(upper, &step.w[0], sizeof upper);
  memcpy(lower, &step.w[1], sizeof lower);
  memcpy(x, &step.x[0], sizeof x);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t rows[4] = {upper[i], lower[i], upper[i + 1], lower[i + 1]};
    device::mma_m16n8k16<T>(sums, rows, x[i], x[i + 1]);
  }
}

// A warp's sums, of all its lanes.
__device__ __forceinline__ void write_sums(float (&to)[kRows][kFewTokens], LaneSums<float>& sums) {
  const int lane = device::lane_id(), g = lane / kLanesAlong;
#pragma unroll
  for (int i = 0; i < 2 * kFewTokens; ++i) {
    sums[i] += device::shfl_xor(sums[i], 1);
    sums[i] += device::shfl_xor(sums[i], 2);
    if (i % kLanesAlong == lane % kLanesAlong) to[i % 2 * 8 + g][i / 2] = sums[i];
  }
}

__device__ __forceinline__ void write_sums(float (&to)[kRows][kFewTokens], const float (&sums)[4]) {
  const int lane = device::lane_id(), g = lane / kLanesAlong, t = lane % kLanesAlong;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i / 2 * 8 + g][2 * t + i % 2] = sums[i];
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) few_kernel(const __grid_constant__ Product p) {
  Smem& smem = device::shared_memory<Smem>();
  const uint32_t slices = uint32_t(p.slices);
  const int64_t list = p.order[blockIdx.x / slices], begin = p.first[list];
  const int first_row = int(blockIdx.x % slices) * kRows;
  const int64_t depth = (p.first[list + 1] - begin) << p.depth_bits;
  const int warps = int(blockDim.x) / device::kWarpSize, warp = device::warp_id();
  constexpr int kStep = kLanesAlong * kEach<T>;
  LaneSums<T> sums = {};
#pragma unroll 1
  for (int64_t at = int64_t{warp} * kUnroll<T> * kStep; at < depth;
       at += int64_t{warps} * kUnroll<T> * kStep) {
    Step<T> steps[kUnroll<T>];
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) load_step(steps[u], p, begin, depth, at + u * kStep, first_row);
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) multiply(sums, steps[u]);
  }
  write_sums(smem.sums[warp], sums);
  device::sync_block();
  for (int i = int(threadIdx.x); i < kRows * kFewTokens; i += int(blockDim.x)) {
    const int row = first_row + i % kRows, token = i / kRows;
    const int64_t column = (list << p.width_bits) + row;
    if (token >= p.tokens || row >= 1 << p.width_bits || column >= p.out.columns) continue;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += smem.sums[w][i % kRows][token];
    if (p.bias != nullptr) sum += device::to_float(static_cast<const T*>(p.bias)[column]);
    const auto write = [&](const Matrix& to, T value) {
      static_cast<T*>(to.data)[token * to.row + column * to.column] = value;
    };
    const T linear = device::from_float<T>(sum);
    if (p.linear.at.data != nullptr) write(p.linear.at, linear);
    write(p.out.at, device::from_float<T>(activate<sizeof(T) == 4>(device::to_float(linear), p.activation)));
  }
}

template <class T>
void launch_few(const Product& p, Stream stream) {
  const int64_t blocks = p.lists * p.slices;
  check_value(blocks <= 0x7fffffff, "weight: too many block rows for one launch");
  device::launch(few_kernel<T>, dim3(unsigned(blocks)), dim3(kMostThreads), sizeof(Smem), stream, p);
}

}  // namespace

void block_sparse_product_few(const Product& given, Stream stream) {
  Product p = given;
  p.slices = int32_t(divide_up(int64_t{1} << p.width_bits, kRows));
  if (p.dtype == DType::kFloat32) return launch_few<float>(p, stream);
  p.dtype == DType::kFloat16 ? launch_few<fp16>(p, stream) : launch_few<bf16>(p, stream);
}

}  // namespace tilewright::prune::blocks
